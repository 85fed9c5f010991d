"""Which rows a leaf reads: a pure function of (seed, shard, epoch, step).

A shard is a contiguous range of rows of its split. Each epoch its rows are read in another order:
the shard is cut into *pieces* of at most ``PIECE_ROWS`` rows of one chunk, the pieces are permuted,
and ``WINDOW_PIECES`` of them at a time form a *window* whose rows are permuted together. A leaf
reads consecutive rows of that order, so it touches a bounded number of chunks however large the
data set is, and whoever takes a shard over fetches only those.

Where rows are dealt out by class (``phalanx.training.classes``), a shard is a range of their even
order instead, and a piece is a stretch of it with its share of each class.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from phalanx.data.options import PIECE_ROWS
from phalanx.errors import InvalidArgument
from phalanx.streams import Stream, stream_generator
from phalanx.training.chance import drawn_rows
from phalanx.training.classes import ClassLayout, Part

WINDOW_PIECES = 4


@dataclass(frozen=True)
class RowSelection:
    """Some rows of one chunk of the split, in the order in which the leaf uses them.

    With a ``label``, ``rows`` count the rows of that class only.
    """

    chunk_index: int
    rows: NDArray[np.int64]
    label: int | None = None


@dataclass(frozen=True)
class ShardRows:
    """The rows [first, stop) of a split over its ordered chunks.

    ``chunk_rows`` are the row counts of all chunks of the split. With ``classes``, the rows are
    counted in its even order.
    """

    shard: int
    first: int
    stop: int
    chunk_rows: tuple[int, ...]
    classes: ClassLayout | None = None

    def __hash__(self) -> int:
        # Caches are keyed on this; hashing thousands of row counts at each leaf would show.
        return hash((self.shard, self.first, self.stop))


def shard_rows(
    shard: int, shards: int, chunk_rows: Sequence[int], classes: ClassLayout | None = None
) -> ShardRows:
    """Return shard ``shard`` of ``shards``: rows [i·n÷S, (i+1)·n÷S) of the split's n rows."""
    return _shard_rows(shard, shards, tuple(chunk_rows), classes)


def rows_for_leaf(
    shard: ShardRows, seed: int, epoch: int, step_in_epoch: int, rows_per_leaf: int
) -> list[RowSelection]:
    """Return the rows of one leaf in their final order; empty once the shard is exhausted.

    A leaf that takes the whole shard reads it in stored order: there is nothing to shuffle.
    """
    rows = shard.stop - shard.first
    start = step_in_epoch * rows_per_leaf
    stop = min(start + rows_per_leaf, rows)
    if start >= stop:
        return []
    if stop - start == rows:
        return rows_in_order(shard)
    selections: list[RowSelection] = []
    position = 0
    for number, window in enumerate(_windows(shard, seed, epoch)):
        count = sum(part.count for part in window)
        low, high = max(start - position, 0), min(stop - position, count)
        if low < high:
            order = _row_order(seed, shard.shard, epoch, number, count)
            selections += _select(window, order[low:high])
        position += count
        if position >= stop:
            break
    return selections


def rows_by_chance(shard: ShardRows, key: bytes, step: int, rate: float) -> list[RowSelection]:
    """Return the rows of one leaf where each row enters each step by itself, with one probability.

    Nothing depends on the epoch or on what other shards draw; see `phalanx.training.chance`.
    """
    drawn = drawn_rows(key, shard.shard, shard.stop - shard.first, step, rate)
    return _select(_all_parts(shard), drawn)


def rows_at(shard: ShardRows, positions: NDArray[np.int64]) -> list[RowSelection]:
    """Return some rows of a shard by their places in it, in its order."""
    return _select(_all_parts(shard), positions)


def rows_in_order(shard: ShardRows) -> list[RowSelection]:
    """Return all rows of a shard in stored order, as evaluation reads them."""
    return [
        RowSelection(part.chunk_index, np.arange(part.first, part.first + part.count), part.label)
        for part in _all_parts(shard)
    ]


