"""Rows gathered ahead are the rows gathered in time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from phalanx.data.chunks import encode_dense
from phalanx.data.manifest import ChunkInfo, DatasetManifest, Statistics
from phalanx.data.reader import ChunkReader
from phalanx.training.leaf import leaf_batch
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


def test_rows_are_the_same_and_gathered_once(reader: CountingReader) -> None:
    ahead = ReadAhead(lambda _: reader, PLAN)
    for step in range(7):
        for shard in range(3):
            assert ahead.prepare(shard, step)
        before = reader.gathered
        batches = [ahead.take(shard, step) for shard in range(3)]
        assert reader.gathered == before
        for shard, batch in enumerate(batches):
            expected = leaf_batch(reader, PLAN, shard, step)
            assert batch is not None
            assert expected is not None
            assert batch.features.tobytes() == expected.features.tobytes()
            assert batch.targets.tobytes() == expected.targets.tobytes()


def test_a_batch_is_handed_out_once_since_leaves_change_it(reader: CountingReader) -> None:
    ahead = ReadAhead(lambda _: reader, PLAN)
    ahead.prepare(0, 0)
    first, second = ahead.take(0, 0), ahead.take(0, 0)
    assert first is not None
    assert second is not None
    assert first.features is not second.features
    assert reader.gathered == 2


def test_other_rows_are_read_as_ever(reader: CountingReader) -> None:
    ahead = ReadAhead(lambda _: reader, PLAN)
    ahead.prepare(0, 0)
    batch, expected = ahead.take(2, 1), leaf_batch(reader, PLAN, 2, 1)
    assert batch is not None
    assert expected is not None
    assert batch.targets.tolist() == expected.targets.tolist()
    ahead.forget()
    before = reader.gathered
    ahead.take(0, 0)
    assert reader.gathered == before + 1


def test_memory_is_bounded(reader: CountingReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LIMIT_BYTES", 100)
    ahead = ReadAhead(lambda _: reader, PLAN)
    assert ahead.prepare(0, 0)
    assert not ahead.prepare(1, 0)
    ahead.take(0, 0)
    assert ahead.prepare(1, 0)


def test_an_exhausted_shard_has_nothing_to_gather(reader: CountingReader) -> None:
    plan = training_pb2.JobPlan(shards=3, rows_per_leaf=4, steps_per_epoch=4)
    ahead = ReadAhead(lambda _: reader, plan)
    assert ahead.prepare(0, 3)
    assert ahead.take(0, 3) is None
    assert reader.gathered == 0
