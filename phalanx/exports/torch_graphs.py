"""PyTorch modules as ONNX graphs, by PyTorch's own exporter."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np

from phalanx.data.manifest import Statistics
from phalanx.data.statistics import mean_and_scale
from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.models.base import Array
from phalanx.models.custom import CodeModel
from phalanx.models.torch_exact import import_torch

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel

_EXAMPLE_ROWS = 2
"""The exporter takes one row for a constant."""


def torch_graph(model: LoadedModel, names: tuple[str, str], labels: Array, opset: int) -> Any:
    """Return the ONNX model of a PyTorch module.

    Args:
        model: what to convert.
        names: of the input, and of what the module predicts.
        labels: for a classification, what each class is called; then `label` is an output as well.
        opset: the version of ONNX's operators.

    Raises:
        InvalidArgument: the exporter cannot write this module.
        FailedPrecondition: a library that is needed is not installed.
    """
    torch = import_torch()
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise FailedPrecondition(
            "ONNX files of PyTorch modules need onnxscript, which is not installed; run: "
            "pip install 'phalanx[onnx]'",
            reason="EXTRA_MISSING",
        ) from error
    rows = torch.zeros(
        (_EXAMPLE_ROWS, int(model.document["features"])),
        dtype=getattr(torch, str(model.parameters.dtype)),
    )

    def export(inner: Any) -> Any:
        return torch.onnx.export(
            _prepared(model, inner.predictor(model.parameters)),
            (rows,),
            input_names=names[:1],
            output_names=names[1:],
            opset_version=opset,
            dynamo=True,
            dynamic_shapes={"features": {0: torch.export.Dim("rows")}},
            verbose=False,
        ).model_proto

    assert isinstance(model.model, CodeModel)
    try:
        with _silent():
            graph = model.model.within(export)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InvalidArgument(
            f"PyTorch cannot write the module of {model.name} as ONNX: {reason}",
            reason="NO_COUNTERPART",
        ) from error
    _forget_places(graph)
    if len(labels):
        _add_label(graph, names[1], labels)
    return graph


def _prepared(model: LoadedModel, predictor: Any) -> Any:
    """Return a module that standardises as the model does, and predicts one column of numbers."""
    torch = import_torch()
    mean, scale = torch.zeros(()), torch.ones(())
    if model.standardises:
        told = model.document["standardisation"]
        statistics = Statistics(0, tuple(told["mean"]), tuple(told["std"]))
        mean, scale = map(torch.from_numpy, mean_and_scale(statistics, model.parameters.dtype))
        if model.document["feature_format"] == "csr":
            mean = torch.zeros_like(mean)
    standardises, column = model.standardises, not len(model.classes)

    class Prepared(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.predictor = predictor
            self.register_buffer("mean", mean)
            self.register_buffer("scale", scale)

        def forward(self, features: Any) -> Any:
            if standardises:
                features = (features - self.mean) * self.scale
            found = self.predictor(features)
            return found.reshape(-1, 1) if column else found

    return Prepared().eval()


@contextmanager
def _silent() -> Iterator[None]:
    """Without remarks that are no concern of whoever exports a model."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        # What it could not write is printed as well as raised.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _forget_places(graph: Any) -> None:
    """Leave out where on this machine the code of each operation lies."""
    inner = graph.graph
    for part in (inner.node, inner.input, inner.output, inner.value_info, inner.initializer):
        for each in part:
            each.ClearField("metadata_props")
    for function in graph.functions:
        function.ClearField("metadata_props")
        for node in function.node:
            node.ClearField("metadata_props")
    inner.ClearField("metadata_props")
    graph.ClearField("metadata_props")


def _add_label(graph: Any, probabilities: str, labels: Array) -> None:
    """Have the graph say which class is the most probable one, before the probabilities."""
    from onnx import helper, numpy_helper

    named = np.array(labels, object) if labels.dtype.kind == "U" else labels
    inner = graph.graph
    inner.initializer.append(numpy_helper.from_array(named, "labels"))
    inner.node.append(helper.make_node("ArgMax", [probabilities], ["place"], axis=1, keepdims=0))
    inner.node.append(helper.make_node("Gather", ["labels", "place"], ["label"], axis=0))
    kind = inner.initializer[-1].data_type
    inner.output.insert(0, helper.make_tensor_value_info("label", kind, ["rows"]))
