"""The rules: mean, clipped or not, median, trimmed mean, Krum and multi-Krum.

A contribution that is not finite never enters any arithmetic: it is left out and counts as one of
those that a rule is there to stand. Where too few are left for a rule to hold, it gives nothing and
the step changes nothing; shards that have run out of rows can make that happen at the end of an
epoch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.frames import BLOCK_ELEMENTS
from phalanx.reducers.contributions import Contribution, Reduced, blocks_of, cuts_of
from phalanx.reducers.slices import SLICE_ELEMENTS, Slices, Steps, whole
from phalanx.reduction import reduce_leaves

COLUMNS_LEAST = 1024
"""Elements of each contribution that are handled at once, however many contributions there are."""

Array = NDArray[Any]


class Reducer(ABC):
    """Makes one gradient of the contributions of all shards that are present."""

    def __init__(self, clip_norm: float | None) -> None:
        self._clip_norm = clip_norm

    def reduce(self, contributions: Mapping[int, Contribution]) -> Reduced | None:
        """Return the gradient, or None where there are too few contributions.

        Args:
            contributions: shard → what it contributes. All are cut alike.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # the root looks at the result
            return whole(self.steps(contributions))

    def steps(self, contributions: Mapping[int, Contribution]) -> Steps[Reduced | None]:
        """`reduce` in slices; each may overflow, which is no warning."""
        slices, good = Slices(), {}
        for shard in sorted(contributions):
            if contributions[shard].finite:
                good[shard] = contributions[shard]
            if slices.due(contributions[shard].size):
                yield
        if not good:
            return None
        return (yield from self._reduce(good, len(contributions) - len(good), slices))

    @abstractmethod
    def _reduce(
        self, good: dict[int, Contribution], refused: int, slices: Slices
    ) -> Steps[Reduced | None]:
        """Reduce finite contributions, in the order of their shards; `refused` were not finite."""

    def _factors(self, contributions: Sequence[Contribution], slices: Slices) -> Steps[list[float]]:
        """What shortens the mean of each contribution to the longest norm that is allowed."""
        factors = []
        for each in contributions:
            factor = yield from each.factor_steps(self._clip_norm, slices)
            factors.append(factor)
        return factors


class Mean(Reducer):
    """The mean over all examples, each shard's contribution no longer than the norm, if any.

    Without one that is too long it has the bits of the tree's mean.
    """

    def __init__(self, shards: int, clip_norm: float | None = None) -> None:
        super().__init__(clip_norm)
        self._shards = shards

    def _reduce(
        self, good: dict[int, Contribution], refused: int, slices: Slices
    ) -> Steps[Reduced | None]:
        ordered = list(good.values())
        factors = dict(zip(good, (yield from self._factors(ordered, slices)), strict=True))
        out = [np.empty_like(piece) for piece in ordered[0].pieces]
        for index, block in cuts_of(out, _columns(len(good))):
            leaves: dict[int, Array | None] = {
                shard: _scaled(each.pieces[index][block], factors[shard])
                for shard, each in good.items()
            }
            total = reduce_leaves(leaves, self._shards)
            assert total is not None
            out[index][block] = total
            if slices.due(len(good) * len(total)):
                yield
        return Reduced(out, sum(each.count for each in good.values()))


