"""Which reader reads the rows of a shard: one for all of them, or one for each group of columns."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from phalanx.data.manifest import DatasetManifest
from phalanx.specs import parts
from phalanx.specs.columns import names_of_shards
from phalanx.v1.job_spec_pb2 import Data

Reader = TypeVar("Reader")


class ShardReaders(Generic[Reader]):
    """Readers of the training split, made when they are first needed.

    ``make`` returns a reader of the columns of these names; none: of all of them.
    """

    def __init__(
        self, data: Data, manifest: DatasetManifest, make: Callable[[Collection[str]], Reader]
    ) -> None:
        self._columns = names_of_shards(data, manifest) if parts.by_columns(data) else None
        self._all = tuple(data.features)
        self._make = make
        self._readers: dict[int, Reader] = {}

    def of(self, shard: int) -> Reader:
        """The reader that a shard's training leaves see their rows by."""
        key = shard if self._columns is not None else 0
        if key not in self._readers:
            columns = self._all if self._columns is None else self._columns[shard]
            self._readers[key] = self._make(columns)
        return self._readers[key]
