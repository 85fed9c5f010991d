"""Files of every kind that is read, with something wrong in them: refused by a sentence, or read.

PHALANX_FUZZ_FILES says how many of each kind the long test tries (3,000), PHALANX_FUZZ_SEED draws
others. What is read may take MULTIPLE times the file in memory, beside a fixed part.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pyarrow as pa
import pytest

from phalanx.data.checkpoint_parts import parse_part
from phalanx.data.chunks import decode_chunk
from phalanx.data.ingest import ingest
from phalanx.data.linking import Digests
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.errors import DataLoss, FailedPrecondition, InvalidArgument, PhalanxError
from phalanx.keys import folder, tokens
from phalanx.keys.authority import Authority
from phalanx.keys.caller import Role
from phalanx.keys.files import check_pair, check_trusted
from phalanx.sdk.job_files import parse_document
from phalanx.specs.starting import shapes_in_file, trained_on
from phalanx.wheels import check_wheel, write_code
from tests.unit.data.fuzzed_files import (
    JOB,
    Change,
    beside,
    changed_archive,
    changed_json,
    changed_tensors,
    damaged,
    good_chunks,
    good_files,
    good_wheel,
)

# What is read with a warning is read.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Reading .*npz.* file required additional header"),
    pytest.mark.filterwarnings("ignore::ruamel.yaml.error.ReusedAnchorWarning"),
]

SEED = int(os.environ.get("PHALANX_FUZZ_SEED", "0")) or 31
FILES = int(os.environ.get("PHALANX_FUZZ_FILES", "3000"))
FEW = 25
MIB = 1024 * 1024
FIXED_BYTES = 48 * MIB
MULTIPLE = 64
HANG_S = 20

Parse = Callable[[Path, bytes], Any]


def _ingest(path: Path, _: bytes) -> None:
    beside(path)
    ingest(path, IngestOptions(), Digests())


def _document(path: Path, content: bytes) -> None:
    parse_document(content.decode(errors="replace"), str(path), is_json=path.suffix == ".json")


def _part(_: Path, content: bytes) -> None:
    try:
        parse_part(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # What readers of checkpoints take for damage.
        raise DataLoss(str(error)) from error


def _wheel(path: Path, content: bytes) -> None:
    check_wheel(io.BytesIO(content), path.name)
    write_code(path.parent / "code", {}, {path.name: path})


def _trained_on(_: Path, content: bytes) -> None:
    trained_on(content)


Case = tuple[str, bytes, Change, Parse]


def _cases(tmp_path: Path) -> Iterator[Case]:
    for name, content, change in good_files():
        yield name, content, change, _ingest
    manifest = ingest(_written(tmp_path / "m.csv", b"x,y\n1,a\n2,b\n"), IngestOptions(), Digests())
    dense, sparse = good_chunks()
    document = json.dumps({"name": "j", "tasks": {"entrypoint": "a:b", "arguments": [{"n": 1}]}})
    yield "job.yaml", JOB, damaged, _document
    yield "job.json", document.encode(), changed_json, _document
    yield (
        "manifest.json",
        manifest.to_json(),
        changed_json,
        lambda _, data: DatasetManifest.from_json(data),
    )
    yield "chunk", dense, changed_tensors, lambda _, data: decode_chunk(data)
    yield "sparse chunk", sparse, changed_tensors, lambda _, data: decode_chunk(data)
    part = b'{"parameters":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    yield "part", len(part).to_bytes(8, "little") + part + bytes(8), changed_tensors, _part
    yield "model.safetensors", dense, changed_tensors, lambda path, _: shapes_in_file(path)
    yield "model.json", b'{"columns": [{"name": "x"}]}', changed_json, _trained_on
    yield "nets-1-py3-none-any.whl", good_wheel(), changed_archive, _wheel
    yield from _keys(tmp_path)


def _keys(tmp_path: Path) -> Iterator[Case]:
    ring = tmp_path / "keys"
    folder.init(ring)
    listed = ring / "tokens.json"
    tokens.create(listed, "ann", Role.SUBMITTER, namespaces=["a"], expires_s=60.0)
    yield "tokens.json", listed.read_bytes(), changed_json, lambda _, data: tokens.parse(data)
    mine = b"phx_" + b"a" * 43 + b"\n"
    yield "ann.token", mine, damaged, lambda path, _: tokens.read_token(path)
    pem, key = (ring / "worker.pem").read_bytes(), (ring / "worker.key").read_bytes()
    yield "c.pem", pem, damaged, lambda path, _: check_pair(path, ring / "worker.key")
    yield "c.key", key, damaged, lambda path, _: check_pair(ring / "worker.pem", path)
    yield "trusted.pem", pem, damaged, lambda path, _: check_trusted(path)
    yield "ca.pem", (ring / "ca.pem").read_bytes(), damaged, lambda path, _: _authority(path, ring)


def _authority(path: Path, ring: Path) -> None:
    (path.parent / "ca.key").write_bytes((ring / "ca.key").read_bytes())
    Authority.load(path.parent)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


NAMES = (
    *("a.csv", "quoted.csv", "a.tsv", "a.libsvm", "a.npz", "a.safetensors", "a.parquet"),
    *("a-images-idx3-ubyte", "job.yaml", "job.json", "manifest.json", "chunk", "sparse chunk"),
    *("part", "model.safetensors", "model.json", "nets-1-py3-none-any.whl", "tokens.json"),
    *("ann.token", "c.pem", "c.key", "trusted.pem", "ca.pem"),
)


class _Hangs(BaseException):
    """A file is read for too long; none of those who read it may take that for damage."""


def _hangs(_: int, frame: FrameType | None) -> None:
    where = frame and f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
    raise _Hangs(f"read for more than {HANG_S} s, when at {where}")


def _try(tmp_path: Path, name: str, count: int, seed: int) -> Counter[str]:
    """Read so many files of one kind; how many were read and how they were refused."""
    case = next(each for each in _cases(tmp_path) if each[0] == name)
    _, good, change, parse = case
    chance = Random(f"{seed} {name}")
    path = tmp_path / "fuzzed" / name
    path.parent.mkdir()
    heard: Counter[str] = Counter()
    parse(_written(path, good), good)
    before = signal.signal(signal.SIGALRM, _hangs)
    tracemalloc.start()
    try:
        for number in range(count):
            content = change(chance, good)
            heard[_read(_written(path, content), content, parse, f"{name} {number}")] += 1
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert {each.name for each in tmp_path.iterdir()} <= {"fuzzed", "keys", "m.csv"}
    return heard


def _read(path: Path, content: bytes, parse: Parse, which: str) -> str:
    tracemalloc.reset_peak()
    before, held = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
    signal.alarm(HANG_S)
    try:
        parse(path, content)
        said = "read"
    except PhalanxError as error:
        known = isinstance(error, InvalidArgument | DataLoss | FailedPrecondition)
        if not known or not str(error).strip():
            raise AssertionError(f"{which}: {content[:3000]!r}") from error
        said = error.reason
    except _Hangs as error:
        # Not from it: where a signal comes there may be no line, and pytest cannot tell of that.
        raise AssertionError(f"{which} is {error}: {content[:3000]!r}") from None
    except Exception as error:
        raise AssertionError(f"{which}: {content[:3000]!r}") from error
    grown = tracemalloc.get_traced_memory()[1] - before
    assert grown < FIXED_BYTES + MULTIPLE * len(content), (which, content)
    assert pa.total_allocated_bytes() - held < FIXED_BYTES + MULTIPLE * len(content), which
    return said


def test_every_kind_has_a_name(tmp_path: Path) -> None:
    assert [name for name, _, _, _ in _cases(tmp_path)] == [*NAMES]


def test_a_file_that_is_read_without_end_is_told_of(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGALRM, _hangs)
    tracemalloc.start()
    try:
        with pytest.raises(AssertionError, match=r"x is read for more .* at .*\(<lambda>\): b'y'"):
            _read(tmp_path, b"y", lambda *_: signal.raise_signal(signal.SIGALRM), "x")
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_wrong_in_a_file_is_said(tmp_path: Path, name: str) -> None:
    heard = _try(tmp_path, name, FEW, SEED)
    assert name == "model.json" or {*heard} - {"read"}, "nothing was refused"


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_wrong_in_many_files_is_said(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = _try(tmp_path, name, FILES, SEED)
    with capsys.disabled():
        print(f"\nseed {SEED}, {FILES} of {name}:", dict(heard))


def test_a_job_file_whose_aliases_unfold_is_refused() -> None:
    """A billion laughs: nine lines that stand for a billion values."""
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    text = "\n".join(lines)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="too large or too deep once aliases"):
            parse_document(text, "bomb.yaml")
        assert tracemalloc.get_traced_memory()[1] < FIXED_BYTES
    finally:
        tracemalloc.stop()
