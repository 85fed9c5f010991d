"""Shards that are groups of columns: first the scores of a step's rows, then its update."""

from __future__ import annotations

import numpy as np

from phalanx.layouts import model_layout
from phalanx.models.base import TensorViews, decay_mask
from phalanx.models.split_features import SCORED, SCORES, state_tensor
from phalanx.optimizers import build_optimizer, gradient_limit
from phalanx.reducers import Contribution
from phalanx.training.two_rounds import examples_of, step_of
from phalanx.updates.base import Array, Update
from phalanx.v1.job_spec_pb2 import Train
from phalanx.v1.training_pb2 import JobPlan


class ColumnsUpdate(Update):
    """Keeps the scores, or has the job's optimizer move the weights, in turns."""

    def __init__(self, plan: JobPlan, train: Train) -> None:
        layout = model_layout(plan.layout)
        self._plan = plan
        self._own = slice(0, layout.element_count)
        self._decay = decay_mask(layout)
        self._optimizer = build_optimizer(train, plan.total_steps)
        self._clip_norm = gradient_limit(train)
        self._views = TensorViews(plan.layout)

    def apply(self, parameters: Array, total: Array, count: int, version: int) -> Array:
        """See ``Update``."""
        following = np.array(parameters)
        then = self._views(following)
        if not then[SCORED][0]:
            then[SCORES][...] = self._views(total)[SCORES]
            then[SCORED][...] = 1
            return following
        rows = examples_of(self._plan, count)
        gradient = total[self._own]
        factor = Contribution([gradient], rows).factor(self._clip_norm)
        if factor != 1.0:
            gradient = gradient * gradient.dtype.type(factor)
        self._optimizer.apply(
            parameters[self._own],
            gradient,
            rows,
            self._decay,
            {name: then[state_tensor(name)] for name in self._optimizer.state_names},
            step_of(self._plan, version),
            following[self._own],
        )
        then[SCORES][...] = 0
        then[SCORED][...] = 0
        return following
