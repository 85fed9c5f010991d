"""Gathers the rows of the next step while the leaf process waits for its parameters.

Which rows a leaf reads does not depend on the parameters, so they can be copied out of the mapped
chunks and standardised in the time in which the sums of this step travel. What is gathered is what
would have been gathered later, bit for bit; if the shards move away it is thrown out.
"""

from __future__ import annotations

from collections.abc import Callable

from phalanx.data.reader import ChunkReader
from phalanx.models import Batch
from phalanx.training.leaf import leaf_batch
from phalanx.v1 import training_pb2

LIMIT_BYTES = 32 * 1024 * 1024
"""Rows that are held at most; a leaf that needs more is not read ahead."""


class ReadAhead:
    """The rows of a job's training leaves, gathered before they are needed or then."""

    def __init__(self, reader_of: Callable[[int], ChunkReader], plan: training_pb2.JobPlan) -> None:
        """`reader_of` tells what reads the rows of a shard."""
        self._reader_of = reader_of
        self._plan = plan
        #: (shard, step) → its rows.
        self._ready: dict[tuple[int, int], Batch | None] = {}

    def take(self, shard: int, step: int) -> Batch | None:
        """The rows of one leaf, None where it has none; each batch is handed out once."""
        if (shard, step) in self._ready:
            return self._ready.pop((shard, step))
        return leaf_batch(self._reader_of(shard), self._plan, shard, step)

    def forget(self) -> None:
        """Throw out what was not used."""
        self._ready.clear()

    def prepare(self, shard: int, step: int) -> bool:
        """Gather the rows of one leaf; False: there is no room for it."""
        reader = self._reader_of(shard)
        row_bytes = max(1, reader.manifest.features) * reader.dtype.itemsize
        leaf_bytes = self._plan.rows_per_leaf * row_bytes
        if (len(self._ready) + 1) * leaf_bytes > LIMIT_BYTES:
            return False
        self._ready[shard, step] = leaf_batch(reader, self._plan, shard, step)
        return True
