"""Every row is used once per epoch, in another order each time, out of few chunks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import InvalidArgument
from phalanx.training import sampler
from phalanx.training.sampler import (
    RowSelection,
    chunks_for_leaf,
    chunks_in_order,
    rows_for_leaf,
    rows_in_order,
    shard_rows,
)

chunkings = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def flat(selections: list[RowSelection], chunk_rows: list[int]) -> list[int]:
    """Row numbers within the split."""
    starts = np.cumsum([0, *chunk_rows])
    return [int(starts[s.chunk_index] + row) for s in selections for row in s.rows]


def steps(rows: int, rows_per_leaf: int) -> int:
    return max(1, -(-rows // rows_per_leaf))


@given(chunk_rows=chunkings, data=st.data())
def test_shards_are_contiguous_and_make_up_the_split(
    chunk_rows: list[int], data: st.DataObject
) -> None:
    shards = data.draw(st.integers(1, sum(chunk_rows)))
    parts = [shard_rows(shard, shards, chunk_rows) for shard in range(shards)]
    assert parts[0].first == 0
    assert parts[-1].stop == sum(chunk_rows)
    assert all(a.stop == b.first for a, b in itertools.pairwise(parts))
    sizes = {part.stop - part.first for part in parts}
    assert max(sizes) - min(sizes) <= 1


@given(chunk_rows=chunkings, rows_per_leaf=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_epoch_uses_every_row_once(
    chunk_rows: list[int], rows_per_leaf: int, data: st.DataObject
) -> None:
    rows = sum(chunk_rows)
    shards = data.draw(st.integers(1, min(rows, 5)))
    seen: list[int] = []
    largest = -(-rows // shards)
    for shard in range(shards):
        part = shard_rows(shard, shards, chunk_rows)
        counts = []
        for step in range(steps(largest, rows_per_leaf)):
            leaf = flat(rows_for_leaf(part, 3, 1, step, rows_per_leaf), chunk_rows)
            assert all(part.first <= row < part.stop for row in leaf)
            counts.append(len(leaf))
            seen += leaf
        # Short and empty leaves come last.
        assert counts == sorted(counts, reverse=True)
        assert set(counts[: (part.stop - part.first) // rows_per_leaf]) <= {rows_per_leaf}
    assert sorted(seen) == list(range(rows))


def test_no_leaf_reaches_into_the_next_epoch() -> None:
    part = shard_rows(0, 1, [10])
    assert sum(len(s.rows) for s in rows_for_leaf(part, 0, 0, 3, 3)) == 1
    assert rows_for_leaf(part, 0, 0, 4, 3) == []


def test_the_order_depends_on_seed_epoch_and_shard_alone() -> None:
    chunk_rows = [500, 500]

    def order(seed: int, epoch: int, shard: int = 0) -> list[int]:
        part = shard_rows(shard, 2, chunk_rows)
        leaves = [flat(rows_for_leaf(part, seed, epoch, s, 50), chunk_rows) for s in range(10)]
        return [row - part.first for leaf in leaves for row in leaf]

    assert order(1, 0) == order(1, 0)
    different = [order(1, 0), order(2, 0), order(1, 1), order(1, 0, shard=1), order(-1, 0)]
    assert len({tuple(each) for each in different}) == len(different)


def test_answers_do_not_depend_on_what_was_asked_before() -> None:
    part = shard_rows(1, 3, [700, 800, 900])
    forward = [flat(rows_for_leaf(part, 5, 2, s, 64), [700, 800, 900]) for s in range(12)]
    for cache in (sampler._windows, sampler._row_order, sampler._shard_rows):
        cache.cache_clear()
    again = shard_rows(1, 3, (700, 800, 900))
    backward = [flat(rows_for_leaf(again, 5, 2, s, 64), [700, 800, 900]) for s in range(11, -1, -1)]
    assert forward == backward[::-1]


def test_rows_are_mixed_across_the_pieces_of_a_window_and_across_windows() -> None:
    rows = 16 * sampler.PIECE_ROWS
    part = shard_rows(0, 1, [rows])
    leaf = flat(rows_for_leaf(part, 0, 0, 0, 256), [rows])
    pieces = Counter(row // sampler.PIECE_ROWS for row in leaf)
    assert len(pieces) == sampler.WINDOW_PIECES
    assert min(pieces.values()) > 256 / sampler.WINDOW_PIECES / 2
    other = flat(rows_for_leaf(part, 0, 1, 0, 256), [rows])
    assert {row // sampler.PIECE_ROWS for row in other} != set(pieces)


def test_a_leaf_reads_few_chunks_however_many_there_are() -> None:
    chunk_rows = [3000] * 200
    part = shard_rows(0, 1, chunk_rows)
    most = 0
    for step in range(0, 2000, 37):
        selections = rows_for_leaf(part, 1, 0, step, 256)
        chunks = {selection.chunk_index for selection in selections}
        assert chunks <= set(chunks_for_leaf(part, 1, 0, step, 256))
        most = max(most, len(chunks_for_leaf(part, 1, 0, step, 256)))
    assert most <= 2 * sampler.WINDOW_PIECES


@given(chunk_rows=chunkings, rows_per_leaf=st.integers(1, 40), step=st.integers(0, 30))
def test_the_chunks_named_for_prefetching_hold_the_leaf(
    chunk_rows: list[int], rows_per_leaf: int, step: int
) -> None:
    part = shard_rows(0, 1, chunk_rows)
    selections = rows_for_leaf(part, 9, 4, step, rows_per_leaf)
    assert {s.chunk_index for s in selections} <= set(
        chunks_for_leaf(part, 9, 4, step, rows_per_leaf)
    )


@given(chunk_rows=chunkings)
def test_a_full_batch_reads_the_shard_in_stored_order(chunk_rows: list[int]) -> None:
    part = shard_rows(0, 1, chunk_rows)
    rows = sum(chunk_rows)
    for selections in (rows_for_leaf(part, 7, 3, 0, rows), rows_in_order(part)):
        assert flat(selections, chunk_rows) == list(range(rows))
    assert chunks_in_order(part) == list(range(len(chunk_rows)))
    assert chunks_for_leaf(part, 7, 3, 0, rows) == list(range(len(chunk_rows)))


def test_a_shard_that_does_not_exist() -> None:
    with pytest.raises(InvalidArgument, match="no shard 4 among 4"):
        shard_rows(4, 4, [10])
