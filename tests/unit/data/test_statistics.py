"""Statistics against NumPy, and their independence of how rows arrive."""

import itertools

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from phalanx.data.manifest import Statistics
from phalanx.data.statistics import (
    FEATURE_LIMIT,
    CsrStatistics,
    DenseStatistics,
    accumulator,
    mean_and_scale,
    standardise,
)
from phalanx.testing.properties import examples


def numbers(rows: int, features: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, features)) * 3 + 1000).astype(np.float32)


def test_dense_statistics_are_numpys() -> None:
    rows = numbers(9001, 3)
    accumulated = DenseStatistics(3)
    accumulated.add(rows)
    result = accumulated.result()
    exact = rows.astype(np.float64)
    assert result.count == 9001
    np.testing.assert_allclose(result.mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(result.std, exact.std(axis=0), rtol=1e-11)
    assert result.minimum == tuple(exact.min(axis=0))
    assert result.maximum == tuple(exact.max(axis=0))


@examples(25)
@given(cuts=st.lists(st.integers(0, 5000), max_size=6))
def test_statistics_do_not_depend_on_how_rows_are_batched(cuts: list[int]) -> None:
    rows = numbers(5000, 2, seed=1)
    rows[rows < 998] = 0
    bounds = [0, *sorted(cuts), 5000]
    dense, sparse = DenseStatistics(2), CsrStatistics(2)
    for first, stop in itertools.pairwise(bounds):
        dense.add(rows[first:stop])
        sparse.add(scipy.sparse.csr_array(rows[first:stop]))
    whole_dense, whole_sparse = DenseStatistics(2), CsrStatistics(2)
    whole_dense.add(rows)
    whole_sparse.add(scipy.sparse.csr_array(rows))
    assert dense.result() == whole_dense.result()
    assert sparse.result() == whole_sparse.result()


def test_sparse_statistics_count_what_is_not_stored_as_zero() -> None:
    rows = np.array([[0, 2, 5], [0, 0, 7], [0, -2, 6]], dtype=np.float64)
    accumulated = CsrStatistics(3)
    accumulated.add(scipy.sparse.csr_array(rows))
    result = accumulated.result()
    np.testing.assert_allclose(result.mean, rows.mean(axis=0))
    np.testing.assert_allclose(result.std, rows.std(axis=0))
    assert result.minimum == (0, -2, 5)
    assert result.maximum == (0, 2, 7)


@pytest.mark.parametrize("value", [0.1, -1e6 / 3, -0.0])
def test_nothing_is_left_of_a_constant_feature_and_it_is_not_blown_up(value: float) -> None:
    rows = np.full((7000, 1), value)
    rows[::2] += 0.0  # zeros of either sign are one number
    for each, batch in (
        (DenseStatistics(1), rows),
        (CsrStatistics(1), scipy.sparse.csr_array(rows)),
    ):
        each.add(batch)
        statistics = each.result()
        assert (statistics.mean, statistics.std) == ((value,), (0.0,))
        assert str(statistics.mean[0]) == str(value + 0.0)
        _, scale = mean_and_scale(statistics, np.float32)
        assert scale.tolist() == [1.0]


def test_standardised_features_have_mean_0_and_deviation_1() -> None:
    rows = numbers(5000, 4, seed=2).astype(np.float64)
    accumulated = DenseStatistics(4)
    accumulated.add(rows)
    mean, scale = mean_and_scale(accumulated.result(), np.float64)
    standardise(rows, mean, scale)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(rows.std(axis=0), 1, rtol=1e-9)


def test_sparse_rows_are_scaled_and_stay_sparse() -> None:
    rows = scipy.sparse.csr_array(np.array([[0.0, 4.0], [2.0, 0.0]]))
    standardise(rows, np.array([1.0, 1.0]), np.array([0.5, 0.25]))
    assert rows.toarray().tolist() == [[0, 1], [1, 0]]


def test_no_rows_and_too_many_features_have_statistics_too() -> None:
    assert DenseStatistics(2).result() == Statistics(0, *((0.0, 0.0),) * 4)
    wide = accumulator(FEATURE_LIMIT + 1, sparse=True)
    wide.add(scipy.sparse.csr_array((3, FEATURE_LIMIT + 1)))
    assert wide.result() == Statistics(3)
