"""What predicts with a kernel machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.cascades.machine import decisions, kernel, vote_shares
from phalanx.errors import DataLoss
from phalanx.models.base import Array, views
from phalanx.v1.training_pb2 import Layout

VECTORS, COEFFICIENTS, INTERCEPTS = "support_vectors", "dual_coefficients", "intercepts"
PLACES, CLASSES = "support_classes", "classes"


class KernelMachine:
    """Decision values of two classes; of more the part of all pairs that is for each.

    Raises DataLoss for a layout that is no kernel machine's.
    """

    has_probabilities = False
    """Shares of votes rank classes, and say nothing of how sure a machine is."""

    def __init__(self, layout: Layout, classes: int, gamma: float) -> None:
        self.layout = layout
        self._classes = classes
        self._gamma = gamma
        names = [each.name for each in layout.tensors]
        if names != [VECTORS, COEFFICIENTS, INTERCEPTS, PLACES, CLASSES] or classes < 2:
            raise DataLoss("the tensors of the model are not those of a kernel machine")

    def predict(self, parameters: Array, features: Any) -> Array:
        """Return (rows,) decision values of two classes, else (rows, classes) shares of votes."""
        values = self.decision_values(parameters, features)
        if self._classes == 2:
            return values[:, 0]
        present = views(self.layout, parameters)[CLASSES].astype(np.int64)
        shares = np.zeros((len(values), self._classes))
        # Classes that no row of the training had get no votes.
        shares[:, present] = _votes(values, len(present))
        return shares

    def decision_values(self, parameters: Array, features: Any) -> Array:
        """Return (rows, pairs of classes) decision values, as scikit-learn's `ovo` has them."""
        tensors = views(self.layout, parameters)
        values = kernel(features, tensors[VECTORS], self._gamma)
        return decisions(
            values,
            tensors[PLACES].astype(np.int64),
            tensors[COEFFICIENTS],
            tensors[INTERCEPTS],
            len(tensors[CLASSES]),
        )


def _votes(values: Array, classes: int) -> Array:
    if classes == 2:  # the value is for the second class, and elsewhere for the first of its pair
        values = -values
    return vote_shares(values, classes)
