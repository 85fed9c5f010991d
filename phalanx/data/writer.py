"""Encoded rows into chunks, and chunks into a blob store."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from phalanx.data.chunks import encode_csr, encode_dense
from phalanx.data.manifest import ChunkInfo, Statistics
from phalanx.data.options import CHUNK_BYTES_MAXIMUM, PIECE_ROWS, ChunkSize
from phalanx.data.statistics import accumulator
from phalanx.errors import InvalidArgument
from phalanx.files import replace_content
from phalanx.texts import number_of

_TARGET_BYTES = 8


class BlobSink(Protocol):
    """Where chunks go: a storage service, or a folder."""

    def put(self, data: bytes) -> str:
        """Stores the bytes and returns their lower-case hex SHA-256."""
        ...


class DirectoryBlobs:
    """Blobs as files of one folder, named by their digests; for work without a storage service."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Stores the bytes and returns their lower-case hex SHA-256."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        if not path.exists():
            replace_content(path, data)
        return digest

    def path(self, digest: str) -> Path:
        """The file of a blob; usable as the reader's ``fetch``."""
        return self.root / digest


class SplitWriter(Protocol):
    """Takes the rows of one split in order and cuts them into chunks."""

    def add(self, features: Any, targets: NDArray[Any]) -> None:
        """Appends rows: features as the format has them, and one target each."""
        ...

    def finish(self) -> tuple[ChunkInfo, ...]:
        """Writes what is left and returns all chunks in order."""
        ...


