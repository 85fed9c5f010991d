"""Dual coordinate ascent of one shard: against plain loops, and the optimum of a small problem."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
from sklearn.svm import LinearSVC

from phalanx.blas import one_blas_thread
from phalanx.models.ascent import ascend

ROWS, FEATURES = 40, 7


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    features = rng.standard_normal((ROWS, FEATURES))
    features[rng.random(features.shape) < 0.5] = 0
    features[3] = 0
    signs = np.sign(features[:, 0] + 0.5 * rng.standard_normal(ROWS) + 1e-9)
    return features, signs


def orders(passes: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(ROWS) for _ in range(passes)]


def plainly(
    features: np.ndarray,
    signs: np.ndarray,
    duals: np.ndarray,
    weights: np.ndarray,
    curvature: float,
    passes: list[np.ndarray],
) -> np.ndarray:
    """Each variable by the maximum of its one-dimensional problem, found on a grid of its ends and
    its stationary point, with all sums anew."""
    alpha = duals.copy()
    for order in passes:
        for row in order:
            x, y = features[row], signs[row]
            moved = weights + curvature * features.T @ ((alpha - duals) * signs)
            candidates = [0.0, 1.0]
            if x @ x > 0:
                stationary = alpha[row] + (1 - y * x @ moved) / (curvature * x @ x)
                candidates += [stationary] if 0 < stationary < 1 else []
            changes = np.array(candidates) - alpha[row]
            gains = changes * (1 - y * x @ moved) - curvature / 2 * changes**2 * (x @ x)
            alpha[row] = candidates[int(gains.argmax())]
    return alpha


def dense(features: np.ndarray) -> np.ndarray:
    return features


@pytest.mark.parametrize("form", [dense, scipy.sparse.csr_array])
def test_each_row_goes_to_the_maximum_of_its_own_problem(
    problem: tuple[np.ndarray, np.ndarray], form: Callable[[np.ndarray], object]
) -> None:
    features, signs = problem
    rng = np.random.default_rng(2)
    duals, weights = rng.random(ROWS), 0.3 * rng.standard_normal(FEATURES)
    duals.flags.writeable = weights.flags.writeable = False
    passes = orders(3)
    found = ascend(form(features), signs, duals, weights, 0.4, passes)
    np.testing.assert_allclose(
        found, plainly(features, signs, duals, weights, 0.4, passes), rtol=0, atol=1e-12
    )
    assert found[3] == 1, "a row of zeros costs 1 whatever the weights are"
    assert 0 < np.count_nonzero((found > 0) & (found < 1)) < ROWS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_pass_and_both_types(problem: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
    features, signs = (each.astype(dtype) for each in problem)
    duals, weights = np.full(ROWS, 0.25, dtype), np.zeros(FEATURES, dtype)
    assert ascend(features, signs, duals, weights, 1.0, []).tolist() == [0.25] * ROWS
    for form in (dense, scipy.sparse.csr_array):
        found = ascend(form(features), signs, duals, weights, 0.4, orders(2))
        expected = plainly(*problem, np.full(ROWS, 0.25), np.zeros(FEATURES), 0.4, orders(2))
        np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == "float32" else 1e-12)


def test_one_shard_alone_finds_the_optimum_of_liblinear(
    problem: tuple[np.ndarray, np.ndarray],
) -> None:
    features, signs = problem
    l2 = 0.05
    found = ascend(
        features, signs, np.zeros(ROWS), np.zeros(FEATURES), 1 / (l2 * ROWS), orders(2000)
    )
    w = features.T @ (signs * found) / (l2 * ROWS)
    primal = np.maximum(0, 1 - signs * (features @ w)).mean() + l2 / 2 * w @ w
    dual = found.mean() - l2 / 2 * w @ w
    assert -1e-12 < primal - dual < 1e-9
    solver = LinearSVC(
        loss="hinge", C=1 / (l2 * ROWS), fit_intercept=False, tol=1e-10, max_iter=1_000_000
    )
    with one_blas_thread():
        best = solver.fit(features, signs).coef_.ravel()
    np.testing.assert_allclose(w, best, atol=1e-4)
