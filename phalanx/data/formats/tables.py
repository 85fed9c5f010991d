"""Tables with typed columns: Parquet files, and frames in memory."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from phalanx.data.arrow_values import (
    as_word,
    kind_of,
    numeric_values,
    parsed_numbers,
    text_values,
)
from phalanx.data.manifest import ColumnKind, SourceFile
from phalanx.data.options import IngestOptions
from phalanx.data.preprocess import ColumnValues, Whereabouts
from phalanx.data.sources import TableBatch, TableShape
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument, NotFound
from phalanx.texts import number_of

READ_BYTES = 256 * 1024
"""A column is read in pieces of this size, so that a large row group need not be in memory."""

_BATCH_CELLS = 1 << 19
_BATCH_ROWS = 1 << 16


class ParquetTable:
    """One table out of Parquet files of the same columns; row groups are read in pieces."""

    def __init__(self, paths: Sequence[Path], options: IngestOptions) -> None:
        self._options = options
        self._paths = tuple(paths)
        if not paths:
            raise InvalidArgument("no Parquet file was given")
        self._schemas = [_schema(path) for path in paths]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return self._paths

    @property
    def shape(self) -> TableShape:
        """The columns of the first file."""
        return shape_of(self._paths[0].name, self._schemas[0], self._options)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of all columns of all files."""
        return tuple(dict.fromkeys(name for schema in self._schemas for name in schema.names))

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Names and sizes."""
        return tuple(SourceFile(path.name, path.stat().st_size) for path in self._paths)

    def batches(self, wanted: Mapping[str, ColumnKind]) -> Iterator[TableBatch]:
        """All rows in order."""
        for path in self._paths:
            with _parquet(path) as file:
                check_present(path.name, wanted, file.schema_arrow.names)
                batches = file.iter_batches(
                    batch_rows(wanted), columns=list(wanted), use_threads=False
                )
                yield from table_batches(path.name, batches, wanted, self._options)


class MemoryTable:
    """A frame in memory: an Arrow table, a mapping of columns, or anything with ``columns``.

    pandas and polars frames are read column by column; what ``numpy.asarray`` makes of a column
    decides whether it is numeric.
    """

    def __init__(self, frame: Any, options: IngestOptions, name: str = "the table") -> None:
        self._options = options
        self._name = name
        self._table = arrow_table(frame, name)

    @property
    def shape(self) -> TableShape:
        """The columns."""
        return shape_of(self._name, self._table.schema, self._options)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of all columns."""
        return tuple(self._table.column_names)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """None; it comes from memory."""
        return ()

    def batches(self, wanted: Mapping[str, ColumnKind]) -> Iterator[TableBatch]:
        """All rows in order."""
        check_present(self._name, wanted, self._table.column_names)
        # Dictionaries of the parts of a column may differ; a batch needs one.
        table = self._table.select(list(wanted)).unify_dictionaries()
        batches = table.to_batches(max_chunksize=batch_rows(wanted))
        yield from table_batches(self._name, batches, wanted, self._options)


