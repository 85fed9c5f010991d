"""Which shards each step left out, so that a run can be computed again.

Whether a contribution counts may depend on when it came: a job with backup shards does not wait for
the slowest. With this log the in-process trainer leaves out the same ones, and computes the same
parameters, bit for bit, on a machine with the workers' numeric fingerprint. The log is part of the
checkpointed state, so it tells the history that survived, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import DataLoss, FailedPrecondition
from phalanx.texts import number_of

COUNTS = "left_out_counts"
SHARDS = "left_out_shards"
"""Names of the vectors in a checkpoint: how many shards each step left out, and which, one step
after another. They are written as numbers of the parameters' type, which holds them exactly up to
2 ** 24."""


class LeftOutLog:
    """The shards that each step left out, from the first step on."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, ...]] = []

    @classmethod
    def restored(cls, vectors: Mapping[str, NDArray[Any]], steps: int) -> Self:
        """Read the log out of a checkpoint's vectors. Raises `DataLoss` where it does not fit."""
        log = cls()
        counts, shards = vectors.get(COUNTS), vectors.get(SHARDS)
        if counts is None or shards is None:
            raise DataLoss("the checkpoint does not say which shards its steps left out")
        if len(counts) != steps or int(counts.sum()) != len(shards):
            raise DataLoss(
                f"the log of what was left out has {number_of(len(counts), 'step')} and "
                f"{number_of(len(shards), 'shard')}, and there were {steps} and {int(counts.sum())}"
            )
        ends = np.cumsum(counts.astype(np.int64)).tolist()
        every = shards.astype(np.int64).tolist()
        log._steps = [
            tuple(every[first:stop]) for first, stop in zip([0, *ends], ends, strict=False)
        ]
        return log

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, shards: Collection[int]) -> None:
        """Note what the next step left out."""
        self._steps.append(tuple(sorted(shards)))

    def of(self, step: int) -> tuple[int, ...]:
        """Shards that a step, from 0, left out. Raises FailedPrecondition beyond the last one."""
        if step >= len(self):
            raise FailedPrecondition(
                f"the log of what was left out ends after {number_of(len(self), 'step')}, and the "
                "job does not",
                reason="LEFT_OUT_LOG_ENDS",
            )
        return self._steps[step]

    @property
    def contributions(self) -> frozenset[tuple[int, int]]:
        """(shard, step) of all that was left out."""
        return frozenset((shard, step) for step, each in enumerate(self._steps) for shard in each)

    def vectors(self, dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
        """What a checkpoint keeps."""
        return {
            COUNTS: np.array([len(each) for each in self._steps], dtype),
            SHARDS: np.array(list(chain.from_iterable(self._steps)), dtype),
        }
