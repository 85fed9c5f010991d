"""What predicts with a forest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import DataLoss
from phalanx.forests.tables import IMPORTANCES, TREE, VALUES, Tree
from phalanx.models.base import Array, views
from phalanx.texts import number_of
from phalanx.v1.training_pb2 import Layout

DENSE_BYTES = 64 * 2**20
"""Sparse rows are made dense for so many bytes at a time."""


class ForestModel:
    """The mean of its trees, which are added up in their order.

    Raises DataLoss for a layout that is no forest's.
    """

    block_rows = 4096
    """No row's prediction depends on the others, so that blocks may be large."""

    def __init__(self, layout: Layout, classes: int) -> None:
        self.layout = layout
        self._classes = classes
        self._trees: list[Tree] = []
        #: Whose trees these are.
        self._vector: Array | None = None
        width = VALUES + max(1, classes)
        trees = [each for each in layout.tensors if each.name.startswith(TREE)]
        if not trees or any(len(each.shape) != 2 or each.shape[1] != width for each in trees):
            what = number_of(classes, "class", "classes")
            raise DataLoss(f"the tensors of the model are not those of a forest of {what}")

    def predict(self, parameters: Array, features: Any) -> Array:
        """Return (rows, classes) probabilities, or (rows,) values for a regression."""
        trees = self._trees_of(parameters)
        parts = [mean_of(trees, rows) for rows in float32_blocks(features)]
        found = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return found if self._classes else found[:, 0]

    def feature_importances(self, parameters: Array) -> NDArray[np.float64]:
        """Return how much each feature counts, all together 1."""
        return views(self.layout, parameters)[IMPORTANCES]

    def _trees_of(self, parameters: Array) -> list[Tree]:
        if self._vector is not parameters:
            tables = views(self.layout, parameters)
            self._trees = [Tree.of(tables[name]) for name in tables if name.startswith(TREE)]
            self._vector = parameters
        return self._trees


def mean_of(trees: list[Tree], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean of the trees' predictions, added up in their order."""
    total = np.zeros((len(rows), trees[0].values.shape[1]))
    for tree in trees:
        total += tree.predict(rows)
    total /= len(trees)
    return total


def float32_blocks(features: Any) -> Iterator[NDArray[np.float32]]:
    """Yield rows as trees compare them: dense float32, some at a time where they are sparse."""
    if isinstance(features, np.ndarray):
        yield np.asarray(features, np.float32)
        return
    rows = max(1, DENSE_BYTES // (4 * max(1, features.shape[1])))
    for first in range(0, max(1, features.shape[0]), rows):
        yield features[first : first + rows].astype(np.float32).toarray()
