"""Pieces that the formats of plain arrays share, and arrays in memory."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse
from numpy.typing import NDArray

from phalanx.data.arrow_values import numeric_values, text_values
from phalanx.data.formats.tables import arrow_column
from phalanx.data.manifest import SourceFile
from phalanx.data.preprocess import ColumnValues, NumericValues
from phalanx.data.sources import TARGET, ArrayBatch, ArrayShape
from phalanx.errors import InvalidArgument
from phalanx.texts import number_of

_BATCH_BYTES = 4 << 20
_NUMBER_KINDS = "biuf"


def batch_rows(features: int, itemsize: int) -> int:
    """Rows per batch; depends on the shape only."""
    return max(1, min(1 << 16, _BATCH_BYTES // max(1, features * itemsize)))


def is_whole_bytes(dtype: np.dtype[Any]) -> bool:
    """Whether every value fits a byte: pixels, flags."""
    return dtype.name in {"uint8", "bool"}


def array_where(name: str, first_row: int, row: int, column: str) -> str:
    """``X.npz, row 17, x5``: rows are counted from 1."""
    return f"{name}, row {first_row + row + 1}, {column}"


def flat_width(shape: Sequence[int], name: str, what: str = "features") -> int:
    """Features per row of an array with rows first; raises InvalidArgument for fewer dimensions."""
    if len(shape) < 2:
        raise InvalidArgument(
            f"{name}: {what} have shape {tuple(shape)}; rows by features are needed"
        )
    width = 1
    for extent in shape[1:]:
        width *= extent
    return width


def check_numeric(dtype: np.dtype[Any], name: str) -> None:
    """Raises InvalidArgument for features that are not real numbers."""
    if dtype.kind not in _NUMBER_KINDS:
        raise InvalidArgument(f"{name}: features of type {dtype} are not real numbers")


def plain_array(values: Any, name: str) -> NDArray[Any]:
    """Anything as an array; what is masked is missing. Raises InvalidArgument for ragged lists."""
    if isinstance(values, np.ma.MaskedArray):
        return np.ma.filled(values.astype(np.float64), np.nan)
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InvalidArgument(f"{name}: rows are not of one length ({error})") from error


def target_values(targets: NDArray[Any], name: str) -> ColumnValues:
    """Targets of any type as raw values."""
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise InvalidArgument(f"{name}: targets have shape {targets.shape}; one per row is needed")
    if targets.dtype.kind in _NUMBER_KINDS:
        return NumericValues(targets.astype(np.float64))
    column = arrow_column(targets, name, TARGET)
    if pa.types.is_string(column.type):
        return text_values(column, ())
    return numeric_values(column)


def check_rows(features: int, targets: int, name: str) -> None:
    """Raises InvalidArgument unless there is one target per row."""
    if features != targets:
        raise InvalidArgument(
            f"{name}: {number_of(features, 'row')} of features, but {number_of(targets, 'target')}"
        )


class PairInFile:
    """What the formats have in common that keep features and targets under keys of one file."""

    def __init__(self, path: Path, features_key: str, target_key: str) -> None:
        self._path = path
        self._note = f"features are {features_key!r}, targets {target_key!r} of {path.name}"
        self._shape = ArrayShape(features=None)

    def _describe(self, width: int, features: np.dtype[Any], targets: np.dtype[Any]) -> None:
        self._shape = ArrayShape(
            features=width,
            whole_bytes=is_whole_bytes(features),
            boolean_target=targets.kind == "b",
            notes=(self._note,),
        )

    @property
    def shape(self) -> ArrayShape:
        """What the arrays are."""
        return self._shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Name and size."""
        return (SourceFile(self._path.name, self._path.stat().st_size),)


class MemoryArrays:
    """Features and targets in memory: a NumPy array (rows first) or a SciPy sparse matrix."""

    def __init__(
        self, features: Any, targets: Any, names: Sequence[str] = (), name: str = "the data"
    ) -> None:
        sparse = scipy.sparse.issparse(features)
        self._features = scipy.sparse.csr_array(features) if sparse else plain_array(features, name)
        self._targets: NDArray[Any] = plain_array(targets, name)
        self._name = name
        width = flat_width(self._features.shape, name)
        check_numeric(self._features.dtype, name)
        check_rows(
            self._features.shape[0], self._targets.shape[0] if self._targets.ndim else 0, name
        )
        if names and len(names) != width:
            raise InvalidArgument(
                f"{number_of(len(names), 'feature name')} for {number_of(width, 'feature')}"
            )
        self._shape = ArrayShape(
            features=width,
            whole_bytes=is_whole_bytes(self._features.dtype),
            sparse=sparse,
            boolean_target=self._targets.dtype.kind == "b",
            names=tuple(names),
        )

    @property
    def shape(self) -> ArrayShape:
        """What the arrays are."""
        return self._shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """None; it comes from memory."""
        return ()

    def batches(self) -> Iterator[ArrayBatch]:
        """All rows in order."""
        rows, width = self._features.shape[0], self._shape.features or 0
        step = batch_rows(1 if self._shape.sparse else width, self._features.dtype.itemsize)
        for first in range(0, rows, step):
            stop = min(rows, first + step)
            part = self._features[first:stop]
            yield ArrayBatch(
                features=part if self._shape.sparse else part.reshape(stop - first, width),
                targets=target_values(self._targets[first:stop], self._name),
                where=functools.partial(array_where, self._name, first),
            )


class ArraySeries:
    """Several array sources of one shape, one after another."""

    def __init__(self, sources: Sequence[Any]) -> None:
        widths = {source.shape.features for source in sources}
        if len(widths) > 1:
            widths_text = ", ".join(str(width) for width in sorted(widths))
            raise InvalidArgument(f"the files differ in width: {widths_text} features")
        self._sources = tuple(sources)

    @property
    def shape(self) -> ArrayShape:
        """The shape of the first."""
        first: ArrayShape = self._sources[0].shape
        return first

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All files."""
        return tuple(itertools.chain.from_iterable(source.files for source in self._sources))

    def batches(self) -> Iterator[ArrayBatch]:
        """All rows in order."""
        for source in self._sources:
            yield from source.batches()
