"""From paths, or from objects in memory, to a source of rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from phalanx.data.formats.arrays import ArraySeries, MemoryArrays, plain_array
from phalanx.data.formats.csv_files import CsvTable
from phalanx.data.formats.csv_text import open_bytes
from phalanx.data.formats.idx_files import open_idx
from phalanx.data.formats.libsvm_files import LibsvmArrays
from phalanx.data.formats.npz_files import open_npz
from phalanx.data.formats.paths import check_path
from phalanx.data.formats.safetensors_files import SafetensorsArrays
from phalanx.data.formats.tables import MemoryTable, ParquetTable, arrow_column, arrow_table
from phalanx.data.options import IngestOptions
from phalanx.data.sources import TARGET, Opened, Source, TableShape
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument
from phalanx.texts import number_of

FORMATS = ("csv", "parquet", "npz", "libsvm", "safetensors", "idx")

_FORMAT_OF_ENDING = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".data": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npz": "npz",
    ".libsvm": "libsvm",
    ".svm": "libsvm",
    ".svmlight": "libsvm",
    ".safetensors": "safetensors",
    ".idx": "idx",
}


def open_paths(
    paths: Sequence[Path],
    options: IngestOptions,
    like: Source | None = None,
    default_format: str | None = None,
) -> Opened:
    """What the paths hold; a folder stands for the files in it.

    ``like`` is the data whose test or validation split the paths hold: it fixes names and kinds of
    columns. Raises NotFound and InvalidArgument.
    """
    if not paths:
        raise InvalidArgument("name at least one file")
    for path in paths:
        check_path(path)
    format_name = options.format or format_of(paths, default_format)
    if format_name == "idx":
        return open_idx(paths)
    files = [file for path in paths for file in _files(path, format_name)]
    if format_name == "csv":
        shape = like.shape if like else None
        names = shape.names if isinstance(shape, TableShape) else None
        return Opened(CsvTable(files, options, names))
    if format_name == "parquet":
        return Opened(ParquetTable(files, options))
    if format_name == "libsvm":
        return Opened(LibsvmArrays(files, options))
    if format_name == "safetensors":
        return Opened(ArraySeries([SafetensorsArrays(file, options) for file in files]))
    if format_name == "npz":
        opened = [open_npz(file, options) for file in files]
        return opened[0] if len(opened) == 1 else _series(files, opened)
    raise InvalidArgument(f"unknown format {format_name!r}; the formats are {', '.join(FORMATS)}")


def open_memory(
    features: Any, targets: Any, options: IngestOptions, names: Sequence[str] = ()
) -> Opened:
    """Objects in memory: a frame with columns (pandas, polars, Arrow, a mapping), or arrays.

    ``targets`` of a frame may be a sequence of their own (it becomes the column ``target``), or
    None when they are among the columns. A two-dimensional array of text or mixed values counts as
    a frame.
    """
    if is_frame(features):
        table = arrow_table(features, "the table")
        return Opened(MemoryTable(_with_target(table, targets), options))
    if targets is None:
        raise InvalidArgument("arrays need targets of their own; only a frame can hold them")
    if not hasattr(features, "tocsr"):
        features = plain_array(features, "the data")
        if features.dtype.kind not in "biuf":
            return open_memory(frame_of_objects(features, names), targets, options)
    return Opened(MemoryArrays(features, targets, names))


def is_frame(value: Any) -> bool:
    """Whether the object has named columns."""
    return isinstance(value, dict) or hasattr(value, "columns") or hasattr(value, "column_names")


def frame_of_objects(array: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """A two-dimensional array of mixed values as columns, ``x1`` … where they have no names."""
    if array.ndim != 2:
        raise InvalidArgument(f"rows by columns are needed, not an array of shape {array.shape}")
    names = list(names) or [f"x{index + 1}" for index in range(array.shape[1])]
    if len(names) != array.shape[1]:
        raise InvalidArgument(
            f"{number_of(len(names), 'name')} for {number_of(array.shape[1], 'column')}"
        )
    return {name: array[:, index] for index, name in enumerate(names)}


def format_of(paths: Sequence[Path], default: str | None = None) -> str:
    """The format by the files' endings; raises InvalidArgument where nothing tells."""
    path = paths[0]
    if path.is_dir():
        if any("images-idx" in file.name for file in path.iterdir()):
            return "idx"
        inside = sorted(file for file in path.iterdir() if _ending(file) in _FORMAT_OF_ENDING)
        if not inside:
            raise InvalidArgument(f"no file in {path} has a known ending; say {option('format')}")
        path = inside[0]
    if "-idx" in path.name:
        return "idx"
    found = _FORMAT_OF_ENDING.get(_ending(path)) or _format_by_content(path) or default
    if found is None:
        raise InvalidArgument(
            f"{path.name} does not tell its format; say {option('format')} with one of "
            f"{', '.join(FORMATS)}"
        )
    return found


def _format_by_content(path: Path) -> str | None:
    """What the first bytes say, where they do."""
    with open_bytes(path) as file:
        try:
            start = file.read(4)
        except (OSError, EOFError):
            return None
    if start[:2] == b"\0\0" and len(start) == 4 and 0x08 <= start[2] <= 0x0E:
        return "idx"
    return {b"PAR1": "parquet", b"PK\x03\x04": "npz"}.get(start)


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _files(path: Path, format_name: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(
        file for file in path.iterdir() if _FORMAT_OF_ENDING.get(_ending(file)) == format_name
    )
    if not files:
        raise InvalidArgument(f"folder {path} has no {format_name} files")
    for file in files:
        check_path(file)
    return files


def _series(files: Sequence[Path], opened: Sequence[Opened]) -> Opened:
    """Several files as one; each brings its part of the test split, or none does."""
    tests = [one.test for one in opened if one.test is not None]
    if tests and len(tests) < len(opened):
        without = next(path for path, one in zip(files, opened, strict=True) if one.test is None)
        raise InvalidArgument(
            f"{without.name} brings no test split, and another of the files does; "
            f"say which arrays to read with {option('features_key')} and {option('target_key')}"
        )
    return Opened(ArraySeries([one.main for one in opened]), ArraySeries(tests) if tests else None)


def _with_target(table: pa.Table, targets: Any) -> pa.Table:
    if targets is None:
        return table
    if TARGET in table.column_names:
        raise InvalidArgument(
            f"the frame has a column {TARGET!r}; pass targets of their own or the column, not both"
        )
    column = arrow_column(targets, "the targets", TARGET)
    if len(column) != table.num_rows:
        raise InvalidArgument(
            f"{number_of(table.num_rows, 'row')}, but {number_of(len(column), 'target')}"
        )
    return table.append_column(TARGET, column)
