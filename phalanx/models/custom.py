"""Models that come as user code.

The entrypoint ``module:function`` of ``train.model.custom`` is called as
``function(schema, **arguments)`` and returns a ``UserModel``, or anything else with the methods of
``phalanx.models.Model``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.models.base import Array, Batch, DataSchema, LeafSums, Model, tensor_size
from phalanx.models.code import OneProcess, UserCode, load_entrypoint
from phalanx.specs.canonical import struct_to_python
from phalanx.v1.job_spec_pb2 import Custom
from phalanx.v1.training_pb2 import Layout

T = TypeVar("T")

_MODEL_MEMBERS = (
    "layout",
    "evaluation_sums",
    "initial_parameters",
    "gradient",
    "evaluate",
    "predict",
)


def load_custom(custom: Custom, schema: DataSchema, code_dir: Path | None) -> Model:
    """Import the entrypoint and build the model.

    Args:
        custom: entrypoint and arguments.
        schema: what the data looks like.
        code_dir: folder with the job's ``code.files``; None where it has none.

    Raises:
        InvalidArgument: the entrypoint is not there, or returns no model that fits the job.
            Errors of the user's code pass through, with their traceback.
    """
    code = None if code_dir is None else UserCode(code_dir)
    with OneProcess():
        function = load_entrypoint(custom.entrypoint, code)
        model = function(schema, **struct_to_python(custom.arguments))
        _check_model(model, custom.entrypoint, schema)
        return CodeModel(cast("Model", model), code)


class CodeModel:
    """A model that is user code; the folder that it lies in, if any, is active while it runs."""

    def __init__(self, model: Model, code: UserCode | None) -> None:
        self._model = model
        self._code = code
        self.layout = model.layout
        self.evaluation_sums = tuple(model.evaluation_sums)

    @property
    def numeric_fingerprint(self) -> str:
        """What the model's libraries compute here, as a hash; empty: only its leaves tell."""
        with self._running():
            return str(getattr(self._model, "numeric_fingerprint", ""))

    def initial_parameters(self, seed: int) -> Array:
        """See ``Model``."""
        with self._running():
            return self._model.initial_parameters(seed)

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        with self._running():
            return self._model.gradient(parameters, batch, out)

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        with self._running():
            return self._model.evaluate(parameters, batch)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        with self._running():
            return self._model.predict(parameters, features)

    def within(self, function: Callable[[Model], T]) -> T:
        """Call a function with the model while its code is active; return what it returns."""
        with self._running():
            return function(self._model)

    def _running(self) -> OneProcess:
        if self._code is not None:
            self._code.activate()
        return OneProcess()


def _check_model(model: Any, entrypoint: str, schema: DataSchema) -> None:
    missing = [name for name in _MODEL_MEMBERS if not hasattr(model, name)]
    if missing:
        raise InvalidArgument(
            f"{entrypoint} returned a {type(model).__name__} without {', '.join(missing)}; "
            "derive it from phalanx.models.UserModel and call super().__init__ in it",
            reason="NOT_A_MODEL",
        )
    layout = model.layout
    if not isinstance(layout, Layout) or all(each.workspace for each in layout.tensors):
        raise InvalidArgument(
            f"{entrypoint}: the layout names no tensors that the model is made of",
            reason="NOT_A_MODEL",
        )
    if layout.dtype != schema.dtype:
        raise InvalidArgument(
            f"{entrypoint} made a model of {layout.dtype}, the job asks for {schema.dtype}; pass "
            "the schema's dtype on",
            reason="NOT_A_MODEL",
        )
    count = sum(tensor_size(tensor) for tensor in layout.tensors)
    if layout.element_count != count:
        raise InvalidArgument(
            f"{entrypoint}: the layout says {layout.element_count} elements, its tensors have "
            f"{count}",
            reason="NOT_A_MODEL",
        )
    early = _early_workspace(layout)
    if early:
        raise InvalidArgument(
            f"{entrypoint}: the tensor {early!r} is workspace, and one of the model's own stands "
            "after it; the model is the first part of the vector, so put workspace last",
            reason="NOT_A_MODEL",
        )


def _early_workspace(layout: Layout) -> str:
    """Return the first workspace tensor that one of the model's own follows; empty: none is."""
    last = max(index for index, tensor in enumerate(layout.tensors) if not tensor.workspace)
    return next((tensor.name for tensor in layout.tensors[:last] if tensor.workspace), "")
