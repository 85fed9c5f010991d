"""What the linear SVM's own optimizers do with the sums of a step: CoCoA+ and Pegasos."""

from __future__ import annotations

import math

import numpy as np

from phalanx.models.base import TensorViews, decay_mask
from phalanx.models.dual_svm import DUALS, ROUNDS
from phalanx.optimizers import Optimizer
from phalanx.updates.base import Array, Update
from phalanx.v1.training_pb2 import Layout


class AddedChanges(Update):
    """CoCoA+: the shards' changes of weights and dual variables are added, not averaged."""

    def __init__(self, layout: Layout) -> None:
        self._views = TensorViews(layout)

    def apply(self, parameters: Array, total: Array, count: int, version: int) -> Array:
        """See ``Update``."""
        following = np.add(parameters, total, out=total)
        tensors = self._views(following)
        # A shard has kept them within the bounds, and their last bit may be lost in its difference.
        np.clip(tensors[DUALS], 0, 1, out=tensors[DUALS])
        tensors[ROUNDS] += 1
        return following


class ProjectedStep(Update):
    """Pegasos with its projection: a step, and then the weights no longer than 1 / √λ.

    The optimum is within that ball. A bias is not part of it.
    """

    def __init__(self, optimizer: Optimizer, layout: Layout, l2: float) -> None:
        self._optimizer = optimizer
        self._decay = decay_mask(layout)
        self._radius = 1 / math.sqrt(l2)

    def apply(self, parameters: Array, total: Array, count: int, version: int) -> Array:
        """See ``Update``."""
        following = np.empty_like(parameters)
        self._optimizer.apply(parameters, total, count, self._decay, {}, version, following)
        norm = math.sqrt(np.square(following[self._decay], dtype=np.float64).sum())
        if norm > self._radius:
            following[self._decay] *= following.dtype.type(self._radius / norm)
        return following
