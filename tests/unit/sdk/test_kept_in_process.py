"""What tasks keep for others in one process: in a folder, if it takes it."""

from __future__ import annotations

from pathlib import Path

from phalanx.programs.base import Beside, Graph
from phalanx.sdk.in_process_programs import _Kept

GRAPH = Graph(((), (0,), (1,), (1,)))


def test_who_goes_on_reads_what_was_kept(tmp_path: Path) -> None:
    kept = _Kept(GRAPH, tmp_path)
    kept.take(0, Beside(kept=b"the first steps"))
    assert kept.inputs(1) == []
    kept.take(1, Beside(earlier=(-1, 0)))
    assert kept.inputs(2) == []
    (value,) = kept.inputs(3)
    path = kept.path(value.digest)
    assert path is not None
    assert path.read_bytes() == b"the first steps"
    assert value.size_bytes == len(b"the first steps")
    assert kept.path("1" * 64) is None, "that is a blob"


def test_a_folder_that_takes_nothing_lets_all_begin_anew(tmp_path: Path) -> None:
    kept = _Kept(GRAPH, tmp_path / "gone")
    kept.take(0, Beside(kept=b"the first steps"))
    kept.take(1, Beside(earlier=(0, 0)))
    assert kept.inputs(2) == kept.inputs(3) == []
