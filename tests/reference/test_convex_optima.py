"""Optima and trajectories of convex problems, against scikit-learn and plain NumPy."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from scipy.special import log1p, logsumexp
from sklearn.datasets import load_svmlight_file
from sklearn.linear_model import LogisticRegression, Ridge

from phalanx.blas import one_blas_thread
from phalanx.testing.datasets import StoredDataset, digits, regression, shared_data, store
from phalanx.testing.plans import plan_for
from phalanx.training.local import Progress, TrainedModel, train_in_process

LAMBDA = 1e-4


@dataclass(frozen=True)
class A9a:
    """Adult in LIBSVM form: 32,561 rows, 123 features, about 14 of them set."""

    features: scipy.sparse.csr_array
    targets: np.ndarray
    stored: StoredDataset

    def objective(self, w: np.ndarray) -> float:
        """Mean logistic loss + λ/2‖w‖², written apart from the code under test."""
        margins = (2 * self.targets - 1) * (self.features @ w)
        losses = np.maximum(-margins, 0) + log1p(np.exp(-np.abs(margins)))
        return float(losses.mean() + LAMBDA / 2 * w @ w)

    def gradient(self, w: np.ndarray) -> np.ndarray:
        signs = 2 * self.targets - 1
        slopes = -signs / (1 + np.exp(signs * (self.features @ w)))
        result: np.ndarray = self.features.T @ slopes / len(signs) + LAMBDA * w
        return result

    @cached_property
    def optimum(self) -> float:
        """The lowest value of the objective, found by scikit-learn."""
        rows = len(self.targets)
        solver = LogisticRegression(
            C=1 / (rows * LAMBDA), fit_intercept=False, tol=1e-12, max_iter=1000, solver="newton-cg"
        )
        with one_blas_thread():
            return self.objective(solver.fit(self.features, self.targets).coef_[0])

    @property
    def smoothness(self) -> float:
        """L, the largest curvature of the objective: λ_max(XᵀX) / 4n + λ."""
        gram = (self.features.T @ self.features).toarray()
        return float(np.linalg.eigvalsh(gram)[-1] / (4 * len(self.targets)) + LAMBDA)


@pytest.fixture(scope="module")
def a9a(tmp_path_factory: pytest.TempPathFactory) -> A9a:
    path = shared_data("a9a") / "a9a"
    rows, labels = load_svmlight_file(str(path), n_features=123)
    features = scipy.sparse.csr_array(rows)
    targets = (labels > 0).astype(np.int64)
    stored = store(tmp_path_factory.mktemp("a9a"), features, targets, dtype="float64")
    return A9a(features, targets, stored)


def logistic_plan(a9a: A9a, sgd: dict[str, Any], steps: int, shards: int = 16) -> Any:
    return plan_for(
        a9a.stored,
        {
            "model": {"logistic_regression": {"bias": False}},
            "optimizer": {"sgd": sgd},
            "stop": {"steps": steps},
            "l2": LAMBDA,
            "dtype": "float64",
        },
        data={"name": "data", "shards": shards},
    )


def train(stored: StoredDataset, plan: Any, **options: Any) -> TrainedModel:
    return train_in_process(plan, stored.manifest, stored.fetch, **options)


def nesterov(smoothness: float, convexity: float) -> dict[str, Any]:
    """The constants for a smooth and strongly convex function (Nesterov 2004, section 2.2.1)."""
    root = np.sqrt(convexity / smoothness)
    momentum = float((1 - root) / (1 + root))
    return {"learning_rate": 1 / smoothness, "momentum": momentum, "nesterov": True}


def test_logistic_regression_reaches_the_optimum_of_scikit_learn(a9a: A9a) -> None:
    best = a9a.optimum
    plan = logistic_plan(a9a, nesterov(a9a.smoothness, LAMBDA), steps=700, shards=4)
    found = a9a.objective(train(a9a.stored, plan).parameters)
    assert best - 1e-9 < found < best + 1e-6


def test_gradient_descent_follows_the_trajectory_of_numpy(a9a: A9a) -> None:
    rate, steps = 1 / a9a.smoothness, 60
    plan = logistic_plan(a9a, {"learning_rate": rate}, steps)
    losses: list[float] = []

    def note(progress: Progress) -> None:
        losses.append(progress.metrics["train/loss"])

    found = train(a9a.stored, plan, on_progress=note).parameters
    w, expected = np.zeros(123), []
    for _ in range(steps):
        expected.append(a9a.objective(w) - LAMBDA / 2 * w @ w)
        w = w - rate * a9a.gradient(w)
    # The loss of a step is that of the version it started from, and holds no penalty.
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(found, w, rtol=0, atol=1e-12)
    assert all(a > b for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("shards", [1, 3, 64])
def test_the_number_of_shards_moves_only_the_last_digits(a9a: A9a, shards: int) -> None:
    sgd = {"learning_rate": 1 / a9a.smoothness}
    found = train(a9a.stored, logistic_plan(a9a, sgd, 20, shards)).parameters
    expected = train(a9a.stored, logistic_plan(a9a, sgd, 20, 16)).parameters
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def softmax_objective(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    scores = x @ w
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    return float(losses.mean() + 1e-3 / 2 * (w**2).sum())


def test_softmax_regression_on_the_digits(tmp_path: Path) -> None:
    features, targets = digits()
    x = features.astype(np.float64) / 16
    order = np.random.default_rng(1234).permutation(len(x))
    fit, held_out = order[:1437], order[1437:]
    solver = LogisticRegression(
        C=1 / 1.437, fit_intercept=False, tol=1e-9, solver="newton-cholesky"
    )
    with one_blas_thread():
        solver.fit(x[fit], targets[fit])
    best = softmax_objective(x[fit], targets[fit], solver.coef_.T)

    stored = store(tmp_path, x[fit], targets[fit], dtype="float64", chunk_bytes=65536)
    largest = float(np.linalg.eigvalsh(x[fit].T @ x[fit])[-1])
    plan = plan_for(
        stored,
        {
            "model": {"softmax_regression": {"bias": False}, "standardise": False},
            "optimizer": {"sgd": nesterov(largest / (2 * 1437) + 1e-3, 1e-3)},
            "stop": {"steps": 600},
            "l2": 1e-3,
            "dtype": "float64",
        },
        data={"name": "data", "shards": 5},
    )
    w = train(stored, plan).parameters.reshape(64, 10)
    assert best - 1e-9 < softmax_objective(x[fit], targets[fit], w) < best + 1e-6
    predicted = (x[held_out] @ w).argmax(axis=1)
    np.testing.assert_array_equal(predicted, solver.predict(x[held_out]))
    assert (predicted == targets[held_out]).mean() > 0.95


def test_ridge_regression_has_a_closed_form(tmp_path: Path) -> None:
    features, targets = regression(500, 6, noise=0.5)
    x = features.astype(np.float64)
    stored = store(tmp_path, x, targets, dtype="float64")
    ridge = Ridge(alpha=500 * 0.01, tol=1e-14).fit(x, targets)
    plan = plan_for(
        stored,
        {
            "model": {"linear_regression": {}, "standardise": False},
            "optimizer": {"sgd": {"learning_rate": 0.5}},
            "stop": {"steps": 200},
            "l2": 0.01,
            "dtype": "float64",
        },
    )
    parameters = train(stored, plan).parameters
    np.testing.assert_allclose(parameters[:6], ridge.coef_, atol=1e-10)
    np.testing.assert_allclose(parameters[6], ridge.intercept_, atol=1e-10)


@pytest.fixture(scope="module")
def shuffled_a9a(a9a: A9a, tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    order = np.random.default_rng(1234).permutation(len(a9a.targets))
    folder = tmp_path_factory.mktemp("shuffled-a9a")
    return store(folder, a9a.features[order], a9a.targets[order], dtype="float64")


@pytest.mark.soak
@pytest.mark.parametrize("steps", [1, 16, 256])
def test_local_steps_come_as_near_to_the_optimum_with_a_part_of_the_traffic(
    a9a: A9a, shuffled_a9a: StoredDataset, steps: int
) -> None:
    """Stich 2018: eight shards, 32 rows a step, ten passes, a rate that falls to an eleventh."""
    own_steps = 10 * 128
    plan = plan_for(
        shuffled_a9a,
        {
            "model": {"logistic_regression": {"bias": False}},
            "optimizer": {
                "sgd": {"learning_rate": 1.0},
                "schedule": {"inverse_time": {"decay": 10 / own_steps}},
            },
            "local": {"steps": steps},
            "batch_size": 8 * 32,
            "stop": {"steps": own_steps // steps},
            "l2": LAMBDA,
            "dtype": "float64",
        },
        data={"name": "data", "shards": 8},
    )
    assert plan.steps_per_epoch == 128
    trained = train(shuffled_a9a, plan)
    assert trained.steps == own_steps // steps, "one vector up and down for so many steps"
    assert a9a.objective(trained.parameters) - a9a.optimum <= 3e-3
