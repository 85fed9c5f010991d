"""Adding a data set: from files or arrays to chunks and a manifest, in bounded memory.

Two passes over the data: the first learns what an encoding needs (vocabularies, means, classes)
from the train split alone, the second encodes. A pass that would learn nothing is left out. Which
row belongs to which split is a function of its number, so both passes agree without remembering
anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phalanx.data.doubts import refuse_names
from phalanx.data.formats.tables import ParquetTable
from phalanx.data.linking import Digests, Linking, refuse_format, refuse_urls
from phalanx.data.manifest import ChunkInfo, Column, ColumnKind, DatasetManifest, Format
from phalanx.data.opening import format_of, open_memory, open_paths
from phalanx.data.options import IngestOptions
from phalanx.data.scan import ArrayEncoder, ArrayScan, ColumnScan, refuse_missing, select
from phalanx.data.sources import (
    TARGET,
    ArrayBatch,
    ArrayShape,
    ArraySource,
    Opened,
    Source,
    TableBatch,
    TableShape,
    TableSource,
)
from phalanx.data.splits import TEST, TRAIN, VALIDATION, Splitter, deal, split_name
from phalanx.data.statistics import FEATURE_LIMIT, coarse_features, without_statistics
from phalanx.data.table_encoder import TableEncoder
from phalanx.data.targets import Target, TargetEncoder, TargetScan
from phalanx.data.wording import option
from phalanx.data.writer import BlobSink, DatasetWriter
from phalanx.errors import InvalidArgument, Violation
from phalanx.texts import listed, number_of

DENSE_FEATURE_LIMIT = 1_000_000
_NAMES_SHOWN = 8


def ingest(
    paths: Sequence[str | Path] | str | Path, options: IngestOptions, sink: BlobSink
) -> DatasetManifest:
    """Writes the files' rows as chunks to ``sink``; returns the manifest, which it does not write.

    Memory stays bounded whatever the size of the files (an NPZ array in Fortran order excepted).
    Raises NotFound for a missing file, and InvalidArgument, with file, line or row, column and
    value, for anything in the data that has no stated meaning.
    """
    chosen = [paths] if isinstance(paths, str | Path) else paths
    files = [Path(path) for path in chosen]
    refuse_urls(files, options)
    opened = open_paths(files, options)
    format_name = options.format or format_of(files)
    if options.link:
        refuse_format(format_name)
    held_out = _held_out_files(opened, options, format_name)
    if options.link:
        return _link(opened.main, held_out, options)
    return _ingest(opened.main, held_out, options, sink)


def _link(main: Source, held_out: "HeldOut", options: IngestOptions) -> DatasetManifest:
    """The same manifest with links instead of stored chunks."""
    others: dict[str, ParquetTable] = {}
    for code, source in held_out:
        if not isinstance(source, ParquetTable):
            refuse_format("files of another format that hold a split")
        else:
            others[split_name(code)] = source
    assert isinstance(main, ParquetTable)
    linking = Linking(main, others)
    manifest = _ingest(main, held_out, options, Digests())
    return replace(
        manifest,
        links=linking.links(manifest, options),
        notes=(*manifest.notes, *linking.notes()),
    )


def ingest_arrays(
    features: Any,
    targets: Any,
    options: IngestOptions,
    sink: BlobSink,
    *,
    feature_names: Sequence[str] = (),
    test: tuple[Any, Any] | None = None,
    validation: tuple[Any, Any] | None = None,
) -> DatasetManifest:
    """The same for objects in memory (see ``opening.open_memory``), which cannot be linked.

    ``test`` and ``validation`` are (features, targets) of a split of their own; fractions are said
    in the options.
    """
    if options.link:
        message = "only Parquet files can be linked, not objects in memory"
        raise InvalidArgument(f"link: {message}", violations=(Violation("link", message),))
    main = open_memory(features, targets, options, feature_names).main
    held_out = [
        (code, open_memory(*pair, options, feature_names).main)
        for code, pair in ((VALIDATION, validation), (TEST, test))
        if pair is not None
    ]
    if test is not None and options.test is not None:
        raise InvalidArgument("the test split is given twice, as data and in the options")
    if validation is not None and options.validation is not None:
        raise InvalidArgument("the validation split is given twice, as data and in the options")
    return _ingest(main, held_out, options, sink)


HeldOut = Sequence[tuple[int, Source]]


def _held_out_files(
    opened: Opened, options: IngestOptions, format_name: str
) -> list[tuple[int, Source]]:
    held_out: list[tuple[int, Source]] = []
    names: tuple[tuple[int, Literal["test", "validation"]], ...] = (
        (VALIDATION, "validation"),
        (TEST, "test"),
    )
    for code, name in names:
        paths = options.paths(name)
        if paths:
            held_out.append((code, open_paths(paths, options, opened.main, format_name).main))
    if opened.test is not None:
        if options.test is not None:
            raise InvalidArgument(
                f"the files hold a test split already; leave out {option('test')}"
            )
        held_out.append((TEST, opened.test))
    return held_out


def _ingest(
    main: Source, held_out: HeldOut, options: IngestOptions, sink: BlobSink
) -> DatasetManifest:
    splitter = Splitter(options.seed, options.fraction("test"), options.fraction("validation"))
    shape = main.shape
    for _, source in held_out:
        if isinstance(source.shape, TableShape) != isinstance(shape, TableShape):
            raise InvalidArgument("all splits must come as tables, or all as arrays")
    _check_options(options, is_table=isinstance(shape, TableShape))
    if isinstance(shape, TableShape):
        return _TableIngest(main, held_out, options, splitter, sink).run()
    return _ArrayIngest(main, held_out, options, splitter, sink).run()


_OF_TABLES = (
    "target", "header", "columns", "delimiter", "comment", "categorical", "numeric", "ignore"
)  # fmt: skip
_OF_ARRAYS = ("features_key", "target_key", "feature_count")


def _check_options(options: IngestOptions, *, is_table: bool) -> None:
    """Raises InvalidArgument for what was said and would be passed over."""
    what, names = ("a table", _OF_ARRAYS) if is_table else ("arrays", _OF_TABLES)
    wrong = [name for name in names if getattr(options, name) not in (None, ())]
    if wrong:
        message = f"has no meaning for {what}"
        raise InvalidArgument(
            f"{option(wrong[0])} {message}", violations=[Violation(name, message) for name in wrong]
        )


@dataclass
class _Ingest:
    """What tables and arrays have in common."""

    main: Any
    held_out: Sequence[tuple[int, Any]]
    options: IngestOptions
    splitter: Splitter
    sink: BlobSink

    def _writer(
        self, features: int, sparse: bool, dtype: str, target_dtype: str, classes: int
    ) -> DatasetWriter:
        return DatasetWriter(
            self.sink,
            features=features,
            sparse=sparse,
            dtype=dtype,
            target_dtype=target_dtype,
            chunk_size=self.options.chunk_size(),
            splits=3,
            classes=classes,
        )

    def _manifest(
        self,
        writer: DatasetWriter,
        target: Target,
        *,
        features: int,
        sparse: bool,
        dtype: str,
        columns: tuple[Column, ...],
        notes: Sequence[str],
    ) -> DatasetManifest:
        chunks, statistics = writer.finish()
        splits: dict[str, tuple[ChunkInfo, ...]] = {
            split_name(code): part for code, part in enumerate(chunks) if part
        }
        self._check_splits(splits)
        layout: Format = "csr" if sparse else "dense"
        files = [*self.main.files]
        for _, source in self.held_out:
            files.extend(source.files)
        if target.note:
            notes = (*notes, target.note)
        manifest = DatasetManifest(
            format=layout,
            dtype=dtype,
            features=features,
            task=target.task,
            target=target.name,
            splits=splits,
            statistics=statistics,
            columns=columns,
            classes=target.classes,
            class_kind=target.class_kind,
            missing_markers=self.options.missing_markers if columns else (),
            source=tuple(files),
            seed=self.options.seed,
            notes=tuple(notes),
        )
        _check_statistics(manifest)
        coarse = _note_of_coarse_features(manifest)
        return replace(manifest, notes=(*manifest.notes, coarse)) if coarse else manifest

    def _check_splits(self, splits: dict[str, tuple[ChunkInfo, ...]]) -> None:
        if "train" not in splits:
            raise InvalidArgument("no row is left for the train split")
        wanted = [split_name(code) for code, _ in self.held_out]
        wanted += [name for name in ("test", "validation") if getattr(self.options, name)]
        for name in wanted:
            if name not in splits:
                raise InvalidArgument(f"the {name} split has no row; choose a larger fraction")


def _check_statistics(manifest: DatasetManifest) -> None:
    """Raise InvalidArgument for numbers whose squares are beyond all numbers."""
    statistics = manifest.statistics
    feature = without_statistics(statistics)
    if feature is not None:
        largest = max(abs(statistics.minimum[feature]), abs(statistics.maximum[feature]))
        name = manifest.feature_names()[feature]
        raise InvalidArgument(
            f"feature {name} has values up to {largest:.3g}, too large for a standard deviation; "
            "divide them all by a power of ten",
            reason="NOT_FINITE",
        )


def _note_of_coarse_features(manifest: DatasetManifest) -> str:
    """What float32 takes from numbers that lie close together and far from zero; else nothing."""
    coarse = coarse_features(manifest.statistics) if manifest.dtype == "float32" else []
    if not coarse:
        return ""
    names = manifest.feature_names()
    told = listed([f"{names[feature]} (steps of {step:g})" for feature, step in coarse], 5)
    return (
        f"float32 rounds away most of how these features vary: {told}; subtract what all rows have "
        f"in common first, or add and train in float64 ({option('dtype', 'float64')})"
    )


class _TableIngest(_Ingest):
    """Named columns: CSV, Parquet, frames."""

    main: TableSource
    held_out: Sequence[tuple[int, TableSource]]

    def run(self) -> DatasetManifest:
        shape = self.main.shape
        refuse_names(shape.names)
        target_name, notes = self._target(shape)
        ignored = {target_name, *self.options.ignore, *shape.left_out}
        names = tuple(name for name in shape.names if name not in ignored)
        if not names:
            raise InvalidArgument("no column is left to learn from")
        columns, target = self._scan(shape, names, target_name)
        encoder = TableEncoder(columns, target, self.options.trim_labels, self.options.dtype)
        if encoder.width > DENSE_FEATURE_LIMIT:
            raise InvalidArgument(
                f"{number_of(encoder.width, 'feature')} are more than {DENSE_FEATURE_LIMIT}"
            )
        sparse = self.options.layout == "csr"
        writer = self._writer(
            encoder.width, sparse, self.options.dtype, encoder.target_dtype, len(target.classes)
        )
        kinds = {name: shape.kinds[name] for name in (*names, target_name)}
        for batch, codes in self._all_rows(kinds):
            for rows, features, targets in encoder.pieces(batch):
                writer.add(features, targets, codes[rows])
        return self._manifest(
            writer,
            target,
            features=encoder.width,
            sparse=sparse,
            dtype=self.options.dtype,
            columns=columns,
            notes=(
                *shape.notes,
                *notes,
                *self._notes_of_categories(columns),
                *self._notes_of_splits(),
                *encoder.remarks(),
            ),
        )

    def _notes_of_categories(self, columns: Sequence[Column]) -> list[str]:
        """Which columns were taken for categories without being asked to."""
        taken = [
            column
            for column in columns
            if column.kind == "categorical" and column.name not in self.options.categorical
        ]
        if not taken:
            return []
        width = number_of(sum(column.width for column in taken), "feature")
        what = f"{number_of(len(taken), 'column')} of words as categories, {width} in all"
        names = listed([column.name for column in taken], _NAMES_SHOWN)
        return [f"{what}: {names} (option `numeric` overrules)"]

    def _notes_of_splits(self) -> list[str]:
        return [note for _, source in self.held_out for note in source.shape.notes]

    def _target(self, shape: TableShape) -> tuple[str, tuple[str, ...]]:
        """Name of the target column, and a note where it was assumed."""
        wanted, names = self.options.target, shape.names
        unknown = [name for name in self.options.ignore if name not in names]
        if unknown:
            raise InvalidArgument(
                f"there is no column {unknown[0]!r} to ignore; the columns are {', '.join(names)}"
            )
        if wanted is None:
            ignored = {*self.options.ignore, *shape.left_out}
            kept = [name for name in names if name not in ignored]
            if not kept:
                raise InvalidArgument("no column is left to predict")
            last = kept[-1]
            return last, (f"the target is the last column, {last!r} (option `target` overrules)",)
        if wanted in names:
            return str(wanted), ()
        try:
            number = int(wanted)
        except ValueError:
            number = 0
        if number == 0 or abs(number) > len(names):
            raise InvalidArgument(
                f"there is no target column {wanted!r}; the columns are {', '.join(names)}"
            )
        return names[number - 1 if number > 0 else number], ()

    def _scan(
        self, shape: TableShape, names: tuple[str, ...], target_name: str
    ) -> tuple[tuple[Column, ...], Target]:
        options = self.options
        target = TargetScan(
            target_name, options.task, target_name in shape.booleans, options.trim_labels
        )
        scans = {
            name: ColumnScan(
                name,
                shape.kinds[name],
                options.missing,
                options.max_categories,
                meant=name in options.categorical,
            )
            for name in names
        }
        # Without replacement of missing values a numeric column has nothing to teach.
        studied = {
            name: shape.kinds[name]
            for name in names
            if shape.kinds[name] == "categorical" or options.missing != "error"
        }
        wanted = {**studied, target_name: shape.kinds[target_name]}
        if studied or options.task != "regression":
            for batch, codes in deal(self.main.batches(wanted), self.splitter):
                if options.missing == "error":
                    refuse_missing({name: batch.columns[name] for name in studied}, batch.where)
                train = np.flatnonzero(codes == TRAIN)
                if not len(train):
                    continue
                target.add(*select(batch.columns[target_name], batch.where, train))
                for name in studied:
                    scans[name].add(*select(batch.columns[name], batch.where, train))
                if target.settled and not studied:
                    break
        # Without rows the target's message is the one that helps.
        learned = target.result()
        return tuple(scan.result() for scan in scans.values()), learned

    def _all_rows(
        self, wanted: Mapping[str, ColumnKind]
    ) -> Iterator[tuple[TableBatch, NDArray[np.int8]]]:
        yield from deal(self.main.batches(wanted), self.splitter)
        for code, source in self.held_out:
            for batch in source.batches(wanted):
                yield batch, np.full(batch.rows, code, dtype=np.int8)


class _ArrayIngest(_Ingest):
    """Arrays: NPZ, safetensors, idx, LIBSVM, NumPy, SciPy."""

    main: ArraySource
    held_out: Sequence[tuple[int, ArraySource]]

    def run(self) -> DatasetManifest:
        shape = self.main.shape
        columns, target, features = self._scan(shape)
        shapes = [shape, *(source.shape for _, source in self.held_out)]
        for other in shapes[1:]:
            if other.features not in {None, features}:
                raise InvalidArgument(
                    f"the splits differ in width: {features} and "
                    f"{number_of(other.features, 'feature')}"
                )
        sparse = shape.sparse if self.options.layout == "auto" else self.options.layout == "csr"
        whole_bytes = all(each.whole_bytes for each in shapes) and not sparse and not shape.sparse
        dtype = "uint8" if whole_bytes else self.options.dtype
        encoder = ArrayEncoder(columns, dtype)
        targets = TargetEncoder(target, self.options.trim_labels)
        writer = self._writer(features, sparse, dtype, targets.dtype, len(target.classes))
        for batch, codes in self._all_rows():
            encoded = encoder.encode(_widened(batch, features), batch.where)
            writer.add(encoded, targets.encode(batch.targets, batch.where), codes)
        return self._manifest(
            writer,
            target,
            features=features,
            sparse=sparse,
            dtype=dtype,
            columns=columns,
            notes=shape.notes,
        )

    def _scan(self, shape: ArrayShape) -> tuple[tuple[Column, ...], Target, int]:
        options = self.options
        task = options.task or ("classification" if shape.labels else None)
        target = TargetScan(TARGET, task, shape.boolean_target, options.trim_labels)
        fills = options.missing != "error" and not shape.sparse
        if fills and (shape.features or 0) > FEATURE_LIMIT:
            raise InvalidArgument(
                f"missing values of more than {FEATURE_LIMIT} features stay errors"
            )
        means = ArrayScan(shape.features) if fills and shape.features else None
        width = shape.features or 0
        if means or shape.features is None or task != "regression":
            for batch, codes in deal(self.main.batches(), self.splitter):
                if shape.features is None:
                    width = max(width, batch.features.shape[1])
                train = np.flatnonzero(codes == TRAIN)
                if not len(train):
                    continue
                target.add(*select(batch.targets, batch.where, train))
                if means:
                    means.add(batch.features[train])
                if target.settled and not means and shape.features is not None:
                    break
        learned = target.result()
        if not width:
            raise InvalidArgument("the data has no features")
        columns: tuple[Column, ...] = ()
        if means:
            columns = means.columns(shape.names, options.missing)
        elif shape.names:
            columns = tuple(Column(name) for name in shape.names)
        return columns, learned, width

    def _all_rows(self) -> Iterator[tuple[ArrayBatch, NDArray[np.int8]]]:
        yield from deal(self.main.batches(), self.splitter)
        for code, source in self.held_out:
            for batch in source.batches():
                yield batch, np.full(batch.rows, code, dtype=np.int8)


def _widened(batch: ArrayBatch, features: int) -> Any:
    """The rows at the full width; sparse batches are only as wide as their highest index."""
    rows = batch.features
    if rows.shape[1] == features:
        return rows
    if rows.shape[1] > features:
        too_wide = np.flatnonzero(rows.indices >= features)[0]
        row = int(np.searchsorted(rows.indptr, too_wide, side="right")) - 1
        index = int(rows.indices[too_wide]) + 1
        raise InvalidArgument(
            f"{batch.where(row, f'index {index}')}: the train data has "
            f"{number_of(features, 'feature')}; say {option('feature_count')} with the full width"
        )
    return type(rows)((rows.data, rows.indices, rows.indptr), shape=(rows.shape[0], features))
