"""Rows of a split, in any order, out of mapped chunks."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from phalanx.data.choice import choose
from phalanx.data.chunks import CsrChunk, DenseChunk, open_chunk
from phalanx.data.manifest import ChunkInfo, DatasetManifest
from phalanx.data.picking import FeaturePicker
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.models.base import Batch
from phalanx.texts import number_of

if TYPE_CHECKING:
    from scipy.sparse import csr_array

OPEN_BYTES = 64 * 2**20
OPEN_CHUNKS = 64
"""What stays mapped, so that the next leaf need not ask for it: some windows of the sampler."""
_ALIGNMENT_BYTES = 64


class Selection(Protocol):
    """Some rows of one chunk of the split, in the order in which they are wanted."""

    @property
    def chunk_index(self) -> int:
        """Which chunk of the split."""
        ...

    @property
    def rows(self) -> NDArray[np.int64]:
        """Which rows of the chunk, or of a class in it."""
        ...

    @property
    def label(self) -> int | None:
        """The class whose rows are counted; None: all rows are."""
        ...


class ChunkReader:
    """Gathers rows of one split.

    ``fetch`` turns a chunk's digest into a local file that holds it; it is called when a chunk is
    first needed, and again if it was dropped since. ``dtype`` is what features (and the targets of
    a regression) are converted to; class indices stay int64. Chunks of at most ``open_bytes``
    together stay mapped, OPEN_CHUNKS at most and the last one anyway; the least recently used goes
    first. ``columns`` are the raw columns that rows are gathered of, by name; without names all.
    Rows are always copied into new, equally aligned arrays: what a leaf computes depends neither on
    where its rows were stored, nor on what stands beside the chosen columns there.

    Not for use by several threads at once.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        split: str,
        fetch: Callable[[str], Path],
        *,
        dtype: DTypeLike = np.float32,
        open_bytes: int = OPEN_BYTES,
        columns: Collection[str] = (),
    ) -> None:
        if split not in manifest.splits:
            known = ", ".join(manifest.splits)
            raise InvalidArgument(f"the data set has no split {split!r}; it has {known}")
        choice = choose(manifest, columns)
        #: The data set as it would be with the chosen columns alone.
        self.manifest = choice.manifest
        self.split = split
        self.chunks: tuple[ChunkInfo, ...] = tuple(manifest.splits[split])
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        #: Rows of each chunk in order.
        self.chunk_rows: tuple[int, ...] = tuple(chunk.rows for chunk in self.chunks)
        self._stored_features = manifest.features
        #: None where all columns are chosen.
        self._picker = None
        if choice.manifest is not manifest:
            self._picker = FeaturePicker(choice.runs, manifest.features)
        self._fetch = fetch
        self._open_bytes_limit = open_bytes
        self._open_bytes = 0
        self._open: OrderedDict[int, DenseChunk | CsrChunk] = OrderedDict()
        #: Where the rows of each class are, for open chunks that are read by class.
        self._by_class: dict[int, list[NDArray[np.int64]]] = {}

    def rows(self, selections: Sequence[Selection]) -> Batch:
        """The rows of the selections one after another.

        Raises InvalidArgument when a selection reaches outside its chunk and DataLoss when a chunk
        is not what the manifest says.
        """
        total = sum(len(selection.rows) for selection in selections)
        targets: NDArray[Any] = np.empty(total, dtype=self._targets_dtype())
        if self.manifest.format == "csr":
            return Batch(features=self._gather_csr(selections, targets), targets=targets)
        features = aligned_empty((total, self.manifest.features), self.dtype)
        position = 0
        for selection in selections:
            chunk, rows = self._located(selection)
            assert isinstance(chunk, DenseChunk)
            stop = position + len(rows)
            index = _as_slice(rows)
            if self._picker is not None:
                self._picker.dense(chunk.features, index, features[position:stop])
            elif isinstance(index, slice) or chunk.features.dtype != self.dtype:
                features[position:stop] = chunk.features[index]
            else:
                # Without a copy in between: mode "raise" would make one, and `_located` has looked.
                np.take(chunk.features, index, axis=0, out=features[position:stop], mode="clip")
            targets[position:stop] = chunk.targets[index]
            position = stop
        return Batch(features=features, targets=targets)

    def close(self) -> None:
        """Lets go of all maps; the reader may be used again."""
        self._open.clear()
        self._open_bytes = 0
        self._by_class.clear()

    def _gather_csr(self, selections: Sequence[Selection], targets: NDArray[Any]) -> "csr_array":
        # Imported here, since a leaf process of dense data should not pay for it.
        from scipy.sparse import csr_array

        lengths: NDArray[np.int64] = np.empty(len(targets), dtype=np.int64)
        gathered: list[tuple[NDArray[Any], NDArray[np.int32]]] = []
        position = 0
        for selection in selections:
            chunk, rows = self._located(selection)
            assert isinstance(chunk, CsrChunk)
            stop = position + len(rows)
            index = _as_slice(rows)
            if isinstance(index, slice):
                bounds = chunk.indptr[index.start : index.stop + 1].astype(np.int64)
                row_lengths = np.diff(bounds)
                where: slice | NDArray[np.int64] = slice(int(bounds[0]), int(bounds[-1]))
            else:
                starts = chunk.indptr[index].astype(np.int64)
                row_lengths = chunk.indptr[index + 1] - starts
                where = _value_positions(starts, row_lengths)
            values, columns = chunk.data[where], chunk.indices[where]
            if self._picker is not None:
                values, columns, row_lengths = self._picker.sparse(values, columns, row_lengths)
            gathered.append((values, columns))
            lengths[position:stop] = row_lengths
            targets[position:stop] = chunk.targets[index]
            position = stop
        count = int(lengths.sum())
        data = aligned_empty((count,), self.dtype)
        indices = aligned_empty((count,), np.dtype(np.int32))
        filled = 0
        for values, columns in gathered:
            data[filled : filled + len(values)] = values
            indices[filled : filled + len(values)] = columns
            filled += len(values)
        indptr = np.zeros(len(targets) + 1, dtype=np.int32)
        np.cumsum(lengths, out=indptr[1:])
        return csr_array((data, indices, indptr), shape=(len(targets), self.manifest.features))

    def _located(self, selection: Selection) -> tuple[DenseChunk | CsrChunk, NDArray[np.int64]]:
        """The chunk of a selection, and which of its rows are meant."""
        chunk, rows, label = self._chunk(selection.chunk_index), selection.rows, selection.label
        of_class = None if label is None else self._rows_of_class(selection.chunk_index, label)
        count = chunk.rows if of_class is None else len(of_class)
        if len(rows) and (rows.min() < 0 or rows.max() >= count):
            raise InvalidArgument(
                f"chunk {selection.chunk_index} of split {self.split!r} has rows 0 to {count - 1}"
                f"{'' if label is None else f' of class {label}'}, "
                f"asked for {rows.min()} to {rows.max()}"
            )
        return chunk, rows if of_class is None else of_class[rows]

    def _rows_of_class(self, index: int, label: int) -> NDArray[np.int64]:
        """Rows of one class in an open chunk, in order."""
        if index not in self._by_class:
            targets, classes = self._open[index].targets, len(self.manifest.classes)
            order = np.argsort(targets, kind="stable")
            ends = np.searchsorted(targets[order], np.arange(1, classes))
            self._by_class[index] = np.split(order, ends)
            counts = tuple(len(rows) for rows in self._by_class[index])
            if counts != self.chunks[index].class_rows:
                raise DataLoss(
                    f"chunk {self.chunks[index].digest[:12]} has not the rows of each class that "
                    "the manifest says; add the data set again"
                )
        return self._by_class[index][label]

    def _chunk(self, index: int) -> DenseChunk | CsrChunk:
        if not 0 <= index < len(self.chunks):
            raise InvalidArgument(
                f"split {self.split!r} has {number_of(len(self.chunks), 'chunk')}, "
                f"none with index {index}"
            )
        chunk = self._open.get(index)
        if chunk is None:
            chunk = self._open_verified(self.chunks[index])
            self._open[index] = chunk
            self._open_bytes += self.chunks[index].size_bytes
            while len(self._open) > 1 and (
                self._open_bytes > self._open_bytes_limit or len(self._open) > OPEN_CHUNKS
            ):
                closed, _ = self._open.popitem(last=False)
                self._open_bytes -= self.chunks[closed].size_bytes
                self._by_class.pop(closed, None)
        self._open.move_to_end(index)
        return chunk

    def _open_verified(self, info: ChunkInfo) -> DenseChunk | CsrChunk:
        chunk = open_chunk(self._fetch(info.digest))
        expected = DenseChunk if self.manifest.format == "dense" else CsrChunk
        if not isinstance(chunk, expected) or chunk.rows != info.rows:
            raise DataLoss(
                f"chunk {info.digest[:12]} is not the {self.manifest.format} chunk of "
                f"{number_of(info.rows, 'row')} that the manifest names"
            )
        if isinstance(chunk, DenseChunk) and chunk.features.shape[1] != self._stored_features:
            raise DataLoss(
                f"chunk {info.digest[:12]} has "
                f"{number_of(chunk.features.shape[1], 'feature')}, "
                f"the manifest says {self._stored_features}"
            )
        return chunk

    def _targets_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int64) if self.manifest.task == "classification" else self.dtype


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array that starts on a cache line.

    Vector kernels may treat the first elements of an unaligned array apart; with one alignment
    everywhere the bits cannot depend on the allocator.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[offset : offset + size_bytes].view(dtype).reshape(shape)


def _as_slice(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Neighbouring rows as a slice, which is one copy instead of a gather."""
    if (
        len(rows)
        and rows[-1] - rows[0] == len(rows) - 1
        and bool((rows[1:] - rows[:-1] == 1).all())
    ):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _value_positions(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of all values of the rows that start and last as given, row after row."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    positions: NDArray[np.int64] = np.arange(len(shift), dtype=np.int64) + shift
    return positions
