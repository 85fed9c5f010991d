"""Trained models as ONNX files, by way of what they are in scikit-learn or PyTorch; boosted trees,
which neither has, by themselves.

A graph takes ``features``, rows as ``LoadedModel.prepare`` returns them in the type of the model's
parameters (``float32`` for forests), and is deterministic: equal models give equal files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phalanx.data.manifest import columns_from
from phalanx.data.model_files import load_model_directory
from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.exports.boosted_graphs import boosted_graph
from phalanx.exports.estimators import convert, kind_in, load_convertible, model_kind
from phalanx.exports.torch_graphs import torch_graph

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel

INPUT = "features"
_TORCH, _BOOSTING = "torch", "boosting"

_OUTPUTS = {
    "classification": ("label", "probabilities"),
    "regression": ("prediction",),
    "clustering": ("cluster", "distances"),
    "projection": ("components",),
}
"""Names by task. A regression has one column; ``distances`` are those to all centers."""

_MARGINS = ("label", "scores")
"""Names where decision values tell classes apart: a column for each, the first the negative."""

_OPERATORS = {"": 18, "ai.onnx.ml": 3}
"""The versions of ONNX's operators: old enough for every runtime in use."""

_OTHERWISE = {"cascade": "its machines have kernels in float32, and no votes"}
"""Kinds that scikit-learn has a class for, and ONNX no equal operator."""


def load_for_graph(folder: Path, *, allow_code: bool = False) -> LoadedModel:
    """Load a model that becomes a graph; only PyTorch modules may bring code, with ``allow_code``.

    Raises as ``load_convertible`` and ``load_model_directory``.
    """
    kind = kind_in(folder)
    _refuse_other(kind)
    if kind in (_TORCH, _BOOSTING):
        return load_model_directory(folder, allow_code=allow_code)
    return load_convertible(folder)


def _refuse_other(kind: str) -> None:
    if kind in _OTHERWISE:
        raise InvalidArgument(
            f"ONNX computes a {kind} otherwise: {_OTHERWISE[kind]}; there is an object of "
            "scikit-learn for it",
            reason="NO_COUNTERPART",
        )


def onnx_bytes(model: LoadedModel) -> bytes:
    """Return a model as the contents of an ONNX file.

    Raises:
        InvalidArgument: there is no converter of what the model computes.
        FailedPrecondition: a library that is needed is not installed.
    """
    _refuse_other(model_kind(model))
    if model_kind(model) == _TORCH:
        labels = _labels(model) if len(model.classes) else model.classes
        names = (INPUT, _OUTPUTS[model.task][-1])
        graph = torch_graph(model, names, labels, _OPERATORS[""])
    elif model_kind(model) == _BOOSTING:
        labels = _labels(model) if len(model.classes) else model.classes
        graph = boosted_graph(model, (INPUT, *_OUTPUTS[model.task]), labels, _OPERATORS)
    else:
        graph = _sklearn_graph(model)
    graph.graph.name, graph.doc_string = model.name, f"{model.name}, trained by Phalanx"
    from onnx import helper

    helper.set_model_props(graph, _properties(model))
    # Converters list them as they come out of a set.
    versions = sorted((each.domain, each.version) for each in graph.opset_import)
    graph.ClearField("opset_import")
    graph.opset_import.extend(helper.make_opsetid(*each) for each in versions)
    contents: bytes = graph.SerializeToString(deterministic=True)
    return contents


def _sklearn_graph(model: LoadedModel) -> Any:
    """The graph of a model that scikit-learn has a class for."""
    found = convert(model, _labels(model))
    skl2onnx = _skl2onnx()
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
    from sklearn.pipeline import Pipeline

    rows = DoubleTensorType if found.dtype == "float64" else FloatTensorType
    steps = [] if found.scaler is None else [("standardise", found.scaler)]
    names, options = _OUTPUTS[model.task], {}
    if model.task == "classification":
        names = _MARGINS if model.has_decision_values else names
        options = {"raw_scores": True} if model.has_decision_values else {"zipmap": False}
    graph = skl2onnx.convert_sklearn(
        Pipeline([*steps, ("model", found.estimator)]),
        name=model.name,
        initial_types=[(INPUT, rows([None, found.features]))],
        final_types=[(name, None) for name in names],
        target_opset=_OPERATORS,
        options={id(found.estimator): options},
    )
    if names is _MARGINS:
        # The converter states the one column that there is without `raw_scores`.
        graph.graph.output[1].type.tensor_type.shape.dim[1].dim_value = len(model.classes)
    return graph


def _skl2onnx() -> Any:
    try:
        import skl2onnx
    except ImportError as error:
        raise FailedPrecondition(
            "ONNX files need skl2onnx, which is not installed; run: pip install 'phalanx[onnx]'",
            reason="EXTRA_MISSING",
        ) from error
    return skl2onnx


def _labels(model: LoadedModel) -> Any:
    """Labels that a graph can hold, whole numbers or texts: True is 1, and 0.5 the text of it."""
    kind = model.classes.dtype.kind
    if kind == "b":
        return model.classes.astype(np.int64)
    return model.classes if kind == "i" else np.array(model.document["classes"])


def _properties(model: LoadedModel) -> dict[str, str]:
    """What a file says of itself; lists as JSON."""
    columns = columns_from(model.document["columns"])
    names = [name for column in columns for name in column.feature_names()]
    return {
        "model": model.name,
        "parameters_sha256": model.parameters_sha256,
        "target": model.target,
        "classes": json.dumps(model.document["classes"], ensure_ascii=False),
        "features": json.dumps(names, ensure_ascii=False),
    }
