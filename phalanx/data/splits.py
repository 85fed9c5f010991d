"""Which row goes to which split.

Rows are dealt in blocks of 1,000. In a block, Philox numbers keyed on (seed, row) rank the rows;
the lowest ranks are test, the next validation, the rest train. How many each block gives is the
difference of two rounded totals, so that of n rows exactly round(fraction × n) are test. The answer
depends on the row's number and the number of rows, never on how a file was cut when it was read.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from phalanx.data.manifest import SPLITS, Split
from phalanx.streams import Stream, stream_key

BLOCK_ROWS = 1000
TRAIN, VALIDATION, TEST = 0, 1, 2
"""Codes of the splits; positions in ``SPLITS``."""

_STRIDE_ROWS = 256 * BLOCK_ROWS


class Rows(Protocol):
    """Anything that holds a number of rows."""

    @property
    def rows(self) -> int:
        """How many."""
        ...


RowsT = TypeVar("RowsT", bound=Rows)


def split_name(code: int) -> Split:
    """The split of a code."""
    return SPLITS[code]


@dataclass(frozen=True)
class Splitter:
    """Deals rows to splits; ``test`` and ``validation`` are fractions, their sum is below 1."""

    seed: int
    test: float = 0.0
    validation: float = 0.0

    @property
    def deals(self) -> bool:
        """Whether any row goes elsewhere than to train."""
        return self.test > 0 or self.validation > 0

    def codes(self, first_row: int, stop_row: int, row_count: int | None) -> NDArray[np.int8]:
        """Split codes of rows [first_row, stop_row).

        ``row_count`` is the number of rows of the whole; None says that it is not known yet but
        that every block the rows lie in is full.
        """
        if not self.deals:
            return np.zeros(stop_row - first_row, dtype=np.int8)
        first_block, stop_block = first_row // BLOCK_ROWS, -(-stop_row // BLOCK_ROWS)
        parts = []
        if row_count is None or stop_block * BLOCK_ROWS <= row_count:
            parts.append(self._blocks(first_block, stop_block, BLOCK_ROWS))
        else:
            parts.append(self._blocks(first_block, stop_block - 1, BLOCK_ROWS))
            last_rows = row_count - (stop_block - 1) * BLOCK_ROWS
            parts.append(self._blocks(stop_block - 1, stop_block, last_rows))
        offset = first_row - first_block * BLOCK_ROWS
        return np.concatenate(parts)[offset : offset + stop_row - first_row]

    def _blocks(self, first: int, stop: int, rows: int) -> NDArray[np.int8]:
        """Codes of whole blocks; only the last block of all may have fewer rows than others."""
        if first == stop:
            return np.empty(0, dtype=np.int8)
        generator = np.random.Philox(key=stream_key(self.seed, Stream.SPLITS))
        generator.advance(first * BLOCK_ROWS // 4)  # four numbers per count of the generator
        numbers = generator.random_raw((stop - first) * rows).reshape(stop - first, rows)
        ranked = np.sort(numbers, axis=1)
        starts = np.arange(first, stop, dtype=np.int64) * BLOCK_ROWS
        test = _between(self.test, starts, starts + rows)
        # Rounding the sum, not the parts, keeps train from losing a row to two roundings.
        held_out = np.maximum(test, _between(self.test + self.validation, starts, starts + rows))
        codes = np.zeros(numbers.shape, dtype=np.int8)
        codes[_lowest(numbers, ranked, held_out)] = VALIDATION
        codes[_lowest(numbers, ranked, test)] = TEST
        return codes.reshape(-1)


def ranges_of(
    splitter: Splitter, code: int, row_count: int, counts: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Where the rows of a split lie among ``row_count`` rows, cut into pieces of so many each.

    For each piece, the first of its rows and the one after its last; rows of other splits may lie
    between. ``counts`` take all rows of the split, one at least each.
    """
    stops = np.cumsum(np.array(counts, dtype=np.int64))
    ends = np.stack([stops - np.array(counts, dtype=np.int64), stops - 1], axis=1).reshape(-1)
    if splitter.deals:
        found, seen = [], 0
        for first in range(0, row_count, _STRIDE_ROWS):
            stop = min(first + _STRIDE_ROWS, row_count)
            places = np.flatnonzero(splitter.codes(first, stop, row_count) == code) + first
            low, high = np.searchsorted(ends, (seen, seen + len(places)))
            found.append(places[ends[low:high] - seen])
            seen += len(places)
        ends = np.concatenate(found)
    pairs = ends.reshape(-1, 2).tolist()
    return tuple((first, last + 1) for first, last in pairs)


def _between(
    fraction: float, first: NDArray[np.int64], stop: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many of the rows [first, stop) a fraction of all rows up to ``stop`` adds."""
    counts: NDArray[np.float64] = np.floor(fraction * stop + 0.5) - np.floor(fraction * first + 0.5)
    return counts.astype(np.int64)


def _lowest(
    numbers: NDArray[np.uint64], ranked: NDArray[np.uint64], counts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Where the ``counts`` lowest numbers of each line are."""
    highest = ranked[np.arange(len(ranked)), np.maximum(counts - 1, 0)]
    return (numbers <= highest[:, None]) & (counts > 0)[:, None]


def deal(batches: Iterable[RowsT], splitter: Splitter) -> Iterator[tuple[RowsT, NDArray[np.int8]]]:
    """Every batch with the split codes of its rows.

    Looks ahead just far enough to know that the blocks of a batch are full, or that the rows end.
    """
    waiting: deque[tuple[RowsT, int]] = deque()
    known = 0
    for batch in batches:
        waiting.append((batch, known))
        known += batch.rows
        while waiting and _full(waiting[0], known):
            head, first = waiting.popleft()
            yield head, splitter.codes(first, first + head.rows, None)
    for head, first in waiting:
        yield head, splitter.codes(first, first + head.rows, known)


def _full(entry: tuple[Rows, int], known: int) -> bool:
    batch, first = entry
    return -(-(first + batch.rows) // BLOCK_ROWS) * BLOCK_ROWS <= known
