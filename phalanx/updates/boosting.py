"""Boosted trees at the root: where bins end, and which splits gain most."""

from __future__ import annotations

import numpy as np

from phalanx.models.base import TensorViews
from phalanx.models.boosting import (
    BASE,
    CENTER,
    CLASS_ROWS,
    CURSOR,
    EDGES,
    FEATURE,
    GRID,
    GROW,
    LEAST_EXPONENT,
    LEVEL,
    NEVER,
    SHIFT,
    SKETCH,
    SPREAD,
    STAGE,
    SUMS,
    THRESHOLD,
    TREE,
    VALUE,
    Shape,
    places,
    slope_shift,
)
from phalanx.specs.workspaces import CELLS, EXPONENTS, MEASURES
from phalanx.updates.base import Array, Update
from phalanx.v1 import job_spec_pb2
from phalanx.v1.training_pb2 import Layout


class BoostingUpdate(Update):
    """One level of one tree for each step; one step, or two, before the first."""

    def __init__(self, layout: Layout, boosting: job_spec_pb2.Boosting) -> None:
        self._views = TensorViews(layout)
        sizes = {tensor.name: tensor.shape for tensor in layout.tensors}
        trees, (features, ends) = sizes[FEATURE][0], sizes[EDGES]
        self._shape = Shape(features, sizes[BASE][0], trees, boosting.depth, ends + 1)
        self._boosting = boosting
        #: 0 where numbers are predicted.
        self._classes = sizes[CLASS_ROWS][0] if CLASS_ROWS in sizes else 0

    def apply(self, parameters: Array, total: Array, count: int, version: int) -> Array:
        """See ``Update``."""
        following = np.array(parameters)
        then, sums = self._views(following), self._views(total)
        stage = int(then[CURSOR][STAGE])
        if stage == SKETCH:
            self._begin(then, sums, count)
        elif stage == CENTER:
            then[BASE][0] = np.ldexp(sums[SUMS][0], -int(then[CURSOR][SHIFT])) / count
            # Scores and targets lie in the same range, so their difference is one place longer.
            then[CURSOR][SHIFT] -= 1
            then[CURSOR][STAGE] = GROW
        elif then[CURSOR][TREE] < self._shape.trees:
            self._split(then, sums[SUMS])
        return following

    def _begin(self, then: dict[str, Array], sums: dict[str, Array], rows: int) -> None:
        """Place the bins, and find how many binary places sums have room for and, for classes,
        the scores before the first tree: log odds, or logarithms of the shares of several."""
        for feature, (mean, scale) in enumerate(sums[SPREAD].T):
            edges = _edges(sums[GRID][feature], self._shape.bins)
            there = edges < NEVER
            edges[there] = edges[there] / scale + mean
            then[EDGES][feature] = edges
        if not self._classes:
            exponents = np.flatnonzero(sums[SUMS][:EXPONENTS]) + LEAST_EXPONENT
            exponent = int(exponents[-1]) if len(exponents) else 0
            then[CURSOR][SHIFT], then[CURSOR][STAGE] = places(rows, exponent), CENTER
            return
        # A class without rows is as likely as half a row.
        shares = np.maximum(sums[CLASS_ROWS], 0.5)
        logarithms = np.log(shares)
        several = self._shape.outputs > 1
        then[BASE][...] = logarithms - np.log(rows) if several else logarithms[1] - logarithms[0]
        then[CURSOR][SHIFT], then[CURSOR][STAGE] = places(rows), GROW

    def _split(self, then: dict[str, Array], sums: Array) -> None:
        """Split the nodes of a level where that gains something, and go on to the next level.

        ``sums`` begin with (measures, nodes of the level, features, bins). Of equal gains the first
        feature and bin win, so that nothing depends on the order of anything.
        """
        shape, boosting, cursor = self._shape, self._boosting, then[CURSOR]
        tree, level, shift = (int(cursor[each]) for each in (TREE, LEVEL, SHIFT))
        size, first = 2**level, 2**level - 1
        found = sums[: MEASURES * size * shape.features * shape.bins]
        measures = found.reshape(MEASURES, size, shape.features, shape.bins)
        left = np.cumsum(measures, axis=3)
        whole = left[:, :, :1, -1:]
        right = whole - left
        gains = self._score(left, shift) + self._score(right, shift) - self._score(whole, shift)
        enough = np.minimum(left[2], right[2]) >= max(1, boosting.min_leaf_rows)
        gains = np.where(enough, gains, 0.0).reshape(size, -1)
        best = gains.argmax(axis=1)
        for node in range(size):
            place, rows = first + node, whole[2, node, 0, 0]
            if not rows:
                continue
            if level == 0:
                then[VALUE][tree, 0] = self._value(whole[:, node, 0, 0], shift)
            if gains[node, best[node]] <= 0:
                continue
            feature, bin_ = divmod(int(best[node]), shape.bins)
            then[FEATURE][tree, place] = feature
            then[THRESHOLD][tree, place] = then[EDGES][feature, bin_]
            for side, child in ((left, 2 * place + 1), (right, 2 * place + 2)):
                then[VALUE][tree, child] = self._value(side[:, node, feature, bin_], shift)
        last = level + 1 == shape.depth
        cursor[TREE], cursor[LEVEL] = (tree + 1, 0) if last else (tree, level + 1)

    def _value(self, sums: Array, shift: int) -> float:
        """What a row's score gains at the end of a tree: Newton's step −G / (H + λ), shortened by
        the learning rate; ``sums`` are the measures of the rows there."""
        slope = self._slope(sums, shift)
        if slope <= 0:
            return 0.0
        return float(-np.ldexp(sums[0], -shift) / slope * self._boosting.learning_rate)

    def _score(self, sums: Array, shift: int) -> Array:
        """G² / (H + λ): twice what the loss falls by where a node has a value of its own."""
        slope, first = self._slope(sums, shift), np.ldexp(sums[0], -shift)
        score: Array = np.divide(first * first, slope, out=np.zeros_like(first), where=slope > 0)
        return score

    def _slope(self, sums: Array, shift: int) -> Array:
        """H + λ: the second derivatives, as numbers again, and the penalty."""
        slope: Array = np.ldexp(sums[1], -slope_shift(shift, self._classes)) + self._boosting.l2
        return slope


def _edges(counts: Array, bins: int) -> Array:
    """Ends of the bins of a feature, as cells are counted: between all cells with values where
    these are few, else so that bins have about as many rows each; `NEVER` where no more are
    needed."""
    edges = np.full(bins - 1, NEVER)
    filled = np.flatnonzero(counts)
    if len(filled) > bins:
        shares = np.cumsum(counts[filled])
        wanted = np.arange(1, bins) * (shares[-1] / bins)
        last = np.unique(np.searchsorted(shares, wanted))
        last = last[last < len(filled) - 1]
    else:
        last = np.arange(len(filled) - 1)
    # Half way from the end of a cell to the beginning of the next one that has values.
    inside = (filled[last] + 1 + filled[last + 1]) / CELLS - 1
    edges[: len(last)] = inside / (1 - np.abs(inside))
    return edges
