"""A decision tree as a table of float64: a row for each node, the root first.

Whole numbers below 2^53 are exact in it, so that a forest is one vector as any other model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

LEFT, RIGHT, FEATURE, THRESHOLD, IMPURITY, SAMPLES, WEIGHT, VALUES = range(8)
"""Columns; from `VALUES` on there is one for each class, or the one number of a regression."""

TREE = "tree."
IMPORTANCES = "feature_importances"


def tensor_name(tree: int) -> str:
    """Return the name of a tree's table."""
    return f"{TREE}{tree:05}"


def table_of(fitted: Any, classes: int, present: NDArray[np.int64]) -> Table:
    """Return the table of a tree that scikit-learn has grown.

    `present` are the classes that its rows had, in its own order; the others have no part in any
    node. With `classes` 0 it is a tree of a regression.
    """
    tree = fitted.tree_
    table = np.zeros((tree.node_count, VALUES + max(1, classes)))
    table[:, LEFT], table[:, RIGHT] = tree.children_left, tree.children_right
    table[:, FEATURE], table[:, THRESHOLD] = tree.feature, tree.threshold
    table[:, IMPURITY] = tree.impurity
    table[:, SAMPLES], table[:, WEIGHT] = tree.n_node_samples, tree.weighted_n_node_samples
    if classes:
        table[:, VALUES + present] = tree.value[:, 0, :]
    else:
        table[:, VALUES] = tree.value[:, 0, 0]
    return table


@dataclass(frozen=True)
class Tree:
    """A tree in the form in which rows go through it."""

    left: NDArray[np.intp]
    right: NDArray[np.intp]
    feature: NDArray[np.intp]
    threshold: NDArray[np.float64]
    values: NDArray[np.float64]

    @staticmethod
    def of(table: Table) -> Tree:
        """Return the tree of a table."""
        return Tree(
            left=table[:, LEFT].astype(np.intp),
            right=table[:, RIGHT].astype(np.intp),
            feature=table[:, FEATURE].astype(np.intp),
            threshold=np.ascontiguousarray(table[:, THRESHOLD]),
            values=np.ascontiguousarray(table[:, VALUES:]),
        )

    def predict(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return (rows, classes) parts of the classes in each row's leaf, or (rows, 1) numbers."""
        nodes = np.zeros(len(rows), np.intp)
        under_way = np.arange(len(rows)) if self.left[0] >= 0 else np.empty(0, np.intp)
        while len(under_way):
            at = nodes[under_way]
            goes_left = rows[under_way, self.feature[at]] <= self.threshold[at]
            at = np.where(goes_left, self.left[at], self.right[at])
            nodes[under_way] = at
            under_way = under_way[self.left[at] >= 0]
        return self.values[nodes]


def importances(table: Table, features: int) -> NDArray[np.float64] | None:
    """Return how much of the impurity each feature takes away, all together 1.

    None for a tree of one node; zeros where nothing is taken away. As scikit-learn counts, in the
    order of the nodes.
    """
    if len(table) == 1:
        return None
    inner = table[table[:, LEFT] >= 0]
    left, right = (table[inner[:, side].astype(np.intp)] for side in (LEFT, RIGHT))
    gains = (
        inner[:, WEIGHT] * inner[:, IMPURITY]
        - left[:, WEIGHT] * left[:, IMPURITY]
        - right[:, WEIGHT] * right[:, IMPURITY]
    )
    found = np.zeros(features)
    np.add.at(found, inner[:, FEATURE].astype(np.intp), gains)
    found /= table[0, WEIGHT]
    total = found.sum()
    return found / total if total > 0.0 else found


def mean_importances(tables: list[Table], features: int) -> NDArray[np.float64]:
    """Return the importances of a forest: the mean of its trees', all together 1."""
    each = [
        found for found in (importances(table, features) for table in tables) if found is not None
    ]
    if not each:
        return np.zeros(features)
    mean: NDArray[np.float64] = np.mean(each, axis=0, dtype=np.float64)
    total = mean.sum()
    return mean / total if total else mean
