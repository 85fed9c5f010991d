"""Linked data sets of a cluster without processes: they go, and let the files go, when deleted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest

import phalanx
from phalanx.errors import DataLoss, FailedPrecondition, NotFound, Unavailable

OPTIONS: dict[str, Any] = {"link": True, "test": 0.2, "chunk_bytes": 9000}


def write(path: Path, seed: int = 1) -> Path:
    generator = np.random.default_rng(seed)
    columns = {f"x{index}": generator.normal(size=2000) for index in range(4)}
    pyarrow.parquet.write_table(pa.table({**columns, "y": np.arange(2000) % 2}), path)
    return path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[phalanx.LocalCluster]:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    with phalanx.LocalCluster(workers=0) as local:
        yield local


def open_files(*paths: Path) -> int:
    opened = [file.path for file in psutil.Process().open_files()]
    return sum(opened.count(str(path)) for path in paths)


def test_deleting_lets_chunks_and_files_go(cluster: phalanx.LocalCluster, tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet", seed=2)
    first, second = (
        cluster.data.add(name, source, **OPTIONS) for name, source in (("a", path), ("b", other))
    )
    chunks, others = cluster.data.manifest("a").digests(), cluster.data.manifest("b").digests()
    for digest in (*chunks, *others):
        assert cluster.backend.get_blob(digest)
    assert open_files(path, other) == 2
    cluster.data.delete("a")
    for digest in chunks:
        with pytest.raises(NotFound):
            cluster.backend.get_blob(digest)
    assert open_files(path) == 0
    assert all(cluster.backend.get_blob(digest) for digest in others)
    assert first.manifest_digest != second.manifest_digest


def test_versions_with_one_manifest_go_together(
    cluster: phalanx.LocalCluster, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet")
    for _ in range(3):
        cluster.data.add("a", path, **OPTIONS)
    digest = cluster.data.manifest("a").digests()[0]
    assert open_files(path) == 1
    cluster.data.delete("a@2")
    assert cluster.backend.get_blob(digest)
    cluster.data.delete("a")
    with pytest.raises(NotFound):
        cluster.backend.get_blob(digest)
    assert open_files(path) == 0


def test_what_is_not_registered_leaves_no_file_open(
    cluster: phalanx.LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / f"{number}.parquet", number) for number in range(3)]

    def refuse(maker: Any, *_: int) -> None:
        for file in maker._links.all_files():
            maker._files.open(file)
        raise FailedPrecondition("one of them was changed")

    monkeypatch.setattr("phalanx.data.linked_chunks.ChunkMaker.check", refuse)
    with pytest.raises(FailedPrecondition, match="was changed"):
        cluster.data.add("a", *paths, **OPTIONS)
    assert open_files(*paths) == 0


def test_a_disk_that_is_away_loses_nothing(
    cluster: phalanx.LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet")
    cluster.data.add("a", path, **OPTIONS)
    digest = cluster.data.manifest("a").digests()[0]

    def away(*_: object, **__: object) -> None:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("phalanx.data.linked_files.footer_sha256", away)
        with pytest.raises(Unavailable, match="stale file handle"):
            cluster.backend.get_blob(digest)
    path.rename(tmp_path / "b.parquet")
    with pytest.raises(DataLoss, match="no such file"):
        cluster.backend.get_blob(digest)
    (tmp_path / "b.parquet").rename(path)
    assert cluster.backend.get_blob(digest)