class _OfMeans(Reducer):
    """A rule that compares the shards' means element by element, each shard counting once."""

    def _reduce(
        self, good: dict[int, Contribution], refused: int, slices: Slices
    ) -> Steps[Reduced | None]:
        if not self._holds(len(good), refused):
            return None
        ordered = list(good.values())
        means = _Means(ordered, (yield from self._factors(ordered, slices)), slices)
        out = [np.empty_like(piece) for piece in ordered[0].pieces]
        at_once = max(1, SLICE_ELEMENTS // len(good))
        for index, block in cuts_of(out, _columns(len(good))):
            rows, values = (yield from means.block(index, block)), out[index][block]
            for first in range(0, len(values), at_once):
                part = slice(first, first + at_once)
                values[part] = self._combine(rows[:, part], refused)
                if slices.due(rows[:, part].size):
                    yield
        return Reduced(out, 1)

    @abstractmethod
    def _holds(self, count: int, refused: int) -> bool:
        """Whether the rule holds for so many means."""

    @abstractmethod
    def _combine(self, means: Array, refused: int) -> Array:
        """Reduce (shards, n) means to (n,); may overwrite them."""


class Median(_OfMeans):
    """The median of each element: Yin et al., "Byzantine-robust distributed learning" (2018)."""

    def _holds(self, count: int, refused: int) -> bool:
        return count >= 1

    def _combine(self, means: Array, refused: int) -> Array:
        means.sort(axis=0)
        middle = len(means) // 2
        if len(means) % 2:
            odd: Array = means[middle]
            return odd
        even: Array = (means[middle - 1] + means[middle]) * means.dtype.type(0.5)
        return even


class TrimmedMean(_OfMeans):
    """The mean of each element without the `trim` largest and smallest; same paper."""

    def __init__(self, trim: int, clip_norm: float | None = None) -> None:
        super().__init__(clip_norm)
        self._trim = trim

    def _holds(self, count: int, refused: int) -> bool:
        return count > 2 * max(0, self._trim - refused)

    def _combine(self, means: Array, refused: int) -> Array:
        trim = max(0, self._trim - refused)
        means.sort(axis=0)
        return _mean(means[trim : len(means) - trim])


class Krum(Reducer):
    """The mean of the `keep` contributions that lie closest to their neighbours.

    Blanchard et al., "Machine learning with adversaries" (2017): the score of a contribution is the
    sum of its squared distances to the n - f - 2 nearest others, and n must be at least 2 f + 3.
    """

    def __init__(self, faulty: int, keep: int = 1, clip_norm: float | None = None) -> None:
        super().__init__(clip_norm)
        self._faulty = faulty
        self._keep = keep

    def _reduce(
        self, good: dict[int, Contribution], refused: int, slices: Slices
    ) -> Steps[Reduced | None]:
        faulty, count = max(0, self._faulty - refused), len(good)
        if count < 2 * faulty + 3:
            return None
        ordered = list(good.values())
        means = _Means(ordered, (yield from self._factors(ordered, slices)), slices)
        distances = yield from means.squared_distances()
        scores = yield from _scores(distances, count - faulty - 2, slices)
        # A stable order: of equal scores the lower shard wins.
        best = sorted(range(count), key=lambda each: scores[each])
        chosen = sorted(best[: min(self._keep, count - faulty)])
        out = [np.empty_like(piece) for piece in ordered[0].pieces]
        for index, block in cuts_of(out, _columns(len(chosen))):
            out[index][block] = _mean((yield from means.block(index, block, chosen)))
            if slices.due(len(chosen) * (block.stop - block.start)):
                yield
        return Reduced(out, 1)


class _Means:
    """The shards' means, made block by block: all of them at once would be another copy of all."""

    def __init__(
        self, contributions: Sequence[Contribution], factors: Sequence[float], slices: Slices
    ) -> None:
        self._contributions = contributions
        self._factors = factors
        self._slices = slices

    def block(self, index: int, block: slice, chosen: Sequence[int] | None = None) -> Steps[Array]:
        """One block of the means of some shards (all), one row each."""
        rows = range(len(self._contributions)) if chosen is None else chosen
        like = self._contributions[0].pieces[index]
        out = np.empty((len(rows), block.stop - block.start), like.dtype)
        for row, each in zip(out, rows, strict=True):
            contribution, factor = self._contributions[each], self._factors[each]
            np.divide(contribution.pieces[index][block], like.dtype.type(contribution.count), row)
            if factor != 1.0:
                np.multiply(row, like.dtype.type(factor), row)
            if self._slices.due(len(row)):
                yield
        return out

    def squared_distances(self) -> Steps[NDArray[np.float64]]:
        """The squared distance of each pair of means."""
        count = len(self._contributions)
        distances = np.zeros((count, count))
        for index, block in blocks_of(self._contributions[0].pieces):
            means = (yield from self.block(index, block)).astype(np.float64)
            for one, other in combinations(range(count), 2):
                difference = means[one] - means[other]
                distances[one, other] += np.dot(difference, difference)
                if self._slices.due(len(difference)):
                    yield
        return distances + distances.T


def _columns(rows: int) -> int:
    """How many elements of so many rows are handled at once, where each is handled by itself."""
    return min(BLOCK_ELEMENTS, max(COLUMNS_LEAST, SLICE_ELEMENTS // rows))


def _scores(distances: NDArray[np.float64], neighbours: int, slices: Slices) -> Steps[list[float]]:
    scores = []
    for own, row in enumerate(distances):
        nearest = np.sort(np.delete(row, own))[:neighbours]
        # Exactly rounded, so in no order at all.
        scores.append(math.fsum(nearest.tolist()) if np.isfinite(nearest).all() else math.inf)
        if slices.due(16 * len(row)):
            yield
    return scores


def _mean(rows: Array) -> Array:
    """The mean of rows, summed one after the other."""
    total: Array = rows[0].copy()
    for row in rows[1:]:
        np.add(total, row, out=total)
    np.divide(total, total.dtype.type(len(rows)), out=total)
    return total


def _scaled(piece: Array, factor: float) -> Array:
    if factor == 1.0:
        return piece
    scaled: Array = piece * piece.dtype.type(factor)
    return scaled
