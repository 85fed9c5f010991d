"""LIBSVM text: ``label index:value index:value …`` per line, indices from 1 and rising.

Blocks of whole lines are checked with one regular expression and parsed as one array of numbers;
only a block that does not pass is looked at line by line, to name the line.
"""

import functools
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import scipy.sparse
from numpy.typing import NDArray

from phalanx.data.formats.csv_text import open_bytes
from phalanx.data.manifest import SourceFile
from phalanx.data.options import IngestOptions
from phalanx.data.preprocess import NumericValues
from phalanx.data.sources import ArrayBatch, ArrayShape
from phalanx.errors import InvalidArgument

_INDEX_MAXIMUM = 2**31 - 1
_NUMBER = rb"[+-]?(?:\d++\.?+\d*+|\.\d++)(?:[eE][+-]?\d++)?+"
# Not possessive where alternatives are repeated: Python before 3.11.5 takes what does not match.
_PAIRS = rb"(?:[ \t]++\d++:" + _NUMBER + rb")*[ \t\r]*+"
_ONE_PER_LINE = bytes.maketrans(b" \t\r:", b"\n\n\n\n")
_LINE = re.compile(rb"[ \t]*+" + _NUMBER + _PAIRS)
_BLOCK = re.compile(rb"(?:[ \t]*+(?:" + _NUMBER + _PAIRS + rb"|\r?)\n)*")
_LABEL = re.compile(rb"[ \t]*+" + _NUMBER + rb"(?=[ \t\r]|$)")
_PAIR = re.compile(rb"\d++:" + _NUMBER)


@dataclass(frozen=True)
class _Block:
    """Whole lines of a file, and the number of the first."""

    text: bytes
    first_line: int


class LibsvmArrays:
    """LIBSVM files with labels; ``.gz`` is unpacked. A pass, or an option, tells the width."""

    def __init__(self, paths: Sequence[Path], options: IngestOptions) -> None:
        self._paths = tuple(paths)
        self._block_bytes = options.block_bytes
        self._feature_count = options.feature_count
        self._shape = ArrayShape(features=options.feature_count, sparse=True)
        for path in paths:
            open_bytes(path).close()

    @property
    def shape(self) -> ArrayShape:
        """What the arrays are."""
        return self._shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Names and sizes."""
        return tuple(SourceFile(path.name, path.stat().st_size) for path in self._paths)

    def batches(self) -> Iterator[ArrayBatch]:
        """All rows in order; a batch is as wide as its highest index, or as was said."""
        for path in self._paths:
            with open_bytes(path) as file:
                try:
                    for block in _blocks(file, self._block_bytes):
                        batch = self._parse(block, path)
                        if batch.rows:
                            yield batch
                except (EOFError, OSError, zlib.error) as error:
                    raise InvalidArgument(f"{path.name} is damaged: {error}") from error

    def _parse(self, block: _Block, path: Path) -> ArrayBatch:
        text = block.text
        if b"#" in text:
            text = b"\n".join(line.split(b"#", 1)[0] for line in text.split(b"\n"))
        if _BLOCK.fullmatch(text) is None:
            raise _line_error(text, block.first_line, path)
        lines = text.split(b"\n")
        pairs = np.array([line.count(b":") for line in lines], dtype=np.int64)
        filled = np.array([bool(line.strip()) for line in lines])
        pairs, line_numbers = pairs[filled], np.flatnonzero(filled) + block.first_line
        numbers = _numbers(text)
        starts = np.zeros(len(pairs) + 1, dtype=np.int64)
        np.cumsum(1 + 2 * pairs, out=starts[1:])
        is_label: NDArray[np.bool_] = np.zeros(len(numbers), dtype=bool)
        is_label[starts[:-1]] = True
        rest = numbers[~is_label]
        indices, values = rest[0::2], rest[1::2]
        indptr = np.zeros(len(pairs) + 1, dtype=np.int64)
        np.cumsum(pairs, out=indptr[1:])
        where = functools.partial(_where, path.name, line_numbers)
        self._check(indices, values, indptr, where)
        width = self._feature_count or int(indices.max(initial=0))
        features = scipy.sparse.csr_array(
            (values, (indices - 1).astype(np.int32), indptr), shape=(len(pairs), width)
        )
        return ArrayBatch(features, NumericValues(numbers[is_label]), where)

    def _check(
        self,
        indices: NDArray[np.float64],
        values: NDArray[np.float64],
        indptr: NDArray[np.int64],
        where: Any,
    ) -> None:
        """Indices count from 1, rise within a row and stay in the width; values are finite."""
        limit = self._feature_count or _INDEX_MAXIMUM
        with np.errstate(invalid="ignore"):  # some may be beyond all numbers
            steps = np.diff(indices, prepend=0)
        steps[indptr[:-1][np.diff(indptr) > 0]] = 1
        problems = (
            (indices < 1, "indices count from 1"),
            (indices > limit, f"indices go up to {limit}"),
            (steps <= 0, "the indices of a line must rise"),
            (~np.isfinite(values), "the value is too large"),
        )
        for bad, message in problems:
            if bad.any():
                position = int(bad.argmax())
                row = int(np.searchsorted(indptr, position, side="right")) - 1
                raise InvalidArgument(f"{where(row, f'index {indices[position]:.16g}')}: {message}")


def _blocks(file: IO[bytes], block_bytes: int) -> Iterator[_Block]:
    """Whole lines, about ``block_bytes`` at a time; the last gets a line feed if it has none."""
    line, carried = 1, b""
    while data := file.read(block_bytes):
        cut = data.rfind(b"\n") + 1
        if not cut:
            carried += data
            continue
        text = carried + data[:cut]
        carried = data[cut:]
        yield _Block(text, line)
        line += text.count(b"\n")
    if carried:
        yield _Block(carried + b"\n", line)


def _numbers(text: bytes) -> NDArray[np.float64]:
    """All numbers of the text, as one CSV column: Arrow's parser is the fastest at hand."""
    column = pyarrow.csv.read_csv(
        io.BytesIO(text.translate(_ONE_PER_LINE)),
        read_options=pyarrow.csv.ReadOptions(column_names=["number"], use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={"number": pa.float64()}, null_values=[]
        ),
    )
    numbers: NDArray[np.float64] = column.column(0).to_numpy()
    return numbers


def _line_error(text: bytes, first_line: int, path: Path) -> InvalidArgument:
    for number, line in enumerate(text.split(b"\n"), start=first_line):
        if not line.strip() or _LINE.fullmatch(line):
            continue
        if _LABEL.match(line) is None:
            label = line.split()[0].decode(errors="replace")
            problem = f"the label {label[:40]!r} is not a number"
        else:
            pairs = re.split(rb"[ \t]+", line.strip(b" \t\r"))[1:]
            bad = next(pair for pair in pairs if not _PAIR.fullmatch(pair))
            problem = f"{bad.decode(errors='replace')[:40]!r} is not index:value"
        return InvalidArgument(f"{path.name}, line {number}: {problem}", reason="BAD_CELL")
    return InvalidArgument(f"{path.name}, after line {first_line}: not LIBSVM text")


def _where(name: str, lines: NDArray[np.int64], row: int, column: str) -> str:
    return f"{name}, line {lines[row]}, {column}"
