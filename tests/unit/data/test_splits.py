"""Rows are dealt to splits by their number alone, in exact shares."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.data.splits import (
    BLOCK_ROWS,
    TEST,
    TRAIN,
    VALIDATION,
    Splitter,
    deal,
    ranges_of,
)
from phalanx.testing.properties import examples


@dataclass(frozen=True)
class Batch:
    rows: int


fractions = st.floats(0.0, 0.45)


@examples(60)
@given(rows=st.integers(0, 3500), test=fractions, validation=fractions)
def test_the_shares_are_exact_for_any_number_of_rows(
    rows: int, test: float, validation: float
) -> None:
    codes = Splitter(3, test, validation).codes(0, rows, rows)
    held_out = int(np.floor((test + validation) * rows + 0.5))
    assert np.count_nonzero(codes == TEST) == int(np.floor(test * rows + 0.5))
    # Two roundings may differ from one by a row in each block.
    validated = np.count_nonzero(codes == VALIDATION)
    assert abs(validated + np.count_nonzero(codes == TEST) - held_out) <= rows // BLOCK_ROWS + 1


@examples(60)
@given(
    sizes=st.lists(st.integers(1, 900), max_size=12),
    other=st.lists(st.integers(1, 2500), max_size=12),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_split_of_a_row_does_not_depend_on_how_rows_are_batched(
    sizes: list[int], other: list[int], seed: int
) -> None:
    rows = min(sum(sizes), sum(other))
    splitter = Splitter(seed, 0.2, 0.1)

    def dealt(batches: list[int]) -> list[int]:
        cut, total = [], 0
        for size in batches:
            take = min(size, rows - total)
            total += take
            if take:
                cut.append(Batch(take))
        return [int(code) for _, codes in deal(cut, splitter) for code in codes]

    expected = splitter.codes(0, rows, rows).tolist()
    assert dealt(sizes) == dealt(other) == expected


def test_a_batch_is_passed_on_as_soon_as_its_blocks_are_full() -> None:
    read = []

    def batches():  # type: ignore[no-untyped-def]
        for number in range(10):
            read.append(number)
            yield Batch(BLOCK_ROWS)

    rows = deal(batches(), Splitter(0, 0.5))
    next(rows)
    assert read == [0]


def test_the_seed_chooses_other_rows() -> None:
    first, second = (Splitter(seed, 0.3).codes(0, 1000, 1000) for seed in (1, 2))
    assert (first != second).any()
    assert np.count_nonzero(first == TEST) == np.count_nonzero(second == TEST) == 300


def test_the_choice_is_pinned() -> None:
    """Data sets that people added must come out the same in every later version."""
    codes = Splitter(0, 0.2, 0.1).codes(0, 20, 20)
    assert np.flatnonzero(codes == TEST).tolist() == [8, 13, 16, 17]
    assert np.flatnonzero(codes == VALIDATION).tolist() == [3, 15]
    assert np.count_nonzero(codes == TRAIN) == 14


@pytest.mark.parametrize("position", ["first", "second"])
def test_held_out_rows_are_spread_evenly(position: str) -> None:
    codes = Splitter(7, 0.1).codes(0, 100_000, 100_000)
    half = codes[:50_000] if position == "first" else codes[50_000:]
    assert np.count_nonzero(half == TEST) == 5000
    # A run of held-out rows that a sorted file would turn into a class has no place to hide.
    assert max(map(len, "".join(map(str, half)).split("0"))) < 10


def test_where_the_rows_of_a_split_lie() -> None:
    assert ranges_of(Splitter(7), TRAIN, 10, [4, 6]) == ((0, 4), (4, 10))
    splitter, rows = Splitter(3, test=0.2, validation=0.1), 300_417
    codes = splitter.codes(0, rows, rows)
    for code in (TRAIN, VALIDATION, TEST):
        places = np.flatnonzero(codes == code)
        counts = [1, 2, 2999, len(places) - 3003, 1]
        found = ranges_of(splitter, code, rows, counts)
        assert sum(counts) == len(places)
        first = 0
        for (begin, end), count in zip(found, counts, strict=True):
            assert (
                np.flatnonzero(codes[begin:end] == code).tolist()
                == (places[first : first + count] - begin).tolist()
            )
            assert (codes[begin], codes[end - 1]) == (code, code)
            first += count
