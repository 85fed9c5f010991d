"""Rows dealt out class by class: stratified shards and oversampling.

The rows of a split are put in an *even order*, in which every stretch has its share of each class:
row j of a class of n rows has the place (j + ½) / n, and rows follow each other by place, then by
class. The first T rows of that order are an apportionment of T seats by Webster's method
(Sainte-Laguë), so where a stretch begins in each class is computed, not searched for, and no row is
ever moved. A shard is a stretch, as without classes.

Oversampling makes all classes as long as the longest one: their rows come again, in the same order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from phalanx.specs.balance import drawn_rows


@dataclass(frozen=True)
class Part:
    """``count`` neighbouring rows of one chunk, or of one class of a chunk.

    ``first`` counts the rows of the chunk, and with a ``label`` only those of that class.
    """

    chunk_index: int
    first: int
    count: int
    label: int | None = None


class ClassLayout:
    """The even order of a split's rows.

    Compared by identity: caches are keyed on it.
    """

    def __init__(self, chunk_classes: Sequence[Sequence[int]], *, oversample: bool) -> None:
        """``chunk_classes``: for each chunk of the split its rows of each class."""
        counts = np.array(chunk_classes, np.int64)
        self._starts: NDArray[np.int64] = np.zeros((len(counts) + 1, counts.shape[1]), np.int64)
        np.cumsum(counts, axis=0, out=self._starts[1:])
        self._stored: list[int] = self._starts[-1].tolist()
        self._drawn = drawn_rows(self._stored, oversample=oversample)

    @property
    def rows(self) -> int:
        """How many rows an epoch has, those that come again included."""
        return sum(self._drawn)

    def parts(self, first: int, stop: int) -> tuple[Part, ...]:
        """Return the rows [first, stop) of the even order, class by class."""
        lows, highs = apportioned(self._drawn, first), apportioned(self._drawn, stop)
        return tuple(
            part
            for label, (low, high) in enumerate(zip(lows, highs, strict=True))
            for part in self._of_class(label, low, high)
        )

    def _of_class(self, label: int, low: int, high: int) -> list[Part]:
        starts, stored = self._starts[:, label], self._stored[label]
        parts = []
        while low < high:
            row = low % stored
            chunk = int(np.searchsorted(starts, row, side="right")) - 1
            count = min(high - low, int(starts[chunk + 1]) - row)
            parts.append(Part(chunk, row - int(starts[chunk]), count, label))
            low += count
        return parts


@lru_cache(maxsize=4096)
def apportioned(sizes: tuple[int, ...], total: int) -> tuple[int, ...]:
    """Return how many of the first ``total`` rows of the even order each class has.

    Exact, and never fewer for a larger total: a row that is in stays in.
    """
    rows = sum(sizes)
    # Rows whose place lies below total / rows: j + ½ < size · total / rows.
    taken = [max(0, -(-(2 * size * total - rows) // (2 * rows))) if rows else 0 for size in sizes]
    missing = total - sum(taken)
    classes = [index for index, size in enumerate(sizes) if size]
    if missing >= 0:
        upcoming = [(_place(taken[index], sizes[index]), index) for index in classes]
        heapq.heapify(upcoming)
        for _ in range(missing):
            _, index = upcoming[0]
            taken[index] += 1
            heapq.heapreplace(upcoming, (_place(taken[index], sizes[index]), index))
    else:
        last = [(-_place(taken[index] - 1, sizes[index]), -index) for index in classes]
        heapq.heapify(last)
        for _ in range(-missing):
            index = -last[0][1]
            taken[index] -= 1
            heapq.heapreplace(last, (-_place(taken[index] - 1, sizes[index]), -index))
    return tuple(taken)


def _place(row: int, size: int) -> Fraction:
    return Fraction(2 * row + 1, 2 * size)
