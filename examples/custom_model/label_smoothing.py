"""A network of one's own: one hidden layer, trained on softened labels.

Instead of "this is a boot, for certain" the network is told "a boot, at 1 - smoothing; anything, at
smoothing". It becomes less sure of itself and usually a little better (Szegedy et al. 2016).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models import DataSchema, UserModel

Array = NDArray[Any]
Tensors = Mapping[str, Array]


class LabelSmoothing(UserModel):
    """Called once per process as ``LabelSmoothing(schema, **arguments)`` of the job file."""

    def __init__(self, schema: DataSchema, hidden: int = 64, smoothing: float = 0.1) -> None:
        tensors = {
            "hidden.weights": (schema.features, hidden),
            "hidden.bias": (hidden,),
            "output.weights": (hidden, schema.classes),
            "output.bias": (schema.classes,),
        }
        super().__init__(schema, tensors)
        self.hidden = hidden
        self.smoothing = smoothing

    def initial(self, seed: int) -> Tensors:
        """The first value of each tensor: the same for the same seed."""
        random = np.random.default_rng(seed)
        features, hidden, classes = self.schema.features, self.hidden, self.schema.classes
        return {
            "hidden.weights": random.normal(0, (2 / features) ** 0.5, (features, hidden)),
            "hidden.bias": np.zeros(hidden),
            "output.weights": random.normal(0, (1 / hidden) ** 0.5, (hidden, classes)),
            "output.bias": np.zeros(classes),
        }

    def loss_and_gradients(
        self, parameters: Tensors, features: Array, targets: Array
    ) -> tuple[float, Tensors]:
        """The loss summed over the rows, and its derivative for each tensor."""
        hidden, probabilities = self.forward(parameters, features)
        wanted = np.full_like(probabilities, self.smoothing / self.schema.classes)
        wanted[np.arange(len(targets)), targets] += 1 - self.smoothing
        loss = -float((wanted * np.log(probabilities + 1e-12)).sum())
        error = probabilities - wanted
        below = error @ parameters["output.weights"].T * (hidden > 0)
        return loss, {
            "hidden.weights": features.T @ below,
            "hidden.bias": below.sum(axis=0),
            "output.weights": hidden.T @ error,
            "output.bias": error.sum(axis=0),
        }

    def predictions(self, parameters: Tensors, features: Array) -> Array:
        """Probabilities of the classes; with them comes the metric accuracy."""
        return self.forward(parameters, features)[1]

    def forward(self, parameters: Tensors, features: Array) -> tuple[Array, Array]:
        """Activations of the hidden layer, and probabilities."""
        hidden = features @ parameters["hidden.weights"] + parameters["hidden.bias"]
        hidden = np.maximum(hidden, 0)
        scores = hidden @ parameters["output.weights"] + parameters["output.bias"]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, scores / scores.sum(axis=1, keepdims=True)
