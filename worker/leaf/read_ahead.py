"""Gathers the rows of the next step while the leaf process waits for its parameters.

Which rows a leaf reads does not depend on the parameters, so they can be copied out of the mapped
chunks in the time in which the sums of this step travel. What is gathered is what would have been
gathered later, bit for bit; if the shards move away it is thrown out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phalanx.data.manifest import DatasetManifest
from phalanx.data.reader import ChunkReader
from phalanx.models import Batch
from phalanx.training.sampler import RowSelection, rows_for_leaf, shard_rows
from phalanx.v1 import training_pb2

LIMIT_BYTES = 32 * 1024 * 1024
"""Rows that are held at most; a leaf that needs more is not read ahead."""

_Key = tuple[tuple[int, bytes], ...]


class ReadAhead:
    """A reader that may have the rows already; see `ChunkReader`."""

    def __init__(self, reader: ChunkReader, plan: training_pb2.JobPlan, seed: int) -> None:
        self._reader = reader
        self._plan = plan
        self._seed = seed
        self._row_bytes = max(1, reader.manifest.features) * reader.dtype.itemsize
        self._held_bytes = 0
        self._ready: dict[_Key, Batch] = {}
        self.manifest: DatasetManifest = reader.manifest
        self.dtype: np.dtype[np.generic] = reader.dtype

    @property
    def chunk_rows(self) -> tuple[int, ...]:
        """Rows of each chunk of the split."""
        return self._reader.chunk_rows

    def rows(self, selections: Sequence[RowSelection]) -> Batch:
        """The rows, gathered before or now; each batch is handed out once."""
        if self._ready:
            batch = self._ready.pop(_key(selections), None)
            if batch is not None:
                self._held_bytes -= batch.rows * self._row_bytes
                return batch
        return self._reader.rows(selections)

    def forget(self) -> None:
        """Throw out what was not used."""
        self._ready.clear()
        self._held_bytes = 0

    def prepare(self, shard: int, step: int) -> bool:
        """Gather the rows of one leaf; False: there is no room for it."""
        plan = self._plan
        epoch, position = divmod(step, max(1, plan.steps_per_epoch))
        rows = shard_rows(shard, plan.shards, self.chunk_rows)
        selections = rows_for_leaf(rows, self._seed, epoch, position, plan.rows_per_leaf)
        size_bytes = sum(len(each.rows) for each in selections) * self._row_bytes
        if self._held_bytes + size_bytes > LIMIT_BYTES:
            return False
        if selections:
            self._ready[_key(selections)] = self._reader.rows(selections)
            self._held_bytes += size_bytes
        return True


def _key(selections: Sequence[RowSelection]) -> _Key:
    return tuple((each.chunk_index, each.rows.tobytes()) for each in selections)
