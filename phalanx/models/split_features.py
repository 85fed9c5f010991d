"""Linear and logistic regression over shards that are groups of columns.

z = Σ_p X_p w_p + b, and the gradient of the weights of group p is X_pᵀ r with the residuals
r = dL/dz: each shard needs its own columns and the sum of all scores. A step has two rounds. In
the first one shards contribute the scores that their columns give to the rows of the step. In the
second they find the sum of these in the parameters, and contribute the gradient of their own
weights. The bias is that of the first shard, which also tells the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phalanx.models.base import Array, Batch, DataSchema, LeafSums, make_layout
from phalanx.models.base import TensorViews as Views
from phalanx.models.linear import BIAS, WEIGHTS, LinearModel
from phalanx.models.losses import OutputLayer

SCORES, SCORED = "scores", "scored"
"""Workspace: (rows of a step,) z, and one element: whether they are there."""

_STATE = "optimizer."


def state_tensor(name: str) -> str:
    """Return the name of the workspace tensor of one of the optimizer's vectors."""
    return f"{_STATE}{name}"


class SplitLinearModel(LinearModel):
    """Reads shard by shard; evaluations and predictions are those of whole rows.

    ``states`` names the optimizer's vectors, which live in the workspace: their bits are a part of
    each version, as everything that a step needs of the one before.
    """

    def __init__(
        self, schema: DataSchema, output: OutputLayer, bias: bool, states: Sequence[str]
    ) -> None:
        super().__init__(schema, 1, output, bias)
        size = self.layout.element_count
        tensors = [(each.name, tuple(each.shape), each.decay) for each in self.layout.tensors]
        workspace = [
            (SCORES, (schema.batch_rows,)),
            (SCORED, (1,)),
            *((state_tensor(name), (size,)) for name in states),
        ]
        self.layout = make_layout(tensors, schema.dtype, workspace=workspace)
        self._views = Views(self.layout)
        #: By shard: the places of its columns among the features.
        self._places = [
            np.concatenate([np.arange(run.start, run.stop) for run in runs])
            for runs in schema.features_of_shards
        ]

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``; ``batch`` has the columns of its shard alone."""
        out[:] = 0
        now, sums = self._views(parameters), self._views(out)
        if not now[SCORED][0]:
            sums[SCORES][: batch.rows] = self._partial_scores(now, batch)
            return LeafSums(batch.rows, 0.0)
        scores = now[SCORES][: batch.rows, np.newaxis].copy()
        loss = self._output.residual(scores, batch.targets, batch.weights)
        residual: Array = np.ascontiguousarray(scores[:, 0])
        sums[WEIGHTS][self._places[batch.shard]] = batch.features.T @ residual
        if batch.shard > 0:
            return LeafSums(batch.rows, 0.0)
        if self._bias:
            np.sum(scores, axis=0, out=sums[BIAS])
        return LeafSums(batch.rows, loss)

    def _partial_scores(self, now: dict[str, Array], batch: Batch) -> Any:
        own = np.ascontiguousarray(now[WEIGHTS][self._places[batch.shard]])
        scores = batch.features @ own
        if self._bias and batch.shard == 0:
            scores += now[BIAS]
        return scores
