"""CSV as text: finding columns and header, and the exact place of what is wrong.

Arrow parses the bulk of a file fast but does not say where it stumbled. Whatever needs a line
number is read again here, slowly, row by row.
"""

import csv
import gzip
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from phalanx.data.arrow_values import is_number, is_number_elsewhere
from phalanx.data.doubts import HOLDS_NUL
from phalanx.data.manifest import ColumnKind
from phalanx.data.options import IngestOptions
from phalanx.data.sources import TableShape
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument, NotFound
from phalanx.texts import number_of

SAMPLE_ROWS = 10_000
"""Kinds of columns are decided by this many rows."""

_SAMPLE_CELLS = 1_000_000
_DELIMITERS = ",;\t|"
_WHOLE = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Dialect:
    """How the text is cut into cells."""

    delimiter: str
    comment: str | None
    header: bool


@dataclass(frozen=True)
class TextRow:
    """The cells of one row, and the number of the line on which it starts."""

    line: int
    cells: list[str]


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a text file, unpacked when its name ends in .gz; raises NotFound."""
    try:
        if path.suffix == ".gz":
            return cast("IO[bytes]", gzip.open(path, "rb"))
        return path.open("rb")
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror or error}") from error


def text_rows(path: Path, delimiter: str, comment: str | None) -> Iterator[TextRow]:
    """Rows with cells as they stand; blank lines and comments are skipped.

    Raises InvalidArgument, with the line, for text that is not UTF-8 and quotes that never close.
    """
    counter = _Lines(path, comment)
    with open_bytes(path) as file:
        reader = csv.reader(counter.read(file), delimiter=delimiter)
        while True:
            start = counter.line + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (EOFError, OSError, zlib.error) as error:
                raise InvalidArgument(f"{path.name} is damaged: {error}") from error
            except csv.Error as error:
                raise InvalidArgument(
                    f"{path.name}, line {start}: {error} (a quote that never closes?)"
                ) from error
            if cells:
                # A quoted cell may span lines; the row starts where its first line does.
                yield TextRow(counter.line - sum(cell.count("\n") for cell in cells), cells)


def check_quotes(path: Path, delimiter: str, comment: str | None) -> None:
    """Raises InvalidArgument where the last quote is never closed: its cell holds many rows.

    For files with an odd number of quotes; one may be a part of a word (5").
    """
    counter = _Lines(path, comment)
    start = 1
    with open_bytes(path) as file:
        reader = csv.reader(counter.read(file), delimiter=delimiter, strict=True)
        try:
            for _ in reader:
                start = counter.line + 1
        except csv.Error as error:
            if "end of data" in str(error):
                raise InvalidArgument(
                    f"{path.name}: a quote in the row of line {start} is never closed",
                    reason="BAD_CELL",
                ) from error


class _Lines:
    """Decodes lines and counts them, since skipped ones count too."""

    def __init__(self, path: Path, comment: str | None) -> None:
        self.line = 0
        self._name = path.name
        self._comment = comment

    def read(self, file: IO[bytes]) -> Iterator[str]:
        comment = self._comment.encode() if self._comment else None
        for raw in file:
            self.line += 1
            if comment and raw.startswith(comment):
                continue
            try:
                text = raw.decode("utf-8-sig" if self.line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidArgument(
                    f"{self._name}, line {self.line}: not UTF-8 text (byte {error.start + 1})"
                ) from error
            if text.strip("\r\n"):
                yield text


def inspect(
    path: Path, options: IngestOptions, expected: Sequence[str] = (), *, advise: bool = True
) -> tuple[Dialect, TableShape]:
    """Delimiter, header, names and kinds, from the first rows of the file.

    A first row that has all ``expected`` names is the header, whatever it looks like.
    Raises InvalidArgument for an empty file, names that occur twice, and options that do not fit.
    """
    delimiter = options.delimiter or _delimiter(path, options.comment)
    sample = _sample(path, delimiter, options.comment, advise)
    first, width = sample[0], len(sample[0].cells)
    missing = set(options.missing_markers)
    guessed = _kinds(sample[1:], width, missing)
    header = options.header
    if header is None:
        named = set(_named(first.cells))
        known = bool(expected) and set(expected) <= named
        header = known or _is_header(sample, guessed, missing)
    if header and len(sample) == 1:
        raise InvalidArgument(f"{path.name} has a header line and no rows")
    if not header:
        guessed = _kinds(sample, width, missing)
    names = _names(path, first if header else None, width, options)
    unknown = [name for name in (*options.categorical, *options.numeric) if name not in names]
    if unknown:
        raise InvalidArgument(
            f"{path.name} has no column {unknown[0]!r}; its columns are {', '.join(names)}"
        )
    kinds = dict(zip(names, guessed, strict=True))
    kinds.update(dict.fromkeys(options.categorical, "categorical"))
    kinds.update(dict.fromkeys(options.numeric, "numeric"))
    note = "the first line of the file is its header" if header else "the file has no header line"
    notes = (f"{note} (option `header` overrules)",) if options.header is None else ()
    left_out: frozenset[str] = frozenset()
    if header and _may_be_index(first, options):
        left_out, note = _index(names[0], kinds[names[0]], sample[1:])
        notes = (*notes, note)
    shape = TableShape(names, kinds, notes=notes, left_out=left_out)
    return Dialect(delimiter, options.comment, header), shape


def _sample(path: Path, delimiter: str, comment: str | None, advise: bool) -> list[TextRow]:
    """The first rows, which have as many cells as the very first."""
    rows = text_rows(path, delimiter, comment)
    first = next(rows, None)
    if first is None:
        raise InvalidArgument(f"{path.name} has no rows")
    for index, cell in enumerate(first.cells, start=1):
        if "\0" in cell:
            raise InvalidArgument(
                f"{path.name}, line {first.line}, column {index}: {cell!r} {HOLDS_NUL}",
                reason="BAD_CELL",
            )
    limit = max(100, min(SAMPLE_ROWS, _SAMPLE_CELLS // len(first.cells)))
    sample = [first, *itertools.islice(rows, limit)]
    for index, row in enumerate(sample):
        check_width(
            path, row, len(first.cells), _comment_hint(first) if index == 1 and advise else ""
        )
    return sample


def check_width(path: Path, row: TextRow, width: int, hint: str = "") -> None:
    """Raises InvalidArgument for a row with more or fewer cells than there are columns."""
    if len(row.cells) != width:
        cells = number_of(len(row.cells), "cell")
        raise InvalidArgument(
            f"{path.name}, line {row.line}: {cells}, expected {width}{hint}",
            reason="RAGGED_ROW",
        )


def _comment_hint(first: TextRow) -> str:
    """What to do if it was the first line that did not belong."""
    sign = first.cells[0][:1] or _DELIMITERS[-1]
    if sign.isalnum() or sign.isspace():
        return ""
    return f" as in line {first.line} (if that line is a comment, say {option('comment', sign)})"


def _delimiter(path: Path, comment: str | None) -> str:
    if path.name.removesuffix(".gz").endswith((".tsv", ".tab")):
        return "\t"
    with open_bytes(path) as file:
        try:
            first = next(_Lines(path, comment).read(file), "")
        except (EOFError, OSError, zlib.error) as error:
            raise InvalidArgument(f"{path.name} is damaged: {error}") from error
    unquoted = re.sub(r'"[^"]*"', "", first)
    for delimiter in _DELIMITERS[1:]:
        # With decimal commas there are more of these than of what separates the cells.
        cells = unquoted.split(delimiter)
        if len(cells) > 1 and all(_is_any_number(cell.strip()) for cell in cells):
            return delimiter
    return max(_DELIMITERS, key=unquoted.count)


def _is_any_number(cell: str) -> bool:
    return is_number(cell) or is_number_elsewhere(cell)


def _kinds(rows: Sequence[TextRow], width: int, missing: set[str]) -> list[ColumnKind]:
    """Numeric where most cells that are there are numbers; the others are then bad cells."""
    kinds: list[ColumnKind] = []
    for column in range(width):
        present = [
            cell for row in rows if (cell := row.cells[column].strip()) and cell not in missing
        ]
        numbers = sum(map(is_number, present))
        kinds.append("numeric" if 2 * numbers > len(present) or not present else "categorical")
    return kinds


def _is_header(sample: Sequence[TextRow], kinds: Sequence[ColumnKind], missing: set[str]) -> bool:
    """A first row of words, over numbers or over words that it does not share.

    The first of them may be lacking, over an index.
    """
    first = [cell.strip() for cell in sample[0].cells]
    skipped = 1 if len(first) > 1 and not first[0] else 0
    words = first[skipped:]
    if any(cell in missing or is_number(cell) for cell in words):
        return False
    if "numeric" in kinds[skipped:] or len(sample) == 1:
        return True
    return len(set(words)) == len(words) and all(
        cell != row.cells[column].strip()
        for column, cell in enumerate(words, start=skipped)
        for row in sample[1:]
    )


def _may_be_index(header: TextRow, options: IngestOptions) -> bool:
    """Whether the first column has no name, and nothing was said of it."""
    width = len(header.cells)
    if width == 1 or header.cells[0].strip() or options.columns:
        return False
    name = _named(header.cells)[0]
    said = {*options.categorical, *options.numeric, *options.ignore, str(options.target)}
    return not said & {name, "1", str(-width)}


def _index(name: str, kind: ColumnKind, rows: Sequence[TextRow]) -> tuple[frozenset[str], str]:
    """A first column without a name: whether it is left out, which ``rows`` tell, and a note."""
    cells = [row.cells[0].strip() for row in rows]
    differ = len(set(cells)) == len(cells) and "" not in cells
    if differ and (kind == "categorical" or all(map(_WHOLE.fullmatch, cells))):
        return frozenset({name}), (
            "the first column has no name and another value in each row, as an index that pandas "
            f"or R wrote: it is left out ({name!r} in option `numeric` or `categorical` keeps it)"
        )
    return frozenset(), (
        f"the first column has no name and is called {name!r} (option `ignore` leaves it out)"
    )


def _named(cells: Sequence[str]) -> list[str]:
    """Names of a header; those that are lacking go by place."""
    return [cell.strip() or f"column_{index + 1}" for index, cell in enumerate(cells)]


def _names(
    path: Path, header: TextRow | None, width: int, options: IngestOptions
) -> tuple[str, ...]:
    if options.columns:
        cells: Sequence[str] = options.columns
        if len(cells) != width:
            raise InvalidArgument(
                f"{number_of(len(cells), 'column name')} given, {path.name} has "
                f"{number_of(width, 'column')}"
            )
    else:
        cells = header.cells if header else [""] * width
    names = _named(cells)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        place = f"{path.name}, line {header.line}" if header else option("columns")
        raise InvalidArgument(f"{place}: the column name {twice[0]!r} occurs twice")
    return tuple(names)
