"""Chunks of a linked data set, made again from the files that it names."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from phalanx.data.formats.parquet_rows import DecodedBatches, ParquetRows
from phalanx.data.link_plans import ChunkPlace
from phalanx.data.linked_files import CHANGED, open_linked, reading
from phalanx.data.links import LinkedFile, Links
from phalanx.data.manifest import SPLITS, ColumnKind, DatasetManifest
from phalanx.data.options import CHUNK_BYTES_MAXIMUM, ChunkSize, IngestOptions
from phalanx.data.scan import select
from phalanx.data.sources import TableBatch
from phalanx.data.splits import Splitter
from phalanx.data.table_encoder import TableEncoder
from phalanx.data.targets import Target
from phalanx.data.writer import split_writer, stored
from phalanx.errors import FailedPrecondition, PhalanxError, Unavailable
from phalanx.texts import number_of

_OPEN_FILES = 16


class OpenFiles:
    """Linked files that are open, and what was decoded of them.

    ``roots`` are the folders below which files may lie. A file that is not any more what it was
    when it was opened is opened, and looked at, anew. Not for use by several threads at once.
    """

    def __init__(self, roots: Sequence[str], kept_bytes: int) -> None:
        self._roots = tuple(roots)
        self._kept = DecodedBatches(kept_bytes)
        self._open: OrderedDict[LinkedFile, tuple[tuple[int, ...], ParquetRows]] = OrderedDict()

    def open(self, file: LinkedFile) -> ParquetRows:
        """The rows of a file that is what it was when it was linked.

        Raises FailedPrecondition, Unavailable (see ``open_linked``).
        """
        descriptor = open_linked(file, self._roots)
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        before = self._open.get(file)
        if before is not None and before[0] == identity:
            os.close(descriptor)
            self._open.move_to_end(file)
            return before[1]
        self.let_go(file)
        with reading(file.path):
            rows = ParquetRows(
                os.fdopen(descriptor, "rb", buffering=0), file.path, identity, self._kept
            )
        if rows.rows != file.rows:
            rows.close()
            raise FailedPrecondition(
                f"{file.path} has {number_of(rows.rows, 'row')}, the manifest says {file.rows}",
                reason=CHANGED,
            )
        self._open[file] = identity, rows
        while len(self._open) > _OPEN_FILES:
            self.let_go(next(iter(self._open)))
        return rows

    def close(self) -> None:
        """Close all files."""
        for file in list(self._open):
            self.let_go(file)

    def let_go(self, file: LinkedFile) -> None:
        """Close a file if it is open."""
        opened = self._open.pop(file, None)
        if opened is not None:
            opened[1].close()


class ChunkMaker:
    """Makes chunks of one linked data set; ``plan`` is ``plan_of`` its manifest."""

    def __init__(self, plan: DatasetManifest, files: OpenFiles) -> None:
        assert plan.links is not None
        self._plan = plan
        self._links: Links = plan.links
        self._files = files
        self._options = IngestOptions(missing_markers=plan.missing_markers)
        target = Target(plan.target, plan.task, plan.classes, plan.class_kind)
        self._target = target
        self._wanted: dict[str, ColumnKind] = {column.name: column.kind for column in plan.columns}
        # Classes keep the kind of the column that they come from.
        is_text = bool(plan.classes) and plan.class_kind == "text"
        self._wanted[plan.target] = "categorical" if is_text else "numeric"

    def check(self, first: int = 0, stop: int | None = None) -> None:
        """Look whether files [first, stop) can be read; raises as ``open_linked`` does."""
        for file in self._links.all_files()[first:stop]:
            self._files.open(file)

    def make(self, place: ChunkPlace) -> bytes:
        """The bytes of a chunk, if the files are what they were; otherwise they may be others.

        Raises PhalanxError where a file cannot be read or its rows cannot be encoded; Unavailable
        where that may pass.
        """
        made = _OneChunk()
        encoder = TableEncoder(
            self._plan.columns, self._target, self._links.trim_labels, self._plan.dtype
        )
        sparse = self._plan.format == "csr"
        writer = split_writer(
            made,
            features=encoder.width,
            sparse=sparse,
            dtype=self._plan.dtype,
            target_dtype=encoder.target_dtype,
            # Where it ends is given, so that it is not cut before.
            chunk_size=ChunkSize(CHUNK_BYTES_MAXIMUM, CHUNK_BYTES_MAXIMUM),
            classes=len(self._plan.classes),
        )
        for batch in self._rows(place):
            for _, features, targets in encoder.pieces(batch):
                writer.add(stored(features, sparse, self._plan.dtype), targets)
        writer.finish()
        return made.data

    def _rows(self, place: ChunkPlace) -> Iterator[TableBatch]:
        """The rows of a chunk in order."""
        files = self._links.files_of(place.split)
        code = SPLITS.index(place.split)
        splitter = Splitter(0)
        if place.split not in self._links.held_out:
            splitter = Splitter(self._plan.seed, self._links.test, self._links.validation)
        total = sum(file.rows for file in files)
        start = 0
        for file in files:
            begin, end = max(place.first, start), min(place.stop, start + file.rows)
            if begin < end:
                for batch in self._read(file, begin - start, end - start):
                    if splitter.deals:
                        codes = splitter.codes(begin, begin + batch.rows, total)
                        yield _taken(batch, np.flatnonzero(codes == code))
                    else:
                        yield batch
                    begin += batch.rows
            start += file.rows

    def _read(self, file: LinkedFile, first: int, stop: int) -> Iterator[TableBatch]:
        """Rows [first, stop) of a file; raises Unavailable where that is not to be told."""
        try:
            with reading(file.path):
                opened = self._files.open(file)
                yield from opened.batches(self._wanted, self._options, first, stop)
        except Unavailable:
            # A handle that went stale stays so.
            self._files.let_go(file)
            raise


class _OneChunk:
    """A BlobSink for the one chunk that is being made."""

    def __init__(self) -> None:
        self.data = b""

    def put(self, data: bytes) -> str:
        if self.data:
            raise _too_large()
        self.data = data
        return ""


def _too_large() -> PhalanxError:
    return FailedPrecondition("the rows of a chunk are more than one chunk holds", reason=CHANGED)


def _taken(batch: TableBatch, rows: Any) -> TableBatch:
    """Some rows of a batch."""
    columns = {}
    where = batch.where
    for name, values in batch.columns.items():
        columns[name], where = select(values, batch.where, rows)
    return TableBatch(len(rows), columns, where)
