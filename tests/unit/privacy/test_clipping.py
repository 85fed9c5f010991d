"""Gradients of single rows, shortened: against a loop over the rows."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from phalanx.models import DataSchema, Model, build_model
from phalanx.models.base import Batch
from phalanx.models.clipping import clipped_gradient
from phalanx.v1.job_spec_pb2 import JobSpec

ROWS, FEATURES, CLASSES = 37, 6, 3

MODELS: dict[str, dict[str, Any]] = {
    "linear_regression": {"linear_regression": {"bias": True}},
    "logistic_regression": {"logistic_regression": {"bias": True}},
    "no_bias": {"logistic_regression": {"bias": False}},
    "softmax_regression": {"softmax_regression": {"bias": True}},
    "relu": {"mlp": {"hidden": [7, 5], "activation": "relu"}},
    "tanh": {"mlp": {"hidden": [4], "activation": "tanh"}},
    "regressing": {"mlp": {"hidden": [5], "activation": "sigmoid", "loss": "squared_error"}},
}


def case(kind: str, dtype: str, sparse: bool, weighted: bool) -> tuple[Model, Any, Batch]:
    draw = np.random.default_rng(4)
    regresses = kind in ("linear_regression", "regressing")
    classes = 0 if regresses else 2 if "logistic" in kind or kind == "no_bias" else CLASSES
    spec = JobSpec(train={"model": MODELS[kind], "dtype": dtype})
    model = build_model(spec, DataSchema(FEATURES, classes, dtype))
    features = draw.normal(size=(ROWS, FEATURES)) * draw.integers(0, 2, (ROWS, FEATURES))
    targets = draw.normal(size=ROWS) if regresses else draw.integers(0, classes, ROWS)
    weights = draw.uniform(0, 3, ROWS).astype(dtype) if weighted else None
    batch = Batch(
        scipy.sparse.csr_array(features.astype(dtype)) if sparse else features.astype(dtype),
        targets.astype(dtype) if regresses else targets,
        weights,
    )
    parameters = draw.normal(size=model.layout.element_count).astype(dtype)
    return model, parameters, batch


class Alone:
    """The same model, which does not know how to clip."""

    def __init__(self, model: Model) -> None:
        self.layout = model.layout
        self.gradient = model.gradient


def clipped(model: Any, parameters: Any, batch: Batch, norm: float) -> Any:
    out = np.full_like(parameters, np.nan)
    clipped_gradient(model, parameters, batch, norm, out)
    return out


def row_of(batch: Batch, row: int) -> Batch:
    weights = None if batch.weights is None else batch.weights[row : row + 1]
    return Batch(batch.features[row : row + 1], batch.targets[row : row + 1], weights)


def by_loop(model: Model, parameters: Any, batch: Batch, norm: float) -> Any:
    total = np.zeros(len(parameters))
    for row in range(batch.rows):
        gradient = np.empty_like(parameters)
        model.gradient(parameters, row_of(batch, row), gradient)
        length = np.linalg.norm(gradient.astype(np.float64))
        total += gradient.astype(np.float64) * min(1.0, norm / max(length, 1e-300))
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_sum_is_that_of_a_loop_over_the_rows(
    kind: str, dtype: str, sparse: bool, weighted: bool
) -> None:
    model, parameters, batch = case(kind, dtype, sparse, weighted)
    tolerance = 3e-6 if dtype == "float64" else 3e-5
    for norm in (1e-3, 0.7, 1e6):
        wanted = by_loop(model, parameters, batch, norm)
        for each in (model, Alone(model)):
            found = clipped(each, parameters, batch, norm)
            assert found.dtype == np.dtype(dtype)
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", MODELS)
def test_no_row_contributes_more_than_the_norm(kind: str, dtype: str) -> None:
    model, parameters, batch = case(kind, dtype, sparse=False, weighted=True)
    for row in range(ROWS):
        for each in (model, Alone(model)):
            for norm in (1e-4, 0.3):
                found = clipped(each, parameters * 5, row_of(batch, row), norm)
                assert np.linalg.norm(found.astype(np.float64)) <= norm


@pytest.mark.parametrize("kind", ["logistic_regression", "relu"])
def test_a_row_that_is_not_finite_counts_as_nothing(kind: str) -> None:
    for sparse in (False, True):
        model, parameters, batch = case(kind, "float32", sparse, weighted=False)
        features = batch.features.toarray() if sparse else batch.features.copy()
        features[5] = np.inf
        features[9, 2] = np.nan
        features[11] = 1e30  # finite, and its activations are not
        wide = scipy.sparse.csr_array(features) if sparse else features
        broken = dataclasses.replace(batch, features=wide)
        kept = [row for row in range(ROWS) if row not in (5, 9, 11)]
        rest = Batch(batch.features[kept], batch.targets[kept])
        with np.errstate(all="ignore"):
            for each in (model, Alone(model)):
                found = clipped(each, parameters * np.float32(1e10), broken, 0.5)
                wanted = by_loop(model, parameters * np.float32(1e10), rest, 0.5)
                extreme = by_loop(model, parameters * np.float32(1e10), row_of(broken, 11), 0.5)
                wanted = wanted + np.nan_to_num(extreme)
                assert np.isfinite(found).all()
                np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
