"""Raw rows of any kind as the features that a model was trained on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from phalanx.data.choice import RawColumns, merged
from phalanx.data.formats.arrays import MemoryArrays, plain_array
from phalanx.data.formats.csv_files import CsvTable
from phalanx.data.formats.idx_files import idx_features
from phalanx.data.formats.libsvm_files import LibsvmArrays
from phalanx.data.formats.npz_files import npz_features
from phalanx.data.formats.paths import check_path
from phalanx.data.formats.tables import MemoryTable, ParquetTable
from phalanx.data.manifest import Column
from phalanx.data.opening import format_of, frame_of_objects, is_frame
from phalanx.data.options import MISSING_MARKERS, IngestOptions
from phalanx.data.picking import FeaturePicker
from phalanx.data.preprocess import Encoder
from phalanx.data.scan import ArrayEncoder
from phalanx.data.sources import ArrayBatch, TableSource
from phalanx.errors import InvalidArgument
from phalanx.texts import listed, number_of


@dataclass
class Remarks:
    """What was met in raw rows and has a stated behaviour instead of an error.

    ``ignored_columns`` are those that the model does not use; ``unchosen_columns`` those of them
    that the training data had and the job did not choose. ``sentences`` tell of both, of unknown
    categories and of missing values that were replaced; they are complete once all rows have been
    read. ``assumed`` is what had to be taken for granted before.
    """

    ignored_columns: tuple[str, ...] = ()
    unchosen_columns: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    _encoder: Encoder | None = field(default=None, repr=False)

    @property
    def sentences(self) -> tuple[str, ...]:
        """One sentence per column with something to tell, one for all that were not chosen."""
        unchosen = set(self.unchosen_columns)
        told = [
            f"column {name!r} is not known, it is ignored"
            for name in self.ignored_columns
            if name not in unchosen
        ]
        if unchosen:
            names = listed(self.unchosen_columns)
            told.append(f"columns that the job did not choose are ignored: {names}")
        return (*self.assumed, *told, *(self._encoder.remarks() if self._encoder else ()))


@dataclass(frozen=True)
class RawRows:
    """What a model expects of raw rows, and how they become features.

    ``columns`` are those that the model uses, empty where its features have no names. ``dtype`` is
    the type in which features were stored; raw values are rounded to it as they were for training.

    ``chosen_from`` are all columns of the training data, where the job chose some of them. By name
    these are enough then. Rows without names are as wide as those of the training data, or hold the
    chosen columns alone; sparse ones are never taken for the latter, since a row of either kind may
    end early.
    """

    columns: tuple[Column, ...]
    features: int
    dtype: str
    sparse: bool
    target: str
    missing_markers: tuple[str, ...] = MISSING_MARKERS
    chosen_from: RawColumns | None = None

    def encode(self, data: Any) -> tuple[Iterator[Any], Remarks]:
        """Pieces of features (rows by features, dense or CSR) in order, and the remarks on them.

        ``data`` is the path of a file, a frame, a mapping of columns, a list of rows by column
        name, or an array. Raises InvalidArgument for a missing column, a value without meaning or a
        wrong width.
        """
        if isinstance(data, str | Path):
            return self._file(Path(data))
        if isinstance(data, list | tuple) and data and all(isinstance(row, dict) for row in data):
            data = _frame_of_rows(data)
        if is_frame(data):
            return self._table(MemoryTable(data, self._options()))
        if not hasattr(data, "tocsr"):
            data = plain_array(data, "the rows")
            categorical = any(column.kind == "categorical" for column in self.columns)
            if categorical or data.dtype.kind not in "biuf":
                return self.encode(self._frame_by_position(data))
        if data.ndim < 2:
            raise InvalidArgument(
                f"rows by features are needed, not an array of shape {data.shape}; a single row is "
                "[row]"
            )
        source = MemoryArrays(data, np.zeros(data.shape[0]))
        return self._arrays(source.batches()), Remarks()

    def prepared(self, features: Any) -> Iterator[Any]:
        """Features that are encoded already; raises InvalidArgument for another width."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise InvalidArgument(
                f"prepared rows have {number_of(self.features, 'feature')}, not the shape "
                f"{features.shape}"
            )
        yield self._stored(features.astype(self.dtype, copy=False))

    def _file(self, path: Path) -> tuple[Iterator[Any], Remarks]:
        check_path(path)
        if path.is_dir():
            raise InvalidArgument(f"{path} is a folder; name a file of rows in it")
        format_name = format_of([path], "csv")
        if format_name == "csv":
            table = self._csv(path)
            return self._table(table, table.shape.notes)
        if format_name == "parquet":
            return self._table(ParquetTable([path], self._options()))
        if format_name == "npz":
            return self._arrays(npz_features(path)), Remarks()
        if format_name == "idx":
            return self._arrays(idx_features(path)), Remarks()
        if format_name == "libsvm":
            return self._arrays(LibsvmArrays([path], self._options()).batches()), Remarks()
        raise InvalidArgument(
            f"{path.name} is {format_name}; predict reads csv, parquet, npz, libsvm and idx"
        )

    def _csv(self, path: Path) -> CsvTable:
        if not self._has_names:
            return CsvTable([path], self._options(), advise=False)
        names = [column.name for column in self.columns]
        whole = [column.name for column in self.chosen_from.named] if self.chosen_from else ()
        return CsvTable([path], self._options(), names, whole, advise=False)

    def _table(
        self, source: TableSource, assumed: tuple[str, ...] = ()
    ) -> tuple[Iterator[Any], Remarks]:
        present = source.present
        columns = self.columns or tuple(Column(f"x{index + 1}") for index in range(self.features))
        names = self._names(columns, present)
        encoder = Encoder(columns, self.dtype)
        used = {*names, self.target}
        ignored = tuple(name for name in present if name not in used)
        wanted = {name: column.kind for name, column in zip(names, columns, strict=True)}

        def pieces() -> Iterator[Any]:
            for batch in source.batches(wanted):
                values = [batch.columns[name] for name in names]
                for features in encoder.encode(values, batch.where):
                    yield self._stored(features)

        return pieces(), Remarks(ignored, self._unchosen(ignored, names), assumed, encoder)

    def _names(self, columns: tuple[Column, ...], present: tuple[str, ...]) -> list[str]:
        """Which of the columns that are there hold the expected ones."""
        expected = [column.name for column in columns]
        absent = [name for name in expected if name not in present]
        if not absent:
            return expected
        rest = [name for name in present if name != self.target]
        whole = self.chosen_from
        # Features without names are taken by position, unless some of the table's go by number.
        numbered = whole is not None and any(whole.position(name) is not None for name in rest)
        if not self._has_names and not numbered:
            if len(rest) == len(columns):
                return rest
            if whole and len(rest) == whole.count:
                return [rest[position] for position in self._positions]
        raise InvalidArgument(
            f"column {absent[0]!r} is missing; the model needs {listed(expected)}",
            reason="MISSING_COLUMN",
        )

    def _unchosen(self, ignored: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
        """Which ignored columns the training data had, given those that are used."""
        whole = self.chosen_from
        if whole is None:
            return ()
        if names != [column.name for column in self.columns]:
            return ignored  # a whole row, taken by position
        return tuple(name for name in ignored if whole.position(name) is not None)

    def _arrays(self, batches: Iterable[ArrayBatch]) -> Iterator[Any]:
        if any(column.kind == "categorical" for column in self.columns):
            names = listed([column.name for column in self.columns])
            raise InvalidArgument(f"the model needs the columns {names}, not numbers alone")
        encoder = ArrayEncoder(self.columns, self.dtype)
        for batch in batches:
            features = self._used(batch.features)
            yield self._stored(encoder.encode(features, batch.where))

    def _used(self, features: Any) -> Any:
        """The features of the model; raises InvalidArgument for rows of a wrong width."""
        sparse = scipy.sparse.issparse(features)
        width = features.shape[1]
        if self.chosen_from is not None and width == self.chosen_from.count:
            return self._picker.rows(features)
        if self.chosen_from is None and sparse and width < self.features:
            shape = (features.shape[0], self.features)
            return scipy.sparse.csr_array(
                (features.data, features.indices, features.indptr), shape=shape
            )
        if width != self.features or (self.chosen_from is not None and sparse):
            needed = f"{self.features}"
            if self.chosen_from is not None:
                needed = f"all {self.chosen_from.count} of the training data"
                needed += "" if sparse else f", or the {self.features} that the job chose"
            raise InvalidArgument(
                f"rows have {number_of(width, 'feature')}, the model needs {needed}"
            )
        return features

    def _stored(self, features: Any) -> Any:
        """Dense or CSR, as the training data was."""
        if self.sparse:
            return scipy.sparse.csr_array(features)
        return features.toarray() if scipy.sparse.issparse(features) else features

    def _frame_by_position(self, array: Any) -> dict[str, Any]:
        names = [column.name for column in self.columns]
        width = array.shape[1] if array.ndim == 2 else len(names)
        whole = self.chosen_from
        if whole is not None and width == whole.count:
            names = [whole.column(position).name for position in range(width)]
        elif names and width == self.features != len(names):
            raise InvalidArgument(
                f"rows have {number_of(width, 'value')}, the model needs the "
                f"{number_of(len(names), 'column')} "
                f"{listed(names)}; rows that are encoded already go to predict_prepared"
            )
        return frame_of_objects(array, names)

    @property
    def _has_names(self) -> bool:
        """Whether the columns of the training data had names of their own."""
        return bool(self.columns if self.chosen_from is None else self.chosen_from.named)

    @cached_property
    def _positions(self) -> list[int]:
        """Where the columns of the model stand among those of the training data."""
        assert self.chosen_from is not None
        found = [self.chosen_from.position(column.name) for column in self.columns]
        return [position for position in found if position is not None]

    @cached_property
    def _picker(self) -> FeaturePicker:
        """Takes the model's features out of rows of numbers, a feature for each column."""
        assert self.chosen_from is not None
        runs = merged(range(position, position + 1) for position in self._positions)
        return FeaturePicker(runs, self.chosen_from.count)

    def _options(self) -> IngestOptions:
        # Sparse text says nothing of features behind the last one that is not zero.
        width = self.chosen_from.count if self.chosen_from else None
        return IngestOptions(missing_markers=self.missing_markers, feature_count=width)


def _frame_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows by column name as columns; what a row lacks is a missing value."""
    names = dict.fromkeys(str(name) for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
