"""Reducers over ordered leaves, against plain formulas, and what must not change their bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.frames import BLOCK_ELEMENTS
from phalanx.reducers import Contribution, Reduced, build_reducer
from phalanx.reduction import reduce_leaves
from phalanx.v1.job_spec_pb2 import Krum, Median, Reduction, Train, TrimmedMean

SHARDS = 7
RULES = {
    "median": Reduction(median=Median()),
    "trimmed": Reduction(trimmed_mean=TrimmedMean(trim=2)),
    "krum": Reduction(krum=Krum(faulty=2, keep=1)),
    "multi-krum": Reduction(krum=Krum(faulty=2, keep=4)),
    "clip": Reduction(clip_norm=3.0),
    "clipped median": Reduction(median=Median(), clip_norm=3.0),
}


def sums(elements: int, seed: int = 0, dtype: str = "float32") -> dict[int, Any]:
    rng = np.random.default_rng(seed)
    return {shard: rng.standard_normal(elements).astype(dtype) * 8 for shard in range(SHARDS)}


def reduce(
    rule: Reduction, vectors: dict[int, Any], counts: Sequence[int] = (4,) * SHARDS, cut: int = 0
) -> Reduced | None:
    reducer = build_reducer(Train(reduction=rule), SHARDS)
    assert reducer is not None
    contributions = {}
    for shard, vector in vectors.items():
        cut = cut or len(vector)
        pieces = [vector[first : first + cut] for first in range(0, len(vector), cut)]
        contributions[shard] = Contribution(pieces, counts[shard])
    return reducer.reduce(contributions)


def gradient(reduced: Reduced | None) -> Any:
    assert reduced is not None
    return np.concatenate(reduced.pieces) / reduced.divisor


def means(vectors: dict[int, Any], counts: Sequence[int] = (4,) * SHARDS) -> Any:
    return np.stack([vectors[shard] / counts[shard] for shard in sorted(vectors)])


def test_median_and_trimmed_mean_are_those_of_each_element() -> None:
    counts = [4, 4, 3, 4, 4, 4, 1]
    vectors = sums(1000, dtype="float64")
    rows = means(vectors, counts)
    np.testing.assert_allclose(
        gradient(reduce(RULES["median"], vectors, counts)), np.median(rows, axis=0), rtol=1e-15
    )
    np.testing.assert_allclose(
        gradient(reduce(RULES["trimmed"], vectors, counts)),
        scipy.stats.trim_mean(rows, 2 / SHARDS, axis=0),
        rtol=1e-13,
        atol=1e-15,
    )
    even = {shard: vectors[shard] for shard in range(6)}
    np.testing.assert_allclose(
        gradient(reduce(RULES["median"], even, counts)), np.median(rows[:6], axis=0), rtol=1e-15
    )


def naive_krum(rows: Any, faulty: int, keep: int) -> list[int]:
    scores = []
    for one in range(len(rows)):
        others = [float(((rows[one] - rows[k]) ** 2).sum()) for k in range(len(rows)) if k != one]
        scores.append(sum(sorted(others)[: len(rows) - faulty - 2]))
    return sorted(np.argsort(scores, kind="stable")[:keep])


@pytest.mark.parametrize("keep", [1, 4])
def test_krum_keeps_those_with_the_nearest_neighbours(keep: int) -> None:
    for seed in range(20):
        vectors = sums(50, seed, "float64")
        rows = means(vectors)
        chosen = naive_krum(rows, 2, keep)
        found = gradient(reduce(RULES["krum" if keep == 1 else "multi-krum"], vectors))
        np.testing.assert_allclose(found, rows[chosen].mean(axis=0), rtol=1e-13, atol=1e-15)


def test_of_equal_scores_krum_takes_the_lowest_shard() -> None:
    vectors = {shard: np.full(3, 4.0 * (shard % 2)) for shard in range(SHARDS)}
    vectors[1] = vectors[0]
    assert gradient(reduce(RULES["krum"], vectors)).tolist() == [0.0] * 3
    same = {shard: np.array([1.0, 2.0]) for shard in range(SHARDS)}
    assert gradient(reduce(RULES["krum"], same)).tolist() == [0.25, 0.5]


def test_the_clip_shortens_what_is_too_long_and_nothing_else() -> None:
    vectors = sums(100, dtype="float64")
    vectors[3] *= 100
    counts = [4, 2, 4, 4, 4, 4, 4]
    rows = means(vectors, counts)
    norms = np.linalg.norm(rows, axis=1)
    limit = float(np.median(norms))
    clipped = rows * np.minimum(1, limit / norms)[:, None]
    expected = np.average(clipped, axis=0, weights=counts)
    found = gradient(reduce(Reduction(clip_norm=limit), vectors, counts))
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)


def test_a_clip_that_nothing_exceeds_leaves_the_bits_of_the_plain_mean() -> None:
    vectors = sums(1000)
    reduced = reduce(Reduction(clip_norm=1e6), vectors)
    assert reduced is not None
    total = reduce_leaves(vectors, SHARDS)
    assert total is not None
    assert reduced.pieces[0].tobytes() == total.tobytes()
    assert reduced.divisor == 4 * SHARDS


@given(
    seed=st.integers(0, 2**16),
    rule=st.sampled_from(sorted(RULES)),
    dtype=st.sampled_from(["float32", "float64"]),
    tail=st.integers(1, 500),
)
@settings(max_examples=12, deadline=None)
def test_how_the_vector_is_cut_into_frames_does_not_change_a_bit(
    seed: int, rule: str, dtype: str, tail: int
) -> None:
    vectors = sums(2 * BLOCK_ELEMENTS + tail, seed, dtype)
    before = {shard: vector.copy() for shard, vector in vectors.items()}
    whole = reduce(RULES[rule], vectors)
    cut = reduce(RULES[rule], vectors, cut=BLOCK_ELEMENTS)
    backwards = reduce(RULES[rule], dict(reversed(vectors.items())))
    assert gradient(whole).tobytes() == gradient(cut).tobytes() == gradient(backwards).tobytes()
    assert gradient(whole).dtype == dtype
    assert all((vectors[shard] == before[shard]).all() for shard in vectors), "only read"


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_left_out_and_counts_as_faulty(rule: str, bad: float) -> None:
    vectors = sums(20, dtype="float64")
    vectors[1][7] = vectors[4][0] = bad
    found = gradient(reduce(RULES[rule], vectors))
    assert np.isfinite(found).all()
    kept = {shard: vector for shard, vector in vectors.items() if shard not in (1, 4)}
    rows = means(kept)
    if rule == "trimmed":
        np.testing.assert_allclose(found, rows.mean(axis=0), rtol=1e-13)
    elif rule == "krum":
        np.testing.assert_allclose(found, rows[naive_krum(rows, 0, 1)].mean(axis=0), rtol=1e-13)


def test_too_few_contributions_give_nothing() -> None:
    vectors = sums(5)
    four = {shard: vectors[shard] for shard in range(4)}
    six = {shard: vectors[shard] for shard in range(6)}
    assert reduce(RULES["trimmed"], four) is None
    assert reduce(RULES["krum"], six) is None
    assert reduce(RULES["median"], {}) is None
    assert reduce(RULES["clip"], {2: np.full(3, np.inf)}) is None


def test_the_mean_needs_no_such_rule() -> None:
    assert build_reducer(Train(reduction=Reduction()), SHARDS) is None


def test_huge_but_finite_lies_do_not_win() -> None:
    """Their distances overflow, which must not make them look near."""
    vectors = sums(10, dtype="float64")
    vectors[0] = np.full(10, 1e300)
    vectors[1] = np.full(10, -1e300)
    for rule in ("krum", "multi-krum", "median", "trimmed", "clip"):
        assert np.abs(gradient(reduce(RULES[rule], vectors))).max() < 50, rule
