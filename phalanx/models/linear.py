"""Linear, logistic and softmax regression and the linear SVM on dense and CSR rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models.base import Array, Batch, DataSchema, LeafSums, TensorViews, make_layout
from phalanx.models.clipping import clip_factors, shorten, squared_norms, without_infinite
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
        self._sum(batch.features, scores, out)
        return LeafSums(batch.rows, loss)

    def clipped_gradient(
        self, parameters: Array, batch: Batch, clip_norm: float, out: Array
    ) -> None:
        """See ``ClippingModel``: the norm of a row's gradient is that of its features, with a 1 for
        the bias, times that of its residual."""
        scores = self._scores(parameters, batch.features)
        self._output.residual(scores, batch.targets, batch.weights)
        inputs = squared_norms(batch.features) + float(self._bias)
        factors = clip_factors(inputs * squared_norms(scores), clip_norm)
        shorten(scores, factors)
        self._sum(without_infinite(batch.features, factors), scores, out)

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        return self._output.evaluate(self._scores(parameters, batch.features), batch.targets)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        return self._output.predict(self._scores(parameters, features))

    def _sum(self, features: Any, residual: Array, out: Array) -> None:
        """Write the gradient of rows with these derivatives by their scores."""
        tensors = self._views(out)
        by_score = residual[:, 0] if self._outputs == 1 else residual
        if isinstance(features, np.ndarray):
            np.dot(features.T, np.ascontiguousarray(by_score), out=tensors[WEIGHTS])
        else:
            tensors[WEIGHTS][...] = features.T @ by_score
        if self._bias:
            np.sum(residual, axis=0, out=tensors[BIAS])

    def _scores(self, parameters: Array, features: Any) -> Array:
        tensors = self._views(parameters)
        scores: Array = features @ tensors[WEIGHTS]
        if self._outputs == 1:
            scores = scores[:, np.newaxis]
        if self._bias:
            scores += tensors[BIAS]
        return scores
