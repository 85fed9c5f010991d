"""Which row goes to which split.

Rows are dealt in blocks of 1,000. In a block, Philox numbers keyed on (seed, row) rank the rows;
the lowest ranks are test, the next validation, the rest train. How many each block gives is the
difference of two rounded totals, so that of n rows exactly round(fraction × n) are test. The answer
depends on the row's number and the number of rows, never on how a file was cut when it was read.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from phalanx.data.manifest import SPLITS, Split

BLOCK_ROWS = 1000
TRAIN, VALIDATION, TEST = 0, 1, 2
"""Codes of the splits; positions in ``SPLITS``."""

_STREAM = 0x73706C6974  # "split"; keeps these numbers apart from the sampler's


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

    def codes(self, first_row: int, stop_row: int, row_count: int | None) -> NDArray[np.int8]:
        """Split codes of rows [first_row, stop_row).

        ``row_count`` is the number of rows of the whole; None says that it is not known yet but
        that every block the rows lie in is full.
        """
        if self.test == 0 and self.validation == 0:
            return np.zeros(stop_row - first_row, dtype=np.int8)
        first_block = first_row // BLOCK_ROWS
        blocks = [
            self._block(block, row_count)
            for block in range(first_block, -(-stop_row // BLOCK_ROWS))
        ]
        dealt = np.concatenate([np.empty(0, dtype=np.int8), *blocks])
        offset = first_row - first_block * BLOCK_ROWS
        return dealt[offset : offset + stop_row - first_row]

    def _block(self, block: int, row_count: int | None) -> NDArray[np.int8]:
        first = block * BLOCK_ROWS
        stop = first + BLOCK_ROWS if row_count is None else min(first + BLOCK_ROWS, row_count)
        generator = np.random.Philox(key=np.array([self.seed, _STREAM], dtype=np.uint64))
        generator.advance(first // 4)  # four numbers per count; blocks start at multiples of four
        order = np.argsort(generator.random_raw(stop - first), kind="stable")
        test = _between(self.test, first, stop)
        # Rounding the sum, not the parts, keeps train from losing a row to two roundings.
        held_out = _between(self.test + self.validation, first, stop)
        codes = np.zeros(stop - first, dtype=np.int8)
        codes[order[test : max(test, held_out)]] = VALIDATION
        codes[order[:test]] = TEST
        return codes


def _between(fraction: float, first: int, stop: int) -> int:
    return int(np.floor(fraction * stop + 0.5)) - int(np.floor(fraction * first + 0.5))


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
