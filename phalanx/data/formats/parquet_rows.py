"""Any rows of a Parquet file, in bounded memory.

Parquet cannot be entered anywhere but at the start of a row group, so rows in the middle cost the
decoding of what comes before them in their group. What was decoded on the way is kept while there
is room, and decoding goes on where it stopped: chunks lie side by side, and whoever wants one
mostly wants its neighbours too.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from phalanx.data.formats.tables import READ_BYTES, batch_rows, check_present, table_batches
from phalanx.data.manifest import ColumnKind
from phalanx.data.options import IngestOptions
from phalanx.data.sources import TableBatch
from phalanx.errors import InvalidArgument

BatchKey = tuple[Any, ...]


class DecodedBatches:
    """Decoded pieces of files, the least recently used of which go when there are too many.

    Together they take ``limit_bytes`` at most.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._batches: OrderedDict[BatchKey, Any] = OrderedDict()

    def get(self, key: BatchKey) -> Any | None:
        """A batch that is still there."""
        batch = self._batches.get(key)
        if batch is not None:
            self._batches.move_to_end(key)
        return batch

    def put(self, key: BatchKey, batch: Any) -> None:
        """Keep a batch unless it is larger than all of them may be."""
        if key in self._batches or batch.nbytes > self._limit_bytes:
            return
        self._batches[key] = batch
        self._size_bytes += batch.nbytes
        while self._size_bytes > self._limit_bytes:
            _, oldest = self._batches.popitem(last=False)
            self._size_bytes -= oldest.nbytes


class ParquetRows:
    """The rows of one open file; ``identity`` tells its batches from those of others.

    Raises InvalidArgument when it is not a Parquet file. Memory holds, beside ``kept``, one batch
    of the wanted columns and a page of each.
    """

    def __init__(self, file: BinaryIO, name: str, identity: BatchKey, kept: DecodedBatches) -> None:
        self._name = name
        self._identity = identity
        self._kept = kept
        self._raw = file
        self._cursor: _Cursor | None = None
        try:
            self._file = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
        except (pa.ArrowException, OSError) as error:
            file.close()
            raise InvalidArgument(f"{name} is not a Parquet file: {error}") from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._starts: list[int] = list(accumulate(sizes, initial=0))

    @property
    def rows(self) -> int:
        """How many rows the file has."""
        return self._starts[-1]

    def batches(
        self, wanted: Mapping[str, ColumnKind], options: IngestOptions, first: int, stop: int
    ) -> Iterator[TableBatch]:
        """Rows [first, stop) in order; raises InvalidArgument as ``ParquetTable`` does."""
        check_present(self._name, wanted, self._file.schema_arrow.names)
        for group, start in enumerate(self._starts[:-1]):
            end = self._starts[group + 1]
            if start < stop and first < end:
                begin = max(first, start)
                found = self._group(group, tuple(wanted), begin - start, min(stop, end) - start)
                yield from table_batches(self._name, found, wanted, options, begin)

    def close(self) -> None:
        """Close the file."""
        self._cursor = None
        self._file.close()
        self._raw.close()

    def _group(self, group: int, columns: tuple[str, ...], first: int, stop: int) -> Iterator[Any]:
        """Rows [first, stop) of a row group, as Arrow's batches."""
        step = batch_rows(columns)
        for index in range(first // step, -(-stop // step)):
            start = index * step
            batch = self._kept.get((*self._identity, columns, group, index))
            if batch is None:
                batch = self._read(columns, group, step, index)
            begin, end = max(first - start, 0), min(stop - start, batch.num_rows)
            yield batch.slice(begin, end - begin)

    def _read(self, columns: tuple[str, ...], group: int, step: int, wanted: int) -> Any:
        """A batch of a row group, decoded; from where decoding stopped, if that was before it."""
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor.place != (columns, group) or cursor.index > wanted:
            decoded = self._file.iter_batches(
                step, row_groups=[group], columns=list(columns), use_threads=False
            )
            cursor = _Cursor((columns, group), 0, decoded)
        for batch in cursor.batches:
            index, cursor.index = cursor.index, cursor.index + 1
            self._kept.put((*self._identity, columns, group, index), batch)
            if index == wanted:
                # Not before: whoever failed is not asked to go on.
                self._cursor = cursor
                return batch
        raise InvalidArgument(f"{self._name}: row group {group} ends before its last row")


@dataclass
class _Cursor:
    """Where decoding has stopped, in which row group."""

    place: tuple[tuple[str, ...], int]
    index: int
    batches: Iterator[Any]
