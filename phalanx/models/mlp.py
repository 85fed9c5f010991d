"""Multi-layer perceptron in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.models.base import (
    Array,
    Batch,
    DataSchema,
    LeafSums,
    TensorViews,
    keyed_normal,
    make_layout,
)
from phalanx.models.clipping import clip_factors, shorten, squared_norms, without_infinite
from phalanx.models.losses import OutputLayer


def _relu(z: Array) -> None:
    np.maximum(z, 0, out=z)


def _relu_slope(a: Array, d: Array) -> None:
    d *= a > 0


def _tanh(z: Array) -> None:
    np.tanh(z, out=z)


def _tanh_slope(a: Array, d: Array) -> None:
    d *= 1 - a * a


def _sigmoid(z: Array) -> None:
    # tanh is bounded, so this form cannot overflow.
    np.multiply(z, 0.5, out=z)
    np.tanh(z, out=z)
    np.multiply(z, 0.5, out=z)
    np.add(z, 0.5, out=z)


def _sigmoid_slope(a: Array, d: Array) -> None:
    d *= a * (1 - a)


#: name → (in place on the scores, derivative times ``d`` in place given the activations)
ACTIVATIONS = {
    "relu": (_relu, _relu_slope),
    "tanh": (_tanh, _tanh_slope),
    "sigmoid": (_sigmoid, _sigmoid_slope),
}


class Mlp:
    """Dense layers with one activation between them.

    Weights start as normal numbers of variance 2/n for relu (He et al. 2015) and 1/n otherwise
    (LeCun et al. 1998), n the number of inputs of the layer; biases start at zero.
    """

    def __init__(
        self,
        schema: DataSchema,
        hidden: Sequence[int],
        outputs: int,
        output: OutputLayer,
        activation: str,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise InvalidArgument(
                f"activation {activation!r} is not one of {', '.join(sorted(ACTIVATIONS))}",
            )
        self._widths = [schema.features, *hidden, outputs]
        tensors: list[tuple[str, tuple[int, ...], bool]] = []
        for index in range(len(self._widths) - 1):
            wide, narrow = self._widths[index : index + 2]
            tensors.append((f"layers.{index}.weights", (wide, narrow), True))
            tensors.append((f"layers.{index}.bias", (narrow,), False))
        self.layout = make_layout(tensors, schema.dtype)
        self.evaluation_sums = output.sums
        self._output = output
        self._activate, self._slope = ACTIVATIONS[activation]
        self._gain = 2.0 if activation == "relu" else 1.0
        self._dtype = np.dtype(schema.dtype)
        self._views = TensorViews(self.layout)
        self._buffers: dict[int, list[Array]] = {}

    def initial_parameters(self, seed: int) -> Array:
        """See ``Model``."""
        parameters = np.zeros(self.layout.element_count, self._dtype)
        for index, tensor in enumerate(self._views(parameters).values()):
            if tensor.ndim == 2:
                scale = math.sqrt(self._gain / tensor.shape[0])
                normal = keyed_normal(seed, index, tensor.size)
                tensor[...] = (normal * scale).reshape(tensor.shape)
        return parameters

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        layers = self._layers(parameters)
        slopes = self._layers(out)
        activations = self._forward(layers, batch.features)
        delta = activations[-1]
        loss = self._output.residual(delta, batch.targets, batch.weights)
        for index in range(len(layers) - 1, -1, -1):
            below = batch.features if index == 0 else activations[index - 1]
            weights_out, bias_out = slopes[index]
            _transposed_product(below, delta, weights_out)
            np.sum(delta, axis=0, out=bias_out)
            if index > 0:
                delta = delta @ layers[index][0].T
                self._slope(below, delta)
        return LeafSums(batch.rows, loss)

    def clipped_gradient(
        self, parameters: Array, batch: Batch, clip_norm: float, out: Array
    ) -> None:
        """See ``ClippingModel``: layer by layer the norm is that of the inputs, with a 1 for the
        bias, times that of the derivative by what comes out."""
        layers = self._layers(parameters)
        activations = self._forward(layers, batch.features)
        self._output.residual(activations[-1], batch.targets, batch.weights)
        inputs = [batch.features, *activations[:-1]]
        deltas = [activations[-1]]
        for index in range(len(layers) - 1, 0, -1):
            delta = deltas[0] @ layers[index][0].T
            self._slope(inputs[index], delta)
            deltas.insert(0, delta)
        squares = np.zeros(batch.rows)
        for below, delta in zip(inputs, deltas, strict=True):
            squares += (squared_norms(below) + 1.0) * squared_norms(delta)
        factors = clip_factors(squares, clip_norm)
        for (weights_out, bias_out), below, delta in zip(
            self._layers(out), inputs, deltas, strict=True
        ):
            shorten(delta, factors)
            _transposed_product(without_infinite(below, factors), delta, weights_out)
            np.sum(delta, axis=0, out=bias_out)

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        scores = self._forward(self._layers(parameters), batch.features)[-1]
        return self._output.evaluate(scores, batch.targets)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        return self._output.predict(self._forward(self._layers(parameters), features)[-1].copy())

    def _layers(self, vector: Array) -> list[tuple[Array, Array]]:
        tensors = list(self._views(vector).values())
        return list(zip(tensors[0::2], tensors[1::2], strict=True))

    def _forward(self, layers: list[tuple[Array, Array]], features: Any) -> list[Array]:
        """Return the activations of each layer, the last one being the scores."""
        buffers = self._activations(features.shape[0])
        below = features
        for index, (weights, bias) in enumerate(layers):
            layer = buffers[index]
            if isinstance(below, np.ndarray):
                np.dot(below, weights, out=layer)
            else:
                layer[...] = below @ weights
            layer += bias
            if index < len(layers) - 1:
                self._activate(layer)
            below = layer
        return buffers

    def _activations(self, rows: int) -> list[Array]:
        """Return one (rows, width) buffer per layer, kept between leaves of equal size."""
        buffers = self._buffers.get(rows)
        if buffers is None:
            if len(self._buffers) >= 4:
                self._buffers.clear()
            buffers = [np.empty((rows, width), self._dtype) for width in self._widths[1:]]
            self._buffers[rows] = buffers
        return buffers


def _transposed_product(below: Any, delta: Array, out: Array) -> None:
    if isinstance(below, np.ndarray):
        np.dot(below.T, delta, out=out)
    else:
        out[...] = below.T @ delta
