"""What leaves of boosting remember from step to step: their rows in bins, and the scores so far.

A leaf is a function of the parameters and its rows. What is remembered spares it work and changes
no bit: it is used only where a leaf is given the bins and trees that it was computed by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models.base import Array, dense


@dataclass(frozen=True)
class Trees:
    """The tensors of a model that rows go through; see ``phalanx.models.boosting``.

    Attributes:
        base: (outputs,) scores before the first tree.
        edges: (features, bins - 1) ends of the bins.
        nodes: feature, threshold and value of each node, (trees, nodes) each.
    """

    base: Array
    edges: Array
    nodes: Sequence[Array]


class BinnedRows:
    """The rows of one shard.

    Attributes:
        bins: (rows, features) number of the bin that each value lies in.
        scores: (rows, outputs) by the first ``trees`` trees.
    """

    def __init__(self, values: Array, trees: Trees) -> None:
        self._edges = trees.edges
        self._base = trees.base
        self.bins = np.empty(values.shape, np.uint8)
        for feature, ends in enumerate(trees.edges):
            self.bins[:, feature] = np.searchsorted(ends, values[:, feature])
        self.forget_scores()

    def forget_scores(self) -> None:
        """Go back to before the first tree."""
        self.scores: Array = np.zeros((len(self.bins), len(self._base))) + self._base
        self.trees = 0

    def score(self, nodes: Sequence[Array], trees: int) -> None:
        """Bring the scores to those by the first so many trees."""
        if trees < self.trees:
            self.forget_scores()
        for tree in range(self.trees, trees):
            features, thresholds, values = (each[tree] for each in nodes)
            depth = (len(features) + 1).bit_length() - 2
            ends = self.nodes(features, thresholds, depth)
            self.scores[:, tree % len(self._base)] += values[ends]
        self.trees = trees

    def nodes(self, features: Array, thresholds: Array, levels: int) -> NDArray[np.int64]:
        """Return (rows,) the node that each row is in after so many levels of a tree."""
        node = np.zeros(len(self.bins), np.int64)
        last_left = np.zeros(len(features), np.int64)
        for each in np.flatnonzero(features >= 0):
            last_left[each] = np.searchsorted(self._edges[int(features[each])], thresholds[each])
        every = np.arange(len(node))
        for _ in range(levels):
            feature = features[node].astype(np.int64)
            right = self.bins[every, feature] > last_left[node]
            node = np.where(feature >= 0, 2 * node + 1 + right, node)
        return node


class RememberedRows:
    """Those of the shards whose leaves this process runs; of each shard all rows, in every step.

    A shard without a leaf in the round before has moved away, and is forgotten.
    """

    def __init__(self) -> None:
        self._by_shard: dict[int, BinnedRows] = {}
        #: Copies of what all scores were computed by; of the nodes the first `_count` trees count.
        self._known: Trees | None = None
        self._count = 0

    def __len__(self) -> int:
        return len(self._by_shard)

    def scored(self, shard: int, features: Any, trees: Trees, count: int) -> BinnedRows:
        """Return the rows of a shard with their scores by the first ``count`` trees."""
        known = self._take(trees, count)
        rows = self._by_shard.get(shard)
        if rows is None:
            rows = self._by_shard[shard] = BinnedRows(dense(features), known)
        rows.score(known.nodes, count)
        return rows

    def _take(self, trees: Trees, count: int) -> Trees:
        """Compare trees with those that are known, and take over those that are new."""
        known = self._known
        if known is None or not _are_equal((known.base, known.edges), (trees.base, trees.edges)):
            self._by_shard.clear()
            nodes = [np.empty_like(each) for each in trees.nodes]
            known = self._known = Trees(np.array(trees.base), np.array(trees.edges), nodes)
            self._count = 0
        both = slice(min(self._count, count))
        if not _are_equal(*([each[both] for each in given.nodes] for given in (known, trees))):
            for rows in self._by_shard.values():
                rows.forget_scores()
            self._count = 0
        if count > self._count:
            self._by_shard = {
                shard: rows for shard, rows in self._by_shard.items() if rows.trees >= self._count
            }
            for mine, new in zip(known.nodes, trees.nodes, strict=True):
                mine[self._count : count] = new[self._count : count]
            self._count = count
        return known


def _are_equal(some: Sequence[Array], others: Sequence[Array]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(some, others, strict=True))
