"""Tables with typed columns: Parquet files, and frames in memory."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from phalanx.data.arrow_values import kind_of, numeric_values, text_values
from phalanx.data.manifest import ColumnKind, SourceFile
from phalanx.data.options import IngestOptions
from phalanx.data.preprocess import ColumnValues
from phalanx.data.sources import TableBatch, TableShape
from phalanx.errors import InvalidArgument, NotFound

_BATCH_CELLS = 1 << 19
_BATCH_ROWS = 1 << 16


class ParquetTable:
    """One table out of Parquet files of the same columns; row groups are read in pieces."""

    def __init__(
        self, paths: Sequence[Path], options: IngestOptions, like: TableShape | None = None
    ) -> None:
        self._options = options
        self._paths = tuple(paths)
        for path in paths:
            schema = _parquet(path).schema_arrow
            if like is None:
                like = shape_of(path.name, schema, options)
        if like is None:
            raise InvalidArgument("no Parquet file was given")
        self._shape = like

    @property
    def shape(self) -> TableShape:
        """The columns."""
        return self._shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Names and sizes."""
        return tuple(SourceFile(path.name, path.stat().st_size) for path in self._paths)

    def batches(self, wanted: Sequence[str]) -> Iterator[TableBatch]:
        """All rows in order."""
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_CELLS // max(1, len(wanted))))
        for path in self._paths:
            rows = 0
            with _parquet(path) as file:
                _check_present(path.name, wanted, file.schema_arrow.names)
                batches = file.iter_batches(batch_rows, columns=list(wanted), use_threads=False)
                try:
                    for batch in batches:
                        where = functools.partial(_where, path.name, rows)
                        rows += batch.num_rows
                        columns = _columns(batch, wanted, self._shape, self._options)
                        yield TableBatch(batch.num_rows, columns, where)
                except (pa.ArrowInvalid, OSError) as error:
                    raise InvalidArgument(
                        f"{path.name} is damaged after row {rows}: {error}"
                    ) from error


class MemoryTable:
    """A frame in memory: an Arrow table, a mapping of columns, or anything with ``columns``.

    pandas and polars frames are read column by column; what ``numpy.asarray`` makes of a column
    decides whether it is numeric.
    """

    def __init__(
        self,
        frame: Any,
        options: IngestOptions,
        like: TableShape | None = None,
        name: str = "table",
    ) -> None:
        self._options = options
        self._name = name
        self._table = arrow_table(frame, name)
        self._shape = like or shape_of(name, self._table.schema, options)

    @property
    def shape(self) -> TableShape:
        """The columns."""
        return self._shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """None; it comes from memory."""
        return ()

    def batches(self, wanted: Sequence[str]) -> Iterator[TableBatch]:
        """All rows in order."""
        _check_present(self._name, wanted, self._table.column_names)
        rows = 0
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_CELLS // max(1, len(wanted))))
        # Dictionaries of the parts of a column may differ; a batch needs one.
        table = self._table.select(list(wanted)).unify_dictionaries()
        for batch in table.to_batches(max_chunksize=batch_rows):
            where = functools.partial(_where, self._name, rows)
            rows += batch.num_rows
            columns = _columns(batch, wanted, self._shape, self._options)
            yield TableBatch(batch.num_rows, columns, where)


def _check_present(name: str, wanted: Sequence[str], present: Sequence[str]) -> None:
    absent = [column for column in wanted if column not in present]
    if absent:
        raise InvalidArgument(f"{name} has no column {absent[0]!r}")


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
                f"leave the column out with --ignore {field.name}"
            )
        if kind == "categorical" and field.name in options.numeric:
            raise InvalidArgument(f"{name}, column {field.name!r} is text, it cannot be numeric")
        kinds[field.name] = "categorical" if field.name in options.categorical else kind
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
    cells = [None if _is_null(cell) else cell for cell in array.tolist()]
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
    return pa.array([None if cell is None else str(cell) for cell in cells], pa.string())


def _is_null(cell: Any) -> bool:
    if cell is None or type(cell).__name__ in {"NAType", "NaTType"}:
        return True
    return isinstance(cell, float) and math.isnan(cell)


def _columns(
    batch: Any, wanted: Sequence[str], shape: TableShape, options: IngestOptions
) -> dict[str, ColumnValues]:
    return {
        name: numeric_values(batch.column(index))
        if shape.kinds[name] == "numeric"
        else text_values(batch.column(index), options.missing_markers)
        for index, name in enumerate(wanted)
    }


def _parquet(path: Path) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidArgument(f"{path.name} is not a Parquet file: {error}") from error


def _where(name: str, first_row: int, row: int, column: str) -> str:
    return f"{name}, row {first_row + row + 1}, column {column!r}"
