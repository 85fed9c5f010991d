"""Rows gathered ahead are the rows gathered in time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from phalanx.data.chunks import encode_dense
from phalanx.data.manifest import ChunkInfo, DatasetManifest, Statistics
from phalanx.data.reader import ChunkReader
from phalanx.training.sampler import RowSelection, rows_for_leaf, shard_rows
from phalanx.v1 import training_pb2
from worker.leaf import read_ahead
from worker.leaf.read_ahead import ReadAhead

PLAN = training_pb2.JobPlan(shards=3, rows_per_leaf=4, steps_per_epoch=3)


class CountingReader(ChunkReader):
    """Counts how often rows are gathered."""

    gathered = 0

    def rows(self, selections):  # type: ignore[no-untyped-def]
        self.gathered += 1
        return super().rows(selections)


@pytest.fixture
def reader(tmp_path: Path) -> CountingReader:
    values = np.random.default_rng(3).standard_normal((33, 4)).astype(np.float32)
    infos = []
    for first, stop in ((0, 10), (10, 33)):
        data = encode_dense(values[first:stop], np.arange(first, stop))
        digest = hashlib.sha256(data).hexdigest()
        (tmp_path / digest).write_bytes(data)
        infos.append(ChunkInfo(digest, stop - first, len(data)))
    manifest = DatasetManifest(
        format="dense",
        dtype="float32",
        features=4,
        task="classification",
        target="y",
        splits={"train": tuple(infos)},
        statistics=Statistics(33),
        classes=("0", "1"),
    )
    return CountingReader(manifest, "train", lambda digest: tmp_path / digest)


def _selections(step: int, shard: int) -> list[RowSelection]:
    rows = shard_rows(shard, 3, (10, 23))
    return rows_for_leaf(rows, 5, step // 3, step % 3, 4)


def test_rows_are_the_same_and_gathered_once(reader: CountingReader) -> None:
    ahead = ReadAhead(reader, PLAN, seed=5)
    for step in range(7):
        for shard in range(3):
            assert ahead.prepare(shard, step)
        before = reader.gathered
        for shard in range(3):
            selections = _selections(step, shard)
            batch = ahead.rows(selections)
            expected = ChunkReader.rows(reader, selections)
            assert batch.features.tobytes() == expected.features.tobytes()
            assert batch.targets.tobytes() == expected.targets.tobytes()
        assert reader.gathered == before


def test_a_batch_is_handed_out_once_since_leaves_change_it(reader: CountingReader) -> None:
    ahead = ReadAhead(reader, PLAN, seed=5)
    ahead.prepare(0, 0)
    first, second = ahead.rows(_selections(0, 0)), ahead.rows(_selections(0, 0))
    assert first.features is not second.features
    assert reader.gathered == 2


def test_other_rows_are_read_as_ever(reader: CountingReader) -> None:
    ahead = ReadAhead(reader, PLAN, seed=5)
    ahead.prepare(0, 0)
    batch = ahead.rows(_selections(1, 2))
    assert batch.targets.tolist() == ChunkReader.rows(reader, _selections(1, 2)).targets.tolist()
    ahead.forget()
    before = reader.gathered
    ahead.rows(_selections(0, 0))
    assert reader.gathered == before + 1


def test_memory_is_bounded(reader: CountingReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LIMIT_BYTES", 100)
    ahead = ReadAhead(reader, PLAN, seed=5)
    assert ahead.prepare(0, 0)
    assert not ahead.prepare(1, 0)
    ahead.rows(_selections(0, 0))
    assert ahead.prepare(1, 0)


def test_an_exhausted_shard_has_nothing_to_gather(reader: CountingReader) -> None:
    ahead = ReadAhead(reader, PLAN, seed=5)
    assert ahead.prepare(0, 3 * 3 - 1)
    assert _selections(8, 0) == [] or reader.gathered == 1
