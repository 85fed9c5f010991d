"""Whole contributions, and arithmetic on them that does not depend on how vectors are cut.

Norms and distances are sums over the whole vector. They are formed block by block, in double
precision and in order, so that they have the same bits whether a vector is one array or many
frames: frames are whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.frames import BLOCK_ELEMENTS
from phalanx.reducers.slices import Slices, Steps, whole
from phalanx.reduction import all_finite

Array = NDArray[Any]


@dataclass(frozen=True)
class Contribution:
    """What one shard contributes to a step.

    Attributes:
        pieces: the sum over its examples, cut at multiples of a block; never written to.
        count: number of its examples, 1 or more.
    """

    pieces: Sequence[Array]
    count: int

    @cached_property
    def finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return all(all_finite(piece) for piece in self.pieces)

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(len(piece) for piece in self.pieces)

    def factor(self, clip_norm: float | None) -> float:
        """What shortens the mean to a norm, if it is longer; 1 without a limit."""
        return whole(self.factor_steps(clip_norm, Slices()))

    def factor_steps(self, clip_norm: float | None, slices: Slices) -> Steps[float]:
        """`factor` in slices."""
        if clip_norm is None:
            return 1.0
        norm = (yield from self._norm(slices)) / self.count
        return 1.0 if norm <= clip_norm else clip_norm / norm

    def _norm(self, slices: Slices) -> Steps[float]:
        """The Euclidean norm of the sum."""
        total = 0.0
        for piece, block in blocks_of(self.pieces):
            values = self.pieces[piece][block].astype(np.float64)
            total += float(np.dot(values, values))
            if slices.due(len(values)):
                yield
        return math.sqrt(total)


@dataclass(frozen=True)
class Reduced:
    """What an optimizer takes: the gradient is `pieces` divided by `divisor`, 1 or more."""

    pieces: list[Array]
    divisor: int


def blocks_of(pieces: Sequence[Array]) -> Iterator[tuple[int, slice]]:
    """The blocks of a vector in order: which piece, and which of its elements."""
    return cuts_of(pieces, BLOCK_ELEMENTS)


def cuts_of(pieces: Sequence[Array], elements: int) -> Iterator[tuple[int, slice]]:
    """Cuts of so many elements, for what is done with each element by itself."""
    for index, piece in enumerate(pieces):
        for first in range(0, len(piece), elements):
            yield index, slice(first, min(first + elements, len(piece)))
