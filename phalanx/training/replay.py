"""The order in which contributions were applied, so that a run can be computed again.

For each commit in order the log has its shard and its staleness: commit n (from 0) made version
n + 1 and had read version n - staleness. With it the in-process trainer computes the same
parameters, bit for bit, on a machine with the workers' numeric fingerprint. The log is part of the
checkpointed state, so it tells the history that survived, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import DataLoss

SHARDS = "replay_shards"
STALENESS = "replay_staleness"
"""Names of the vectors in a checkpoint. They are written as numbers of the parameters' type, which
holds them exactly up to 2 ** 24."""


class ReplayLog:
    """Shard and staleness of each commit, in order."""

    def __init__(self) -> None:
        self._shards: list[int] = []
        self._staleness: list[int] = []

    @classmethod
    def restored(cls, vectors: Mapping[str, NDArray[Any]], commits: int) -> Self:
        """Read the log out of a checkpoint's vectors. Raises `DataLoss` where it does not fit."""
        log = cls()
        if commits:
            shards, staleness = vectors.get(SHARDS), vectors.get(STALENESS)
            if shards is None or staleness is None:
                raise DataLoss("the checkpoint has no replay log; set replay_log")
            log._shards = [int(each) for each in shards]
            log._staleness = [int(each) for each in staleness]
        if len(log) != commits or len(log._staleness) != commits:
            raise DataLoss(f"the replay log has {len(log)} commits, and {commits} were made")
        return log

    def __len__(self) -> int:
        return len(self._shards)

    def add(self, shard: int, staleness: int) -> None:
        """Note the next commit."""
        self._shards.append(shard)
        self._staleness.append(staleness)

    def commit(self, number: int) -> tuple[int, int]:
        """Shard and version read of commit `number`, from 0."""
        return self._shards[number], number - self._staleness[number]

    def last_reads(self) -> dict[int, int]:
        """Version → the last commit that had read it, for those that were read at all."""
        return {self.commit(number)[1]: number for number in range(len(self))}

    def vectors(self, dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
        """What a checkpoint keeps."""
        return {
            SHARDS: np.array(self._shards, dtype),
            STALENESS: np.array(self._staleness, dtype),
        }
