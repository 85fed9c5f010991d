"""Facts about models and metrics that job files are checked against; no numeric library needed."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from phalanx.v1 import job_spec_pb2

CLASSIFICATION = "classification"
REGRESSION = "regression"

ACTIVATIONS = ("relu", "tanh", "sigmoid")
SVM_LOSSES = ("hinge", "squared_hinge")
MLP_LOSSES = {"cross_entropy": CLASSIFICATION, "squared_error": REGRESSION}
CERTIFICATES = ("primal", "dual", "duality_gap")
"""Metrics of cocoa where it is evaluated on the rows that it trains on."""
TORCH_REGRESSION_LOSSES = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "poisson_nll_loss",
)
TORCH_LOSSES = {
    "cross_entropy": CLASSIFICATION,
    "nll_loss": CLASSIFICATION,
    "binary_cross_entropy_with_logits": CLASSIFICATION,
    **dict.fromkeys(TORCH_REGRESSION_LOSSES, REGRESSION),
}
"""Of torch.nn.functional: those that give a loss for each row."""
CASTS = ("bfloat16", "float16")

_METRICS = {CLASSIFICATION: ("loss", "accuracy"), REGRESSION: ("loss", "rmse", "mae", "r2")}
_TASKS = {
    "linear_regression": REGRESSION,
    "logistic_regression": CLASSIFICATION,
    "softmax_regression": CLASSIFICATION,
    "linear_svm": CLASSIFICATION,
}
TWO_CLASSES = ("logistic_regression", "linear_svm")


_OWN_METRICS: dict[str, tuple[str, ...]] = {"k_means": ("loss",), "pca": ("loss",)}
"""Metrics of models that predict no target."""


def model_task(model: job_spec_pb2.Model, dataset_task: str) -> str:
    """Return what the model predicts; empty for a custom model, which may do either."""
    kind = model.WhichOneof("kind") or ""
    if kind == "boosting":
        return dataset_task
    if kind == "torch":
        return TORCH_LOSSES.get(model.torch.loss, dataset_task)
    if kind == "mlp":
        return MLP_LOSSES.get(model.mlp.loss, dataset_task)
    return _TASKS.get(kind, "")


def metric_names(model: job_spec_pb2.Model, dataset_task: str) -> tuple[str, ...]:
    """Return the names of the model's evaluation metrics; nothing for user code (unknown here)."""
    kind = model.WhichOneof("kind") or ""
    return _OWN_METRICS.get(kind) or _METRICS.get(model_task(model, dataset_task), ())


def element_count(model: job_spec_pb2.Model, features: int, classes: int) -> int:
    """Return the number of parameters of a built-in model, 0 for user code."""
    return sum(prod(shape) for shape in tensor_shapes(model, features, classes).values())


def tensor_shapes(
    model: job_spec_pb2.Model, features: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a built-in model's tensors by name, none for user code."""
    shapes: dict[str, tuple[int, ...]] = {}
    kind = model.WhichOneof("kind") or ""
    if kind in _TASKS:
        outputs = classes if kind == "softmax_regression" else 1
        shapes["weights"] = (features,) if outputs == 1 else (features, outputs)
        if getattr(model, kind).bias:
            shapes["bias"] = (outputs,)
    elif kind == "mlp":
        widths = [features, *model.mlp.hidden, max(classes, 1)]
        for index, (wide, narrow) in enumerate(pairwise(widths)):
            shapes[f"layers.{index}.weights"] = (wide, narrow)
            shapes[f"layers.{index}.bias"] = (narrow,)
    elif kind == "boosting":
        outputs = classes if classes > 2 else 1
        nodes = (model.boosting.trees * outputs, 2 ** (model.boosting.depth + 1) - 1)
        shapes["base"] = (outputs,)
        shapes["edges"] = (features, model.boosting.bins - 1)
        shapes |= dict.fromkeys(("feature", "threshold", "value"), nodes)
    elif kind == "k_means":
        shapes["centers"] = (model.k_means.clusters, features)
        shapes["sizes"] = (model.k_means.clusters,)
    elif kind == "pca":
        shapes["mean"] = (features,)
        shapes["components"] = (model.pca.components, features)
        shapes["variances"] = (model.pca.components,)
    return shapes