def batch_rows(wanted: Sized) -> int:
    """How many rows of so many columns are read at once."""
    return max(1, min(_BATCH_ROWS, _BATCH_CELLS // max(1, len(wanted))))


def table_batches(
    name: str,
    batches: Iterable[Any],
    wanted: Mapping[str, ColumnKind],
    options: IngestOptions,
    first_row: int = 0,
) -> Iterator[TableBatch]:
    """Arrow's batches of the wanted columns, from row ``first_row`` of ``name`` on."""
    rows = first_row
    try:
        for batch in batches:
            where = functools.partial(_where, name, rows)
            rows += batch.num_rows
            yield TableBatch(batch.num_rows, _columns(batch, wanted, options, where), where)
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgument(f"{name} is damaged after row {rows}: {error}") from error


def check_present(name: str, wanted: Iterable[str], present: Sequence[str]) -> None:
    """Raises InvalidArgument for a wanted column that is not there, or there twice."""
    counts = Counter(present)
    for column in wanted:
        count = counts[column]
        if count != 1:
            problem = f"has {number_of(count, 'column')} of the name" if count else "has no column"
            raise InvalidArgument(f"{name} {problem} {column!r}")


def shape_of(name: str, schema: pa.Schema, options: IngestOptions) -> TableShape:
    """Columns of a typed table; raises InvalidArgument for a type that cannot be a feature."""
    kinds: dict[str, ColumnKind] = {}
    names = tuple(field.name for field in schema if not field.name.startswith("__index_level_"))
    for field in schema:
        if field.name not in names or field.name in options.ignore:
            continue
        kind = kind_of(field.type)
        if kind is None:
            raise InvalidArgument(
                f"{name}, column {field.name!r}: values of type {field.type} cannot be features; "
                f"leave the column out with {option('ignore', field.name)}"
            )
        if field.name in options.categorical:
            kind = "categorical"
        elif field.name in options.numeric:
            kind = "numeric"
        kinds[field.name] = kind
    unknown = [column for column in (*options.categorical, *options.numeric) if column not in kinds]
    if unknown:
        raise InvalidArgument(
            f"{name} has no column {unknown[0]!r}; its columns are {', '.join(kinds)}"
        )
    booleans = frozenset(
        field.name for field in schema if pa.types.is_boolean(field.type) and field.name in kinds
    )
    return TableShape(names, kinds, booleans)


def arrow_table(frame: Any, name: str) -> pa.Table:
    """A frame as an Arrow table; raises InvalidArgument when a column has no one type."""
    if isinstance(frame, pa.Table):
        return frame
    names = [str(column) for column in (frame if isinstance(frame, dict) else frame.columns)]
    keys = list(frame if isinstance(frame, dict) else frame.columns)
    arrays = [arrow_column(frame[key], name, text) for key, text in zip(keys, names, strict=True)]
    try:
        return pa.table(dict(zip(names, arrays, strict=True)))
    except pa.ArrowInvalid as error:
        raise InvalidArgument(f"{name}: the columns are not of one length ({error})") from error


def arrow_column(values: Any, name: str, column: str) -> pa.Array:
    """A column of anything as an Arrow array: numbers, booleans or text; None and NaN are null."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise InvalidArgument(f"{name}, column {column!r} has {array.ndim} dimensions, not one")
    if array.dtype.kind in "biuf":
        return pa.array(array)
    # An array of objects may hold NumPy's own numbers.
    plain = (cell.item() if isinstance(cell, np.generic) else cell for cell in array.tolist())
    cells = [None if _is_null(cell) else cell for cell in plain]
    if all(isinstance(cell, bool | None) for cell in cells):
        return pa.array(cells, pa.bool_())
    if all(isinstance(cell, int | float | None) for cell in cells):
        return pa.array([None if cell is None else float(cell) for cell in cells], pa.float64())
    odd = [cell for cell in cells if not isinstance(cell, str | int | float | None)]
    if odd:
        row = next(index for index, cell in enumerate(cells) if cell is odd[0])
        raise InvalidArgument(
            f"{name}, row {row + 1}, column {column!r}: a {type(odd[0]).__name__} cannot be "
            "a feature"
        )
    return pa.array([None if cell is None else as_word(cell) for cell in cells], pa.string())


def _is_null(cell: Any) -> bool:
    if cell is None or type(cell).__name__ in {"NAType", "NaTType"}:
        return True
    return isinstance(cell, float) and math.isnan(cell)


def _columns(
    batch: Any, wanted: Mapping[str, ColumnKind], options: IngestOptions, where: Whereabouts
) -> dict[str, ColumnValues]:
    columns: dict[str, ColumnValues] = {}
    for index, (name, kind) in enumerate(wanted.items()):
        array = batch.column(index)
        if kind == "categorical":
            try:
                columns[name] = text_values(array, options.missing_markers)
            except pa.ArrowNotImplementedError as error:
                raise InvalidArgument(
                    f"{where(0, name)}: a {array.type} is no category", reason="BAD_CELL"
                ) from error
        elif kind_of(array.type) == "categorical":
            columns[name] = parsed_numbers(array, options.missing_markers, where, name)
        elif kind_of(array.type) is None and not pa.types.is_null(array.type):
            raise InvalidArgument(
                f"{where(0, name)}: a {array.type} is not a number", reason="BAD_CELL"
            )
        else:
            columns[name] = numeric_values(array)
    return columns


def _schema(path: Path) -> pa.Schema:
    with _parquet(path) as file:
        return file.schema_arrow


def _parquet(path: Path) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(
            path, memory_map=False, pre_buffer=False, buffer_size=READ_BYTES
        )
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        message = f"{path.name} is not a Parquet file: the name of a column is not UTF-8"
        raise InvalidArgument(message) from error
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgument(f"{path.name} is not a Parquet file: {error}") from error


def _where(name: str, first_row: int, row: int, column: str) -> str:
    return f"{name}, row {first_row + row + 1}, column {column!r}"
