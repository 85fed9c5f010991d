"""Boosted trees as ONNX graphs: scaling, an ensemble of trees, and outputs of their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from phalanx.data.manifest import Statistics
from phalanx.data.statistics import mean_and_scale
from phalanx.errors import FailedPrecondition
from phalanx.models.base import Array, views
from phalanx.models.boosting import BASE, FEATURE, THRESHOLD, VALUE

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel

SCORES = "scores"


def boosted_graph(
    model: LoadedModel, names: tuple[str, ...], labels: Array, operators: dict[str, int]
) -> Any:
    """Return the ONNX model of boosted trees. Scores of an ensemble are ``float32``, whatever the
    type of the rows; thresholds and values are of the type of the parameters.

    Args:
        model: what to convert.
        names: of the input; then of label and probabilities, or of the prediction.
        labels: what each class is called; empty for a regression.
        operators: the version of each set of operators.

    Raises FailedPrecondition where a library that is needed is not installed.
    """
    try:
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise FailedPrecondition(
            "ONNX files need onnx, which is not installed; run: pip install 'phalanx[onnx]'",
            reason="EXTRA_MISSING",
        ) from error
    types = helper.np_dtype_to_tensor_dtype
    constants, nodes, rows = {}, [], names[0]
    for operator, name, numbers in _scaling(model):
        constants[name] = numbers
        nodes.append(helper.make_node(operator, [rows, name], [f"scaled by {name}"]))
        rows = f"scaled by {name}"
    attributes: dict[str, Any] = {
        name: numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        for name, value in _ensemble(model).items()
    }
    scores = SCORES if len(labels) else names[1]
    ensemble = ("TreeEnsembleRegressor", [rows], [scores])
    nodes.append(helper.make_node(*ensemble, domain="ai.onnx.ml", **attributes))
    single = types(np.dtype(np.float32))
    told = [helper.make_tensor_value_info(names[-1], single, ["rows", max(1, len(labels))])]
    if len(labels):
        constants["labels"] = np.array(labels, object) if labels.dtype.kind == "U" else labels
        steps = [*_probabilities(attributes["n_targets"], names[2]), *_label(names[2], names[1])]
        nodes += [helper.make_node(*step, **more) for *step, more in steps]
    initializers = [numpy_helper.from_array(each, name) for name, each in constants.items()]
    if len(labels):
        kind = initializers[-1].data_type
        told.insert(0, helper.make_tensor_value_info(names[1], kind, ["rows"]))
    features = [None, int(model.document["features"])]
    taken = helper.make_tensor_value_info(names[0], types(model.parameters.dtype), features)
    graph = helper.make_graph(nodes, model.name, [taken], told, initializers)
    imports = [helper.make_opsetid(*each) for each in operators.items()]
    # The oldest version of the format that has these operators.
    return helper.make_model_gen_version(graph, opset_imports=imports, producer_name="phalanx")


def _probabilities(scores: int, name: str) -> list[tuple[Any, ...]]:
    """Return the operators that make probabilities: of the log odds of the second class, or of a
    score for each class."""
    if scores > 1:
        return [("Softmax", [SCORES], [name], {"axis": 1})]
    return [
        ("Neg", [SCORES], ["against"], {}),
        ("Concat", ["against", SCORES], ["log odds"], {"axis": 1}),
        ("Sigmoid", ["log odds"], [name], {}),
    ]


def _label(probabilities: str, name: str) -> list[tuple[Any, ...]]:
    return [
        ("ArgMax", [probabilities], ["place"], {"axis": 1, "keepdims": 0}),
        ("Gather", ["labels", "place"], [name], {"axis": 0}),
    ]


def _scaling(model: LoadedModel) -> list[tuple[str, str, Array]]:
    """Return the operators, names and numbers by which the model standardises."""
    if not model.standardises:
        return []
    told = model.document["standardisation"]
    statistics = Statistics(0, tuple(told["mean"]), tuple(told["std"]))
    mean, scale = mean_and_scale(statistics, model.parameters.dtype)
    centred = [("Sub", "mean", mean)] if model.document["feature_format"] != "csr" else []
    return [*centred, ("Mul", "scale", scale)]


def _ensemble(model: LoadedModel) -> dict[str, Any]:
    """Return the attributes of the ensemble: all nodes that a row may reach."""
    tensors = views(model.model.layout, model.parameters)
    width = len(tensors[BASE])
    splits = tensors[FEATURE].astype(np.int64)
    reached = np.zeros(splits.shape, np.bool_)
    reached[:, 0] = True
    for node in range(splits.shape[1] // 2):
        inner = reached[:, node] & (splits[:, node] >= 0)
        reached[:, 2 * node + 1] = reached[:, 2 * node + 2] = inner
    trees, nodes = np.nonzero(reached)
    feature = splits[trees, nodes]
    inner = feature >= 0
    ends, end_nodes = trees[~inner], nodes[~inner]

    return {
        "n_targets": width,
        "base_values_as_tensor": np.ascontiguousarray(tensors[BASE]),
        "nodes_treeids": trees.tolist(),
        "nodes_nodeids": nodes.tolist(),
        "nodes_featureids": np.where(inner, feature, 0).tolist(),
        "nodes_modes": ["BRANCH_LEQ" if each else "LEAF" for each in inner],
        "nodes_values_as_tensor": np.where(inner, tensors[THRESHOLD][trees, nodes], 0),
        "nodes_truenodeids": np.where(inner, 2 * nodes + 1, 0).tolist(),
        "nodes_falsenodeids": np.where(inner, 2 * nodes + 2, 0).tolist(),
        "target_treeids": ends.tolist(),
        "target_nodeids": end_nodes.tolist(),
        "target_ids": (ends % width).tolist(),
        "target_weights_as_tensor": np.ascontiguousarray(tensors[VALUE][ends, end_nodes]),
    }
