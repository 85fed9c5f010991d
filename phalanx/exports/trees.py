"""Trees of forests as those that scikit-learn has grown."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.forests.tables import (
    FEATURE,
    IMPURITY,
    LEFT,
    RIGHT,
    SAMPLES,
    THRESHOLD,
    VALUES,
    WEIGHT,
    Table,
)

_FIELDS = {
    "left_child": LEFT,
    "right_child": RIGHT,
    "feature": FEATURE,
    "threshold": THRESHOLD,
    "impurity": IMPURITY,
    "n_node_samples": SAMPLES,
    "weighted_n_node_samples": WEIGHT,
}
"""Fields of scikit-learn's nodes → columns; others are zero, as where no value is missing."""


def tree_of(table: Table, features: int) -> Any:
    """Return scikit-learn's `Tree` of a table, by the state that it has in a pickle."""
    from sklearn.tree._tree import NODE_DTYPE, Tree

    nodes = np.zeros(len(table), NODE_DTYPE)
    for field, column in _FIELDS.items():
        nodes[field] = table[:, column]
    values = np.ascontiguousarray(table[:, np.newaxis, VALUES:])
    tree = Tree(features, np.array([values.shape[2]], np.intp), 1)
    state = {
        "max_depth": _depth(nodes["left_child"], nodes["right_child"]),
        "node_count": len(table),
        "nodes": nodes,
        "values": values,
    }
    tree.__setstate__(state)
    return tree


def _depth(left: NDArray[np.int64], right: NDArray[np.int64]) -> int:
    """Return the splits from the root to the deepest node."""
    depth, level = -1, np.zeros(1, np.int64)
    while len(level):
        depth += 1
        inner = level[left[level] >= 0]
        level = np.concatenate([left[inner], right[inner]])
    return depth
