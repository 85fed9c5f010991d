"""Linear, logistic and softmax regression and the linear SVM on dense and CSR rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models.base import Array, Batch, DataSchema, LeafSums, TensorViews, make_layout
from phalanx.models.losses import OutputLayer

WEIGHTS = "weights"
BIAS = "bias"


class LinearModel:
    """scores = X W + b with one output layer; starts at zero, where the loss is convex anyway.

    ``weights`` is (features,) for one output and (features, outputs) for more.
    """

    def __init__(self, schema: DataSchema, outputs: int, output: OutputLayer, bias: bool) -> None:
        weights = (schema.features,) if outputs == 1 else (schema.features, outputs)
        tensors: list[tuple[str, tuple[int, ...], bool]] = [(WEIGHTS, weights, True)]
        if bias:
            tensors.append((BIAS, (outputs,), False))
        self.layout = make_layout(tensors, schema.dtype)
        self.evaluation_sums = output.sums
        self._output = output
        self._outputs = outputs
        self._bias = bias
        self._dtype = np.dtype(schema.dtype)
        self._views = TensorViews(self.layout)

    def initial_parameters(self, seed: int) -> Array:
        """Return zeros."""
        return np.zeros(self.layout.element_count, self._dtype)

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        scores = self._scores(parameters, batch.features)
        loss = self._output.residual(scores, batch.targets, batch.weights)
        tensors = self._views(out)
        residual = scores[:, 0] if self._outputs == 1 else scores
        if isinstance(batch.features, np.ndarray):
            np.dot(batch.features.T, np.ascontiguousarray(residual), out=tensors[WEIGHTS])
        else:
            tensors[WEIGHTS][...] = batch.features.T @ residual
        if self._bias:
            np.sum(scores, axis=0, out=tensors[BIAS])
        return LeafSums(batch.rows, loss)

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        return self._output.evaluate(self._scores(parameters, batch.features), batch.targets)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        return self._output.predict(self._scores(parameters, features))

    def _scores(self, parameters: Array, features: Any) -> Array:
        tensors = self._views(parameters)
        scores: Array = features @ tensors[WEIGHTS]
        if self._outputs == 1:
            scores = scores[:, np.newaxis]
        if self._bias:
            scores += tensors[BIAS]
        return scores