def chunks_for_leaf(
    shard: ShardRows, seed: int, epoch: int, step_in_epoch: int, rows_per_leaf: int
) -> list[int]:
    """Return the indices of the chunks that ``rows_for_leaf`` may read, without its row work."""
    rows = shard.stop - shard.first
    start = step_in_epoch * rows_per_leaf
    stop = min(start + rows_per_leaf, rows)
    if start >= stop:
        return []
    if stop - start == rows:
        return chunks_in_order(shard)
    chunks: set[int] = set()
    position = 0
    for window in _windows(shard, seed, epoch):
        count = sum(part.count for part in window)
        if position < stop and position + count > start:
            chunks.update(part.chunk_index for part in window)
        position += count
    return sorted(chunks)


def window_rows(shard: ShardRows) -> int:
    """Return how many rows of a shard, at most, are shuffled together."""
    if shard.classes is not None:
        return WINDOW_PIECES * PIECE_ROWS
    return WINDOW_PIECES * min(PIECE_ROWS, max(shard.chunk_rows, default=0))


def chunks_in_order(shard: ShardRows) -> list[int]:
    """Return the indices of the chunks that hold a row of the shard."""
    return sorted({part.chunk_index for part in _all_parts(shard)})


@lru_cache(maxsize=1024)
def _shard_rows(
    shard: int, shards: int, chunk_rows: tuple[int, ...], classes: ClassLayout | None
) -> ShardRows:
    if not 0 <= shard < shards:
        raise InvalidArgument(f"there is no shard {shard} among {shards}")
    rows = sum(chunk_rows) if classes is None else classes.rows
    first, stop = shard * rows // shards, (shard + 1) * rows // shards
    return ShardRows(shard, first, stop, chunk_rows, classes)


def _select(window: Sequence[Part], order: NDArray[np.int64]) -> list[RowSelection]:
    """Turn positions within a window into rows of chunks.

    Rows are sorted: their order does not matter to a sum over a leaf, and reading each part once,
    front to back, is what disks, caches and vectorised takes like best.
    """
    positions = np.sort(order)
    starts = list(accumulate((part.count for part in window), initial=0))
    cuts = np.searchsorted(positions, starts).tolist()
    selections = []
    for index, part in enumerate(window):
        low, high = cuts[index], cuts[index + 1]
        if low < high:
            rows = positions[low:high] + (part.first - starts[index])
            selections.append(RowSelection(part.chunk_index, rows, part.label))
    return selections


@lru_cache(maxsize=256)
def _windows(shard: ShardRows, seed: int, epoch: int) -> tuple[tuple[Part, ...], ...]:
    pieces = _pieces(shard)
    order = _generator(seed, shard.shard, epoch, 0).permutation(len(pieces))
    shuffled = [pieces[index] for index in order]
    return tuple(
        tuple(part for piece in shuffled[first : first + WINDOW_PIECES] for part in piece)
        for first in range(0, len(shuffled), WINDOW_PIECES)
    )


@lru_cache(maxsize=256)
def _row_order(seed: int, shard: int, epoch: int, window: int, rows: int) -> NDArray[np.int64]:
    order: NDArray[np.int64] = _generator(seed, shard, epoch, window + 1).permutation(rows)
    return order


@lru_cache(maxsize=256)
def _pieces(shard: ShardRows) -> tuple[tuple[Part, ...], ...]:
    """Cut the shard's rows at chunk borders and every ``PIECE_ROWS`` rows."""
    if shard.classes is None:
        return tuple((part,) for part in _stored_parts(shard, PIECE_ROWS))
    firsts = range(shard.first, shard.stop, PIECE_ROWS)
    return tuple(
        shard.classes.parts(first, min(first + PIECE_ROWS, shard.stop)) for first in firsts
    )


@lru_cache(maxsize=256)
def _all_parts(shard: ShardRows) -> tuple[Part, ...]:
    if shard.classes is None:
        return _stored_parts(shard, max(1, shard.stop - shard.first))
    return shard.classes.parts(shard.first, shard.stop)


def _stored_parts(shard: ShardRows, most_rows: int) -> tuple[Part, ...]:
    ends = list(accumulate(shard.chunk_rows))
    parts = []
    row = shard.first
    while row < shard.stop:
        chunk = bisect_right(ends, row)
        chunk_first = ends[chunk] - shard.chunk_rows[chunk]
        count = min(most_rows, ends[chunk] - row, shard.stop - row)
        parts.append(Part(chunk, row - chunk_first, count))
        row += count
    return tuple(parts)


def _generator(seed: int, shard: int, epoch: int, window: int) -> np.random.Generator:
    return stream_generator(seed, Stream.ROWS, (window, shard, epoch))
