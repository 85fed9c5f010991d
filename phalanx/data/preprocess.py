"""Raw columns to features: the one path that training data and later predictions share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from phalanx.data.manifest import Column
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument

MISSING = -1
"""The code of a missing text value."""

_SLICE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class NumericValues:
    """Raw numbers of one column; NaN is a missing value."""

    values: NDArray[np.float64]


@dataclass(frozen=True)
class TextValues:
    """Raw text of one column: row i reads ``words[codes[i]]``; a code of -1 is a missing value."""

    codes: NDArray[np.int32]
    words: Sequence[str]


ColumnValues = NumericValues | TextValues


class Whereabouts(Protocol):
    """Says where a value came from, for messages: ``adult.csv, line 15, column 'age'``."""

    def __call__(self, row: int, column: str) -> str:
        """The place of a row and column."""
        ...


@dataclass
class Oddities:
    """What was met while encoding and has a stated behaviour instead of an error.

    By column: categories that the training data did not have (encoded as all zeros), and missing
    values that were replaced.
    """

    unknown: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)

    def sentences(self, columns: Sequence[str]) -> tuple[str, ...]:
        """One sentence per oddity, in the order of the columns, not in that of discovery."""
        unknown = (
            f"column {name!r}: values outside the categories of train are encoded as none "
            f"of them ({count})"
            for name in columns
            if (count := self.unknown.get(name))
        )
        missing = (
            f"column {name!r}: missing values were replaced ({count})"
            for name in columns
            if (count := self.missing.get(name))
        )
        return (*unknown, *missing)


class Encoder:
    """Encodes batches of raw columns.

    A numeric column is copied. A categorical one becomes a feature per word of its vocabulary, 1
    where the value is that word; a word outside the vocabulary leaves all of them 0. A missing
    value does what the column's policy says (see ``Column``).
    """

    def __init__(self, columns: Sequence[Column], dtype: DTypeLike) -> None:
        self.columns = tuple(columns)
        self.width = sum(column.width for column in columns)
        self.oddities = Oddities()
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._index = [
            {word: position for position, word in enumerate(column.vocabulary)}
            for column in columns
        ]
        self._slice_rows = max(1, _SLICE_ELEMENTS // max(1, self.width))

    def remarks(self) -> tuple[str, ...]:
        """A sentence for each oddity met so far."""
        return self.oddities.sentences([column.name for column in self.columns])

    def encode(self, values: Sequence[ColumnValues], where: Whereabouts) -> Iterator[NDArray[Any]]:
        """Features of the rows, in slices of rows by features that stay small.

        ``values`` are the raw columns in the order of ``columns``, of equal length. Raises
        InvalidArgument, with the place of the cell, for a missing value under the policy ``error``
        and for a number that is not finite in the features' type.
        """
        prepared = [
            self._prepare(index, column_values, where) for index, column_values in enumerate(values)
        ]
        rows = row_count(values[0]) if values else 0
        for first in range(0, rows, self._slice_rows):
            stop = min(rows, first + self._slice_rows)
            out: NDArray[Any] = np.zeros((stop - first, self.width), dtype=self._dtype)
            offset = 0
            for column, array in zip(self.columns, prepared, strict=True):
                self._write(column, array[first:stop], out[:, offset : offset + column.width])
                offset += column.width
            yield out

    def _prepare(self, index: int, values: ColumnValues, where: Whereabouts) -> NDArray[Any]:
        """Checked numbers in the features' type, or positions within the column's features."""
        column = self.columns[index]
        if isinstance(values, NumericValues):
            return self._numbers(column, values.values, where)
        return self._positions(column, self._index[index], values, where)

    def _numbers(
        self, column: Column, values: NDArray[np.float64], where: Whereabouts
    ) -> NDArray[Any]:
        missing = np.isnan(values)
        if missing.any():
            if not column.fill:
                raise missing_value(where(int(missing.argmax()), column.name))
            self._count(self.oddities.missing, column, int(missing.sum()))
            values = np.where(missing, column.fill[0], values)
        with np.errstate(over="ignore"):
            numbers: NDArray[Any] = values.astype(self._dtype)
        finite = np.isfinite(numbers)
        if not finite.all():
            row = int((~finite).argmax())
            value = float(values[row])
            reason = "is not finite" if np.isinf(value) else f"is too large for {self._dtype.name}"
            raise InvalidArgument(
                f"{where(row, column.name)}: {value!r} {reason}", reason="NOT_FINITE"
            )
        return numbers

    def _positions(
        self, column: Column, index: dict[str, int], values: TextValues, where: Whereabouts
    ) -> NDArray[np.int64]:
        # The last two entries are reached from behind: -1 is a missing value, -2 an unknown word.
        unknown, missing = -2, MISSING
        table = np.array([index.get(word, unknown) for word in values.words] + [missing], np.int64)
        positions = table[values.codes]
        odd = positions < 0
        if not odd.any():
            return positions
        is_missing = positions == missing
        if is_missing.any():
            if column.missing == "error":
                raise missing_value(where(int(is_missing.argmax()), column.name))
            self._count(self.oddities.missing, column, int(is_missing.sum()))
            if column.missing_category:
                positions[is_missing] = len(column.vocabulary)
        strangers = int((positions == unknown).sum())
        if strangers:
            self._count(self.oddities.unknown, column, strangers)
        return positions

    def _write(self, column: Column, array: NDArray[Any], out: NDArray[Any]) -> None:
        if column.kind == "numeric":
            out[:, 0] = array
            return
        known = np.flatnonzero(array >= 0)
        out[known, array[known]] = 1
        if column.fill:
            out[array == MISSING] = column.fill

    @staticmethod
    def _count(counts: dict[str, int], column: Column, count: int) -> None:
        counts[column.name] = counts.get(column.name, 0) + count


def missing_value(where: str) -> InvalidArgument:
    """The error of a missing value where none is allowed."""
    return InvalidArgument(
        f"{where}: the value is missing; choose what becomes of missing values when the data set "
        f"is added: {option('missing', 'category')} (a category of its own, the mean in numeric "
        f"columns) or {option('missing', 'mean')}",
        reason="MISSING_VALUE",
    )


def row_count(values: ColumnValues) -> int:
    """How many rows a column has."""
    array = values.values if isinstance(values, NumericValues) else values.codes
    return len(array)
