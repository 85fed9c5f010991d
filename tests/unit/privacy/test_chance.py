"""Rows that enter steps by chance: each alone, with the probability that is accounted for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import InvalidArgument
from phalanx.training.chance import drawn_rows
from phalanx.training.sampler import rows_by_chance, shard_rows

KEY = bytes(range(16))


@given(st.integers(1, 400), st.floats(1e-3, 1.0), st.integers(0, 2**40), st.integers(0, 60_000))
@settings(max_examples=60)
def test_each_row_is_drawn_once_at_most_and_a_step_always_draws_the_same(
    rows: int, rate: float, step: int, shard: int
) -> None:
    drawn = drawn_rows(KEY, shard, rows, step, rate)
    assert (np.diff(drawn) > 0).all()
    assert drawn.size == 0 or 0 <= drawn[0] <= drawn[-1] < rows
    assert (drawn == drawn_rows(KEY, shard, rows, step, rate)).all()


@pytest.mark.parametrize("rate", [0.004, 0.1, 0.5, 0.93])
def test_every_row_comes_with_the_rate_and_independently_of_its_neighbour(rate: float) -> None:
    rows, steps = 50, 6000
    came = np.zeros((steps, rows), bool)
    for step in range(steps):
        came[step, drawn_rows(KEY, 3, rows, step, rate)] = True
    deviation = np.sqrt(rate * (1 - rate) / steps)
    assert np.abs(came.mean(axis=0) - rate).max() < 4.5 * deviation
    both = (came[:, 1:] & came[:, :-1]).mean(axis=0)
    assert np.abs(both - rate**2).max() < 4.5 * np.sqrt(rate**2 * (1 - rate**2) / steps)
    # The size of a batch varies as that of a binomial distribution does.
    assert came.sum(axis=1).var() == pytest.approx(rows * rate * (1 - rate), rel=0.1)


def test_shards_steps_and_keys_draw_by_themselves() -> None:
    draws = {
        tuple(drawn_rows(key, shard, 200, step, 0.3))
        for key in (KEY, bytes(16))
        for shard in (0, 1)
        for step in (0, 1)
    }
    assert len(draws) == 8


def test_a_full_batch_needs_no_key_and_anything_else_does() -> None:
    assert drawn_rows(b"", 0, 5, 1, 1.0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InvalidArgument):
        drawn_rows(b"", 0, 5, 1, 0.5)


def test_rows_of_a_shard_are_found_in_their_chunks() -> None:
    shard = shard_rows(1, 3, (10, 4, 40, 36))
    drawn = drawn_rows(KEY, 1, 30, 8, 0.4) + shard.first
    starts = np.array([0, 10, 14, 54])
    found = [starts[each.chunk_index] + each.rows for each in rows_by_chance(shard, KEY, 8, 0.4)]
    assert np.concatenate(found).tolist() == drawn.tolist()