class DenseWriter:
    """Cuts dense rows into chunks of one size; the cuts depend on nothing else."""

    def __init__(
        self,
        sink: BlobSink,
        features: int,
        dtype: str,
        target_dtype: str,
        chunk_size: ChunkSize,
        classes: int,
    ) -> None:
        row_bytes = features * np.dtype(dtype).itemsize + _TARGET_BYTES
        if row_bytes > CHUNK_BYTES_MAXIMUM:
            raise InvalidArgument(
                f"a row of {number_of(features, 'feature')} takes {row_bytes} bytes, more than a "
                f"chunk may hold ({CHUNK_BYTES_MAXIMUM}); use the csr layout or fewer features"
            )
        wanted = max(PIECE_ROWS, -(-chunk_size.least_bytes // row_bytes))
        rows = max(1, min(wanted, chunk_size.most_bytes // row_bytes))
        self._sink = sink
        self._classes = classes
        self._features: NDArray[Any] = np.empty((rows, features), dtype=dtype)
        self._targets: NDArray[Any] = np.empty(rows, dtype=target_dtype)
        self._filled = 0
        self._chunks: list[ChunkInfo] = []

    def add(self, features: NDArray[Any], targets: NDArray[Any]) -> None:
        """Appends rows by features and their targets."""
        taken = 0
        while taken < len(targets):
            count = min(len(targets) - taken, len(self._targets) - self._filled)
            here = slice(self._filled, self._filled + count)
            self._features[here] = features[taken : taken + count]
            self._targets[here] = targets[taken : taken + count]
            self._filled += count
            taken += count
            if self._filled == len(self._targets):
                self._flush()

    def finish(self) -> tuple[ChunkInfo, ...]:
        """Writes what is left and returns all chunks in order."""
        if self._filled:
            self._flush()
        return tuple(self._chunks)

    def _flush(self) -> None:
        rows = self._filled
        targets = self._targets[:rows]
        data = encode_dense(self._features[:rows], targets)
        class_rows = _class_rows(targets, self._classes)
        self._chunks.append(ChunkInfo(self._sink.put(data), rows, len(data), 0, class_rows))
        self._filled = 0


class CsrWriter:
    """Cuts sparse rows where a chunk is large enough, or would become too large."""

    def __init__(
        self, sink: BlobSink, dtype: str, target_dtype: str, chunk_size: ChunkSize, classes: int
    ) -> None:
        self._sink = sink
        self._classes = classes
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._target_dtype: np.dtype[Any] = np.dtype(target_dtype)
        self._size = chunk_size
        self._pending: list[tuple[scipy.sparse.csr_array, NDArray[Any]]] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._chunks: list[ChunkInfo] = []

    def add(self, features: scipy.sparse.csr_array, targets: NDArray[Any]) -> None:
        """Appends sparse rows and their targets."""
        lengths = np.diff(features.indptr).astype(np.int64)
        value_bytes = self._dtype.itemsize + 4
        ends = np.cumsum(lengths * value_bytes + 4 + _TARGET_BYTES)
        first = 0
        while first < len(targets):
            before = int(ends[first - 1]) if first else 0
            start = before - self._pending_bytes
            # What is pending is not large enough; it is with these many of the rows.
            with_bytes = int(np.searchsorted(ends, start + self._size.least_bytes)) + 1
            with_rows = first + PIECE_ROWS - self._pending_rows
            too_much = int(np.searchsorted(ends, start + self._size.most_bytes, side="right"))
            stop = min(max(with_bytes, with_rows), too_much, len(targets))
            if stop > first:
                self._pending.append((features[first:stop], targets[first:stop]))
                self._pending_rows += stop - first
                self._pending_bytes += int(ends[stop - 1]) - before
                first = stop
                if self._is_large_enough():
                    self._flush()
            elif self._pending:
                self._flush()
            else:
                self._add_wide_row(features[first : first + 1], targets[first : first + 1])
                first += 1

    def finish(self) -> tuple[ChunkInfo, ...]:
        """Writes what is left and returns all chunks in order."""
        if self._pending:
            self._flush()
        return tuple(self._chunks)

    def _is_large_enough(self) -> bool:
        return self._pending_rows >= PIECE_ROWS and self._pending_bytes >= self._size.least_bytes

    def _add_wide_row(self, row: scipy.sparse.csr_array, target: NDArray[Any]) -> None:
        """A row that alone is over the size of a chunk is one, if a chunk can hold it."""
        if row.nnz * (self._dtype.itemsize + 4) > CHUNK_BYTES_MAXIMUM - 64:
            raise InvalidArgument(
                f"a row with {row.nnz} values is larger than a chunk may be "
                f"({CHUNK_BYTES_MAXIMUM} bytes)"
            )
        self._pending.append((row, target))
        self._flush()

    def _flush(self) -> None:
        lengths = np.concatenate([np.diff(rows.indptr) for rows, _ in self._pending])
        targets = np.concatenate([part for _, part in self._pending])
        indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=indptr[1:])
        data = encode_csr(
            np.concatenate([rows.data for rows, _ in self._pending]).astype(self._dtype),
            np.concatenate([rows.indices for rows, _ in self._pending]),
            indptr,
            targets.astype(self._target_dtype),
        )
        self._chunks.append(
            ChunkInfo(
                self._sink.put(data),
                len(targets),
                len(data),
                nonzeros=int(indptr[-1]),
                class_rows=_class_rows(targets, self._classes),
            )
        )
        self._pending = []
        self._pending_rows = 0
        self._pending_bytes = 0


class DatasetWriter:
    """Writers of the three splits, and the statistics of the first.

    Features come dense or sparse, whatever the source has, and are stored as ``sparse`` says.
    ``classes`` is 0 for a regression.
    """

    def __init__(
        self,
        sink: BlobSink,
        *,
        features: int,
        sparse: bool,
        dtype: str,
        target_dtype: str,
        chunk_size: ChunkSize,
        splits: int,
        classes: int,
    ) -> None:
        self._sparse = sparse
        self._dtype = dtype
        self._writers: Sequence[SplitWriter] = [
            split_writer(
                sink,
                features=features,
                sparse=sparse,
                dtype=dtype,
                target_dtype=target_dtype,
                chunk_size=chunk_size,
                classes=classes,
            )
            for _ in range(splits)
        ]
        self._statistics = accumulator(features, sparse)

    def add(self, features: Any, targets: NDArray[Any], codes: NDArray[np.int8]) -> None:
        """Appends rows, each to the split that its code names; code 0 is train."""
        features = stored(features, self._sparse, self._dtype)
        for code in np.unique(codes):
            where = codes == code
            some = (features, targets) if where.all() else (features[where], targets[where])
            if code == 0:
                self._statistics.add(some[0])
            self._writers[code].add(*some)

    def finish(self) -> tuple[list[tuple[ChunkInfo, ...]], Statistics]:
        """Chunks of each split in order, and the statistics of train."""
        return [writer.finish() for writer in self._writers], self._statistics.result()


def split_writer(
    sink: BlobSink,
    *,
    features: int,
    sparse: bool,
    dtype: str,
    target_dtype: str,
    chunk_size: ChunkSize,
    classes: int,
) -> SplitWriter:
    """Make the writer of one split; it takes features as ``stored`` gives them."""
    if sparse:
        return CsrWriter(sink, dtype, target_dtype, chunk_size, classes)
    return DenseWriter(sink, features, dtype, target_dtype, chunk_size, classes)


def stored(features: Any, sparse: bool, dtype: str) -> Any:
    """Features, dense or sparse, as chunks hold them."""
    if sparse:
        rows = scipy.sparse.csr_array(features, dtype=np.dtype(dtype))
        rows.sum_duplicates()
        return rows
    if scipy.sparse.issparse(features):
        features = features.toarray()
    return features.astype(np.dtype(dtype), copy=False)


def _class_rows(targets: NDArray[Any], classes: int) -> tuple[int, ...]:
    if not classes:
        return ()
    return tuple(np.bincount(targets, minlength=classes).tolist())
