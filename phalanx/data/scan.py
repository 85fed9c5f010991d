"""The first pass: what has to be known of the train split before a row can be encoded."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.doubts import Doubts
from phalanx.data.manifest import Column, ColumnKind, MissingPolicy
from phalanx.data.preprocess import (
    MISSING,
    ColumnValues,
    NumericValues,
    TextValues,
    Whereabouts,
    missing_value,
)
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument


def select(
    values: ColumnValues, where: Whereabouts, rows: NDArray[np.int64]
) -> tuple[ColumnValues, Whereabouts]:
    """Some rows of a column; their places stay those of the whole."""
    part: ColumnValues = (
        NumericValues(values.values[rows])
        if isinstance(values, NumericValues)
        else TextValues(values.codes[rows], values.words)
    )
    return part, functools.partial(_where_of, where, rows)


def _where_of(where: Whereabouts, rows: NDArray[np.int64], row: int, column: str) -> str:
    return where(int(rows[row]), column)


def running_sum(total: float, values: NDArray[np.float64]) -> float:
    """Adds one value after another, so that the sum does not depend on how they were batched."""
    if not len(values):
        return total
    return float(np.cumsum(np.concatenate([[total], values]))[-1])


@dataclass
class ColumnScan:
    """Vocabulary, or mean, of one column over the train split.

    ``meant`` says that the words are categories, whatever they look like.
    """

    name: str
    kind: ColumnKind
    missing: MissingPolicy
    max_categories: int
    meant: bool = False
    _sum: float = 0.0
    _count: int = 0
    _missing: int = 0
    _words: dict[str, int] = field(default_factory=dict)
    _doubts: Doubts = field(init=False)

    def __post_init__(self) -> None:
        self._doubts = Doubts(self.name)

    def add(self, values: ColumnValues, where: Whereabouts) -> None:
        """Some train rows; raises InvalidArgument for too many categories and infinite numbers."""
        if isinstance(values, NumericValues):
            self._add_numbers(values.values, where)
            return
        self._doubts.look(values, where)
        known = values.codes != MISSING
        self._missing += int(np.count_nonzero(~known))
        counts = np.bincount(values.codes[known], minlength=len(values.words))
        for index in np.flatnonzero(counts):
            word = values.words[int(index)]
            self._words[word] = self._words.get(word, 0) + int(counts[index])
        if len(self._words) > self.max_categories:
            self._refuse_numbers()
            raise InvalidArgument(
                f"column {self.name!r} has more than {self.max_categories} different values; leave "
                f"it out with {option('ignore', self.name)}, or raise {option('max_categories')}",
                reason="TOO_MANY_CATEGORIES",
            )

    def result(self) -> Column:
        """The column; raises InvalidArgument when the train split has no value to learn from."""
        if self.kind == "numeric":
            return Column(self.name, missing=self.missing, fill=self._numeric_fill())
        self._refuse_numbers()
        words = tuple(sorted(self._words))
        if not words and not self._missing:
            raise self._empty()
        total = sum(self._words.values())
        fill: tuple[float, ...] = ()
        if self.missing == "mean":
            if not total:
                raise self._empty()
            fill = tuple(self._words[word] / total for word in words)
        return Column(
            self.name,
            "categorical",
            words,
            self.missing,
            fill,
            missing_category=self.missing == "category" and self._missing > 0,
        )

    def _refuse_numbers(self) -> None:
        if not self.meant:
            self._doubts.refuse_numbers(self._words, option("categorical", self.name))

    def _add_numbers(self, values: NDArray[np.float64], where: Whereabouts) -> None:
        infinite = np.isinf(values)
        if infinite.any():
            row = int(infinite.argmax())
            raise InvalidArgument(
                f"{where(row, self.name)}: {float(values[row])!r} is not finite",
                reason="NOT_FINITE",
            )
        present = values[~np.isnan(values)]
        self._missing += len(values) - len(present)
        self._count += len(present)
        self._sum = running_sum(self._sum, present)

    def _numeric_fill(self) -> tuple[float, ...]:
        if self.missing == "error":
            return ()
        if not self._count:
            raise self._empty()
        return (self._sum / self._count,)

    def _empty(self) -> InvalidArgument:
        return InvalidArgument(
            f"column {self.name!r} has no value in the train split; leave it out with "
            f"{option('ignore', self.name)}"
        )


def refuse_missing(columns: Mapping[str, ColumnValues], where: Whereabouts) -> None:
    """Raises InvalidArgument for the first missing value of the rows, whichever column it is in."""
    first: tuple[int, str] | None = None
    for name, values in columns.items():
        missing = (
            np.isnan(values.values)
            if isinstance(values, NumericValues)
            else values.codes == MISSING
        )
        if missing.any():
            row = int(missing.argmax())
            if first is None or row < first[0]:
                first = (row, name)
    if first is not None:
        raise missing_value(where(*first))


class ArrayEncoder:
    """Dense or sparse arrays as features: checks that they are finite and fills what is missing.

    ``columns`` are numeric columns with what replaces a missing value (NaN), or empty where a
    missing value is an error.
    """

    def __init__(self, columns: tuple[Column, ...], dtype: str) -> None:
        self._names = tuple(column.name for column in columns)
        self._fill = np.array([column.fill[0] if column.fill else np.nan for column in columns])
        self._dtype: np.dtype[Any] = np.dtype(dtype)

    def encode(self, features: Any, where: Whereabouts) -> Any:
        """The features in the stored type; raises InvalidArgument with the place of a bad one."""
        sparse = hasattr(features, "indptr")
        values = features.data if sparse else features
        if values.dtype == self._dtype and self._dtype.kind == "u":
            return features
        with np.errstate(over="ignore"):
            converted = values.astype(self._dtype)
        finite = np.isfinite(converted) if self._dtype.kind == "f" else np.ones(0, dtype=bool)
        if not finite.all():
            if sparse:
                self._refuse_sparse(features, finite, where)
            converted = self._filled(values, converted, where)
        if not sparse:
            return converted
        return type(features)((converted, features.indices, features.indptr), shape=features.shape)

    def _filled(self, values: Any, converted: Any, where: Whereabouts) -> Any:
        missing = np.isnan(values)
        if len(self._fill):
            converted = np.where(missing, self._fill.astype(self._dtype), converted)
        bad = ~np.isfinite(converted)
        if bad.any():
            row, column = (int(index[0]) for index in np.nonzero(bad))
            self._refuse(float(values[row, column]), where(row, self._name(column)))
        return converted

    def _refuse_sparse(self, features: Any, finite: Any, where: Whereabouts) -> None:
        position = int((~finite).argmax())
        row = int(np.searchsorted(features.indptr, position, side="right")) - 1
        name = self._name(int(features.indices[position]))
        self._refuse(float(features.data[position]), where(row, name))

    def _refuse(self, value: float, where: str) -> None:
        if np.isnan(value):
            raise missing_value(where)
        problem = "is not finite" if np.isinf(value) else f"is too large for {self._dtype.name}"
        raise InvalidArgument(f"{where}: {value!r} {problem}", reason="NOT_FINITE")

    def _name(self, column: int) -> str:
        return f"feature {self._names[column] if self._names else f'x{column + 1}'}"


@dataclass
class ArrayScan:
    """Means of the features over the train split, where missing values are to be replaced."""

    features: int
    _sum: NDArray[np.float64] = field(init=False)
    _count: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._sum = np.zeros(self.features)
        self._count = np.zeros(self.features, dtype=np.int64)

    def add(self, features: NDArray[Any]) -> None:
        """Some train rows, dense; the encoder refuses infinite values, naming their place."""
        present = np.isfinite(features)
        self._count += np.count_nonzero(present, axis=0)
        # Row after row, so that the sum does not depend on how the rows were batched.
        rows = np.where(present, features, 0.0)
        self._sum = np.add.accumulate(np.vstack([self._sum, rows]), axis=0)[-1]

    def columns(self, names: tuple[str, ...], missing: MissingPolicy) -> tuple[Column, ...]:
        """Numeric columns with their means; raises InvalidArgument where one has no value."""
        empty = np.flatnonzero(self._count == 0)
        names = names or tuple(f"x{index + 1}" for index in range(self.features))
        if len(empty):
            raise InvalidArgument(
                f"feature {names[empty[0]]!r} has no value in the train split; leave it out"
            )
        means = self._sum / self._count
        return tuple(
            Column(name, missing=missing, fill=(float(mean),))
            for name, mean in zip(names, means, strict=True)
        )
