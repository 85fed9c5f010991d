"""Models that a user brings as code.

The entrypoint ``module:function`` of ``train.model.custom`` is called as
``function(schema, **arguments)`` in a leaf process and returns a ``UserModel`` (or anything with
the methods of ``phalanx.models.Model``).
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.models.base import Array, Batch, DataSchema, LeafSums, Model, make_layout, views
from phalanx.v1.job_spec_pb2 import Custom


class UserModel(ABC):
    """Base class for a model of your own: named tensors in, a loss and named gradients out.

    Functions must be pure: equal arguments give equal bits. No clock, no file, no random numbers
    but those derived from the ``seed`` that ``initial`` is handed.
    """

    def __init__(self, tensors: Mapping[str, Sequence[int]], dtype: str = "float32") -> None:
        """Name the tensors and their shapes; those of two or more dimensions decay under L2."""
        specs = [(name, tuple(shape), len(shape) > 1) for name, shape in tensors.items()]
        self.layout = make_layout(specs, dtype)

    @property
    def evaluation_sums(self) -> tuple[str, ...]:
        """Names of the sums that ``evaluation`` returns; the metric is the sum over the rows."""
        return ("loss",)

    @abstractmethod
    def initial(self, seed: int) -> Mapping[str, Array]:
        """Return the first value of each tensor."""

    @abstractmethod
    def loss_and_gradients(
        self, parameters: Mapping[str, Array], features: Any, targets: Array
    ) -> tuple[float, Mapping[str, Array]]:
        """Return the loss *sum* over the rows and its gradient for each tensor."""

    def evaluation(
        self, parameters: Mapping[str, Array], features: Any, targets: Array
    ) -> Mapping[str, float]:
        """Return the sums named by ``evaluation_sums`` over the rows."""
        return {"loss": self.loss_and_gradients(parameters, features, targets)[0]}

    def predictions(self, parameters: Mapping[str, Array], features: Any) -> Array:
        """Return (rows, classes) probabilities, or (rows,) values for a regression."""
        raise InvalidArgument(f"{type(self).__name__} does not define predictions()")

    def initial_parameters(self, seed: int) -> Array:
        """See ``Model``."""
        vector = np.zeros(self.layout.element_count, np.dtype(self.layout.dtype))
        self._fill(vector, self.initial(seed), "initial")
        return vector

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        tensors = views(self.layout, parameters)
        loss, gradients = self.loss_and_gradients(tensors, batch.features, batch.targets)
        self._fill(out, gradients, "loss_and_gradients")
        return LeafSums(batch.rows, float(loss))

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        tensors = views(self.layout, parameters)
        sums = self.evaluation(tensors, batch.features, batch.targets)
        if set(sums) != set(self.evaluation_sums):
            raise InvalidArgument(
                f"{type(self).__name__}.evaluation returned {sorted(sums)}; evaluation_sums names "
                f"{sorted(self.evaluation_sums)}"
            )
        return np.array([sums[name] for name in self.evaluation_sums], np.float64)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        return self.predictions(views(self.layout, parameters), features)

    def _fill(self, vector: Array, values: Mapping[str, Array], method: str) -> None:
        tensors = views(self.layout, vector)
        where = f"{type(self).__name__}.{method}"
        if set(values) != set(tensors):
            raise InvalidArgument(
                f"{where} returned the tensors {sorted(values)}; the model has {sorted(tensors)}"
            )
        for name, tensor in tensors.items():
            value = np.asarray(values[name])
            if value.shape != tensor.shape:
                raise InvalidArgument(
                    f"{where} returned {name!r} with shape {value.shape} instead of {tensor.shape}"
                )
            tensor[...] = value


def plain(value: Struct | ListValue | Value) -> Any:
    """Return a protobuf ``Struct`` as plain Python, whole numbers as int."""
    if isinstance(value, Struct):
        return {name: plain(item) for name, item in value.fields.items()}
    if isinstance(value, ListValue):
        return [plain(item) for item in value.values]
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    if kind in ("struct_value", "list_value"):
        return plain(getattr(value, kind))
    return None if kind == "null_value" else getattr(value, kind or "string_value")


def load_custom(custom: Custom, schema: DataSchema, code_dir: Path | None) -> Model:
    """Import the entrypoint and build the model.

    ``code_dir`` holds the job's ``code.files`` and goes first on the module path. Raises
    InvalidArgument where the entrypoint is not there; errors of the user's code pass through, with
    their traceback.
    """
    module_name, colon, function_name = custom.entrypoint.partition(":")
    if not colon or not module_name or not function_name:
        raise InvalidArgument(
            f"entrypoint {custom.entrypoint!r} is not of the form module:function"
        )
    if code_dir is not None and str(code_dir) not in sys.path:
        sys.path.insert(0, str(code_dir))
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise InvalidArgument(
            f"there is no module {module_name!r}: add it to code.files or install it on the workers"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InvalidArgument(f"module {module_name!r} has no function {function_name!r}")
    model = function(schema, **plain(custom.arguments))
    missing = [name for name in _MODEL_MEMBERS if not hasattr(model, name)]
    if missing:
        raise InvalidArgument(
            f"{custom.entrypoint} returned a {type(model).__name__} without {', '.join(missing)}; "
            "derive it from phalanx.models.UserModel"
        )
    if model.layout.dtype != schema.dtype:
        raise InvalidArgument(
            f"{custom.entrypoint} made a model of {model.layout.dtype}, the job asks for "
            f"{schema.dtype}; pass schema.dtype on"
        )
    return cast("Model", model)


_MODEL_MEMBERS = (
    "layout",
    "evaluation_sums",
    "initial_parameters",
    "gradient",
    "evaluate",
    "predict",
)
