"""The base class for a model of your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.models.base import Array, Batch, DataSchema, LeafSums, TensorViews, make_layout
from phalanx.models.code import OneProcess
from phalanx.training.metrics import CLASSIFICATION_SUMS, REGRESSION_SUMS


class UserModel(ABC):
    """A model of your own: named tensors in, a loss and named gradients out.

    Say in ``__init__`` which tensors there are, then define ``initial`` and
    ``loss_and_gradients``; with ``predictions`` the model also predicts and its accuracy, or its
    rmse, mae and r2, are measured. ``evaluation_sums`` and ``evaluation`` change what is measured::

        class Linear(UserModel):
            def __init__(self, schema, start=0):
                super().__init__(schema, {"w": (schema.features,)}, decay=["w"])
                self.start = start

            def initial(self, seed):
                return {"w": np.full(self.schema.features, self.start)}

            def loss_and_gradients(self, parameters, features, targets):
                error = features @ parameters["w"] - targets
                return 0.5 * float(error @ error), {"w": features.T @ error}

    Losses, gradients and measurements are *sums* over the rows that are handed in, never means:
    dividing happens once, when the sums of all shards are together. ``features`` is (rows,
    features), dense or a ``scipy.sparse.csr_array`` as the data set is; ``targets`` is (rows,),
    class indices or numbers.

    All methods must be pure: equal arguments give equal bits. No clock, no file, no random numbers
    but those derived from the seed that ``initial`` is handed. Parameters are read-only.
    """

    def __init__(
        self,
        schema: DataSchema,
        tensors: Mapping[str, Sequence[int]],
        *,
        decay: Collection[str] | None = None,
    ) -> None:
        """Name the tensors and their shapes.

        Args:
            schema: what the entrypoint was handed.
            tensors: name → shape, in the order in which they are stored.
            decay: the tensors on which L2 and weight decay act; those of two or more dimensions
                where it is not given, which leaves biases out.
        """
        acts = {name for name, shape in tensors.items() if len(shape) > 1}
        acts = acts if decay is None else set(decay)
        unknown = acts - tensors.keys()
        if unknown:
            raise InvalidArgument(f"decay names {sorted(unknown)}, which are no tensors")
        specs = [(name, tuple(shape), name in acts) for name, shape in tensors.items()]
        self.schema = schema
        self.layout = make_layout(specs, schema.dtype)
        self._views = TensorViews(self.layout)

    @property
    def evaluation_sums(self) -> tuple[str, ...]:
        """Names of the sums that ``evaluation`` returns; each metric is the sum over the rows."""
        if type(self).predictions is UserModel.predictions:
            return ("loss",)
        return CLASSIFICATION_SUMS if self.schema.classes else REGRESSION_SUMS

    @abstractmethod
    def initial(self, seed: int) -> Mapping[str, Any]:
        """Return the first value of each tensor."""

    @abstractmethod
    def loss_and_gradients(
        self, parameters: Mapping[str, Array], features: Any, targets: Array
    ) -> tuple[float, Mapping[str, Any]]:
        """Return the loss *sum* over the rows and its gradient for each tensor."""

    def predictions(self, parameters: Mapping[str, Array], features: Any) -> Array:
        """Return (rows, classes) probabilities, or (rows,) values for a regression."""
        raise InvalidArgument(
            f"{type(self).__name__} cannot predict; define predictions(parameters, features)"
        )

    def evaluation(
        self, parameters: Mapping[str, Array], features: Any, targets: Array
    ) -> Mapping[str, float]:
        """Return the sums named by ``evaluation_sums`` over the rows."""
        loss = float(self.loss_and_gradients(parameters, features, targets)[0])
        names = self.evaluation_sums
        if names == ("loss",):
            return {"loss": loss}
        if names == CLASSIFICATION_SUMS:
            predicted = self._predicted(parameters, features).argmax(axis=1)
            return {"loss": loss, "correct": float(np.count_nonzero(predicted == targets))}
        if names != REGRESSION_SUMS:
            raise InvalidArgument(
                f"{type(self).__name__} names its own evaluation_sums and must define evaluation()"
            )
        actual = np.asarray(targets, np.float64)
        error = self._predicted(parameters, features) - actual
        return {
            "loss": loss,
            "squared_error": float(error @ error),
            "absolute_error": float(np.abs(error).sum()),
            "target": float(actual.sum()),
            "target_squared": float(actual @ actual),
        }

    def initial_parameters(self, seed: int) -> Array:
        """See ``Model``."""
        vector = np.zeros(self.layout.element_count, np.dtype(self.layout.dtype))
        self._fill(vector, self.initial(seed), "initial")
        return vector

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        named = self._named(parameters)
        with OneProcess():  # `out` may be memory that a copy of this process shares
            result = self.loss_and_gradients(named, batch.features, batch.targets)
        if not isinstance(result, tuple) or len(result) != 2 or np.ndim(result[0]) != 0:
            raise InvalidArgument(
                f"{type(self).__name__}.loss_and_gradients must return (loss sum, gradients), a "
                f"number and a dictionary"
            )
        self._fill(out, result[1], "loss_and_gradients")
        return LeafSums(batch.rows, float(result[0]))

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        sums = self.evaluation(self._named(parameters), batch.features, batch.targets)
        if set(sums) != set(self.evaluation_sums):
            raise InvalidArgument(
                f"{type(self).__name__}.evaluation returned {sorted(sums)}; evaluation_sums names "
                f"{sorted(self.evaluation_sums)}"
            )
        return np.array([sums[name] for name in self.evaluation_sums], np.float64)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        return self._predicted(self._named(parameters), features)

    def _named(self, parameters: Array) -> dict[str, Array]:
        tensors = self._views(parameters)
        for tensor in tensors.values():
            tensor.flags.writeable = False
        return tensors

    def _predicted(self, parameters: Mapping[str, Array], features: Any) -> Array:
        values = np.asarray(self.predictions(parameters, features))
        classes = self.schema.classes
        shape = (features.shape[0], classes) if classes else (features.shape[0],)
        if values.shape != shape:
            raise InvalidArgument(
                f"{type(self).__name__}.predictions returned shape {values.shape} instead of "
                f"{shape}"
            )
        return values

    def _fill(self, vector: Array, values: Mapping[str, Any], method: str) -> None:
        where = f"{type(self).__name__}.{method}"
        tensors = self._views(vector)
        if not isinstance(values, Mapping) or set(values) != set(tensors):
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise InvalidArgument(
                f"{where} returned the tensors {found}; the model has {sorted(tensors)}"
            )
        for name, tensor in tensors.items():
            value = np.asarray(values[name])
            if value.shape != tensor.shape:
                raise InvalidArgument(
                    f"{where} returned {name!r} with shape {value.shape} instead of {tensor.shape}"
                )
            tensor[...] = value
