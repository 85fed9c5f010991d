"""Metrics out of sums, and which points of a curve are kept."""

import numpy as np
import pytest

from phalanx.training.metrics import (
    CLASSIFICATION_SUMS,
    POINTS_MAX,
    REGRESSION_SUMS,
    direction,
    keeps_point,
    metrics_from_sums,
)


def test_classification_metrics() -> None:
    metrics = metrics_from_sums("test", CLASSIFICATION_SUMS, [50.0, 30], 40)
    assert metrics == {"test/loss": 1.25, "test/accuracy": 0.75}


def test_regression_metrics_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    rng = np.random.default_rng(0)
    actual = rng.normal(3, 2, 200)
    predicted = actual + rng.normal(size=200)
    error = predicted - actual
    sums = [0.5 * (error**2).sum(), (error**2).sum(), np.abs(error).sum()]
    metrics = metrics_from_sums(
        "validation", REGRESSION_SUMS, [*sums, actual.sum(), (actual**2).sum()], 200
    )
    assert metrics == {
        "validation/loss": pytest.approx(0.5 * (error**2).mean()),
        "validation/rmse": pytest.approx(root_mean_squared_error(actual, predicted)),
        "validation/mae": pytest.approx(mean_absolute_error(actual, predicted)),
        "validation/r2": pytest.approx(r2_score(actual, predicted)),
    }


def test_constant_targets_have_no_variance_to_explain() -> None:
    assert metrics_from_sums("test", REGRESSION_SUMS, [1, 2, 2, 8, 32], 2)["test/r2"] == 0


@pytest.mark.parametrize("target", [0.1, 1 / 3, 0.7, 12345.678, 3.3e9 + 0.1, -1e-7])
@pytest.mark.parametrize("rows", [3, 90, 10_000, 1_000_000])
def test_neither_have_those_whose_sums_were_rounded(target: float, rows: int) -> None:
    actual = np.full(rows, target)
    sums = [rows * 0.5, rows, rows, float(actual.sum()), float(np.dot(actual, actual))]
    assert metrics_from_sums("test", REGRESSION_SUMS, sums, rows)["test/r2"] == 0


def test_numbers_far_from_zero_vary_nevertheless() -> None:
    actual = 1e6 + np.random.default_rng(0).normal(size=10_000)
    sums = [0.5, 1.0, 1.0, float(actual.sum()), float(np.dot(actual, actual))]
    metrics = metrics_from_sums("test", REGRESSION_SUMS, sums, len(actual))
    assert metrics["test/r2"] == pytest.approx(1 - 1 / np.var(actual) / len(actual), abs=1e-5)


def test_sums_of_a_users_own_are_means_under_their_name() -> None:
    assert metrics_from_sums("test", ("perplexity",), [30.0], 10) == {"test/perplexity": 3.0}


def test_without_rows_there_is_no_metric() -> None:
    assert metrics_from_sums("test", CLASSIFICATION_SUMS, [0, 0], 0) == {}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("train/loss", -1), ("test/rmse", -1), ("test/accuracy", 1), ("v/r2", 1), ("v/widgets", 0)],
)
def test_what_is_better_is_told_by_the_name(metric: str, expected: int) -> None:
    assert direction(metric) == expected


@pytest.mark.parametrize("total", [1, 999, POINTS_MAX, POINTS_MAX + 1, 123_456, 3_000_000])
def test_a_curve_of_known_length_has_enough_and_not_too_many_points(total: int) -> None:
    kept = [n for n in range(1, total + 1) if keeps_point(n, total)]
    assert len(kept) <= POINTS_MAX
    assert len(kept) >= min(total, POINTS_MAX // 2)
    assert len(set(np.diff(kept))) <= 1


def test_a_curve_without_end_grows_slowly() -> None:
    kept = sum(keeps_point(n) for n in range(1, 300_000))
    assert kept <= 1.2 * POINTS_MAX
    assert all(keeps_point(n) for n in range(1, POINTS_MAX // 6))
