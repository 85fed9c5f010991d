"""CSV files: Arrow parses them block by block, the header and all errors come from ``csv_text``."""

import csv
import functools
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv

from phalanx.data.arrow_values import is_number, number_hint, numeric_values, text_values
from phalanx.data.formats.csv_text import (
    Dialect,
    check_quotes,
    check_width,
    inspect,
    open_bytes,
    text_rows,
)
from phalanx.data.manifest import ColumnKind, SourceFile
from phalanx.data.options import IngestOptions
from phalanx.data.preprocess import ColumnValues
from phalanx.data.sources import TableBatch, TableShape
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument, PhalanxError
from phalanx.texts import listed, number_of

_BLOCK_BYTES_MINIMUM = 64
_WIDEST_BLOCK_BYTES = 1 << 30


class CsvTable:
    """One table out of CSV files that have the same columns.

    ``like`` names the columns that are expected, where another file has fixed them already (the
    test file of a train file, a file to predict): a header is then matched by name, a file without
    one by position. ``whole`` names all columns of that other file, where ``like`` are some of
    them: a file without a header may have these as well. Without ``advise`` the caller has no
    options, and errors name none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        options: IngestOptions,
        like: Sequence[str] | None = None,
        whole: Sequence[str] = (),
        *,
        advise: bool = True,
    ) -> None:
        self._options = options
        self._advise = advise
        self._paths = tuple(paths)
        self._files: list[tuple[Path, Dialect, tuple[str, ...]]] = []
        self._shape: TableShape | None = None
        notes: list[str] = []
        for path in paths:
            dialect, shape = inspect(path, options, like or (), advise=advise)
            if self._shape is None:
                self._shape = shape
                notes += () if like else shape.notes
            names = _matched(path, shape, dialect, like or self._shape.names, whole)
            if names != shape.names and not dialect.header:
                notes.append(
                    f"{path.name} has no header line: its columns are taken by position, as "
                    f"{listed(names)}"
                )
            self._files.append((path, dialect, names))
        self._notes = tuple(notes)

    @property
    def shape(self) -> TableShape:
        """The columns of the first file; what was assumed of files that go with others."""
        if self._shape is None:
            raise InvalidArgument("no CSV file was given")
        return replace(self._shape, notes=self._notes)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of all columns of all files."""
        return tuple(dict.fromkeys(name for _, _, names in self._files for name in names))

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Names and sizes."""
        return tuple(SourceFile(path.name, path.stat().st_size) for path in self._paths)

    def batches(self, wanted: Mapping[str, ColumnKind]) -> Iterator[TableBatch]:
        """All rows in order; InvalidArgument names file, line, column and value of a bad cell."""
        for path, dialect, names in self._files:
            missing = [name for name in wanted if name not in names]
            if missing:
                raise InvalidArgument(f"{path.name} has no column {missing[0]!r}")
            yield from self._file_batches(path, dialect, names, wanted)

    def _file_batches(
        self, path: Path, dialect: Dialect, names: tuple[str, ...], wanted: Mapping[str, ColumnKind]
    ) -> Iterator[TableBatch]:
        rows = 0
        try:
            with open_bytes(path) as file:
                body = _Body(file, dialect, self._block_bytes(file))
                for batch in self._arrow_batches(body, dialect, names, wanted):
                    if not batch.num_rows:
                        continue
                    where = functools.partial(_where, path, dialect, rows)
                    rows += batch.num_rows
                    yield TableBatch(batch.num_rows, self._columns(batch, wanted), where)
            if body.quotes % 2:
                check_quotes(path, dialect.delimiter, dialect.comment)
        except (pa.ArrowException, EOFError, OSError, zlib.error) as error:
            raise self._diagnosis(path, dialect, names, wanted, rows, error) from error

    def _arrow_batches(
        self,
        body: "_Body",
        dialect: Dialect,
        names: tuple[str, ...],
        wanted: Mapping[str, ColumnKind],
    ) -> Iterator[Any]:
        markers = self._options.missing_markers
        types = {
            name: pa.float64() if kind == "numeric" else pa.dictionary(pa.int32(), pa.string())
            for name, kind in wanted.items()
        }
        return iter(
            pa.csv.open_csv(
                body,
                read_options=pa.csv.ReadOptions(
                    column_names=list(names), block_size=body.block_bytes
                ),
                parse_options=pa.csv.ParseOptions(
                    delimiter=dialect.delimiter, newlines_in_values=True
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types=types,
                    include_columns=list(wanted),
                    # Numbers are trimmed when parsed, but not before they are looked up here.
                    null_values=[blank + marker for marker in markers for blank in ("", " ")],
                    strings_can_be_null=False,
                ),
            )
        )

    def _columns(self, batch: Any, wanted: Mapping[str, ColumnKind]) -> dict[str, ColumnValues]:
        markers = self._options.missing_markers
        return {
            name: numeric_values(batch.column(index))
            if kind == "numeric"
            else text_values(batch.column(index), markers)
            for index, (name, kind) in enumerate(wanted.items())
        }

    def _block_bytes(self, file: IO[bytes]) -> int:
        """A block holds several rows, however long they are."""
        longest = max(len(file.readline(_WIDEST_BLOCK_BYTES)) for _ in range(100))
        file.seek(0)
        block_bytes = max(self._options.block_bytes, _BLOCK_BYTES_MINIMUM, 4 * longest)
        return min(block_bytes, _WIDEST_BLOCK_BYTES)

    def _diagnosis(
        self,
        path: Path,
        dialect: Dialect,
        names: tuple[str, ...],
        wanted: Mapping[str, ColumnKind],
        rows: int,
        error: Exception,
    ) -> PhalanxError:
        """What is wrong in the first bad row after ``rows`` good ones."""
        markers = set(self._options.missing_markers)
        numeric = [
            (index, name) for index, name in enumerate(names) if wanted.get(name) == "numeric"
        ]
        try:
            for number, row in enumerate(_data_rows(path, dialect)):
                if number < rows:
                    continue
                check_width(path, row, len(names))
                for index, name in numeric:
                    cell = row.cells[index]
                    word = cell.strip()
                    if word not in markers and not is_number(cell):
                        first = number == 0 and not dialect.header
                        hint = number_hint(word) or self._hint(name, first)
                        return InvalidArgument(
                            f"{path.name}, line {row.line}, column {name!r}: {word!r} is not a "
                            f"number{hint}",
                            reason="BAD_CELL",
                        )
        except PhalanxError as found:
            return found
        return InvalidArgument(f"{path.name}, after {number_of(rows, 'good row')}: {error}")

    def _hint(self, name: str, first: bool) -> str:
        """What to say if the cell is right, which may stand in the first row of the file."""
        if not self._advise:
            return ""
        if first and self._options.header is None:
            return f" (if the line is a header, say {option('header', True)})"
        return f" (if the column holds categories, say {option('categorical', name)})"


class _Body(io.RawIOBase):
    """The data rows of a file as bytes: without header and comments.

    ``quotes`` counts those that were read. ``block_bytes`` is how much is parsed at once.
    """

    def __init__(self, file: IO[bytes], dialect: Dialect, block_bytes: int) -> None:
        super().__init__()
        self.quotes = 0
        self.block_bytes = block_bytes
        self._file = file
        self._comment = dialect.comment.encode() if dialect.comment else None
        if dialect.header:
            # Reads just the lines of one row; a quoted name may span several.
            lines = (line.decode("utf-8-sig") for line in self._lines())
            next(csv.reader(lines, delimiter=dialect.delimiter))

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """At least one byte and about ``size``, unless the file ends."""
        data = self._read(size)
        self.quotes += data.count(b'"')
        return data

    def _read(self, size: int) -> bytes:
        if self._comment is None:
            return self._file.read(size)
        while lines := self._file.readlines(size):
            kept = b"".join(line for line in lines if not line.startswith(self._comment))
            if kept:
                return kept
        return b""

    def _lines(self) -> Iterator[bytes]:
        for line in self._file:
            skipped = self._comment is not None and line.startswith(self._comment)
            if not skipped and line.strip(b"\xef\xbb\xbf\r\n"):
                yield line


def _matched(
    path: Path, shape: TableShape, dialect: Dialect, like: Sequence[str], whole: Sequence[str]
) -> tuple[str, ...]:
    """Names of the file's columns, the expected ones by position where it has no header."""
    if dialect.header or set(like) <= set(shape.names):
        return shape.names
    if len(shape.names) == len(whole):
        return tuple(whole)
    if len(shape.names) != len(like):
        raise InvalidArgument(
            f"{path.name} has no header line and {number_of(len(shape.names), 'column')}, "
            f"expected the {number_of(len(like), 'column')} {listed(like)}"
        )
    return tuple(like)


def _data_rows(path: Path, dialect: Dialect) -> Iterator[Any]:
    rows = text_rows(path, dialect.delimiter, dialect.comment)
    if dialect.header:
        next(rows, None)
    return rows


def _where(path: Path, dialect: Dialect, first_row: int, row: int, column: str) -> str:
    """``adult.csv, line 15, column 'age'``; reads the file again up to that row."""
    wanted = first_row + row
    for number, text_row in enumerate(_data_rows(path, dialect)):
        if number == wanted:
            return f"{path.name}, line {text_row.line}, column {column!r}"
    return f"{path.name}, row {wanted + 1}, column {column!r}"
