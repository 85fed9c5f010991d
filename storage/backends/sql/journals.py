"""Journals."""

from collections.abc import Iterator
from typing import NamedTuple

from phalanx.errors import Aborted
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.leases import check_request_fence
from storage.backends.sql.owners import store_owners
from storage.backends.sql.references import JOURNAL, add_references, drop_references
from storage.backends.sql.rows import STREAMS, next_id
from storage.core import journals
from storage.core.checkpoints import check_owners
from storage.core.garbage import find_digests
from storage.core.journals import READ_BATCH_BYTES, READ_BATCH_RECORDS, StreamState
from storage.core.keys import check_stream


class _Stream(NamedTuple):
    id: int
    state: StreamState


class _Fetched(NamedTuple):
    state: StreamState
    first: int
    rows: list[tuple[int, bytes, int]]


class SqlJournals:
    """A JournalStore; what looks like a digest in a record is noted when it is appended."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, request: pb.AppendJournalRequest) -> int:
        """Append all records or none; return the sequence after the last."""
        journals.check_append(request)
        for owners in request.owners:
            check_owners(owners)
        records = list(request.records)
        references = [(index, find_digests(record)) for index, record in enumerate(records)]
        references = [(index, digests) for index, digests in references if digests]

        def act(connection: Connection) -> int:
            check_request_fence(connection, request)
            stream = _load(connection, request.stream)
            state = stream.state if stream else StreamState()
            after = journals.append(state, request)
            for owners in request.owners:
                store_owners(connection, owners)
            if not records:
                return after.next_sequence
            stream_id = _store(connection, request.stream, stream, after)
            first = state.next_sequence
            connection.executemany(
                "INSERT INTO records (stream, sequence, checksum, payload) VALUES (?, ?, ?, ?)",
                (
                    (
                        stream_id,
                        sequence,
                        journals.record_checksum(request.stream, sequence, record),
                        record,
                    )
                    for sequence, record in enumerate(records, first)
                ),
            )
            for index, digests in references:
                add_references(connection, JOURNAL, str(stream_id), first + index, digests)
            return after.next_sequence

        return self._database.write(act)

    def read(self, request: pb.ReadJournalRequest) -> Iterator[pb.ReadJournalResponse]:
        """Yield the records from a sequence on, in batches."""
        journals.check_read(request)
        return self._read(request)

    def _read(self, request: pb.ReadJournalRequest) -> Iterator[pb.ReadJournalResponse]:
        position = request.from_sequence
        left = request.max_records or None
        is_first = True
        while True:
            fetched = self._fetch(request.stream, position, left)
            if fetched.first != position and not is_first:
                raise Aborted(
                    f"journal {request.stream!r} was truncated while it was read; read again",
                    reason="JOURNAL_TRUNCATED",
                )
            is_first = False
            records = journals.check_records(request.stream, fetched.first, fetched.rows)
            position = fetched.first + len(records)
            if left is not None:
                left -= len(records)
            yield pb.ReadJournalResponse(records=records, next_sequence=fetched.state.next_sequence)
            if left == 0 or position >= fetched.state.next_sequence:
                return

    def truncate(self, request: pb.TruncateJournalRequest) -> None:
        """Drop the records before a sequence."""
        journals.check_truncate(request)

        def act(connection: Connection) -> None:
            check_request_fence(connection, request)
            stream = _load(connection, request.stream)
            after = journals.truncate(stream.state if stream else StreamState(), request)
            if stream is None:
                return
            bound = (stream.id, after.first_sequence)
            connection.execute("DELETE FROM records WHERE stream = ? AND sequence < ?", bound)
            connection.execute(
                "DELETE FROM blob_references WHERE kind = ? AND owner = ? AND position < ?",
                (JOURNAL, str(stream.id), after.first_sequence),
            )
            _store(connection, request.stream, stream, after)

        self._database.write(act)

    def delete(self, request: pb.DeleteJournalRequest) -> None:
        """Remove a stream."""
        check_stream(request.stream, "stream")

        def act(connection: Connection) -> None:
            check_request_fence(connection, request)
            stream = _load(connection, request.stream)
            if stream is None:
                return
            connection.execute("DELETE FROM records WHERE stream = ?", (stream.id,))
            connection.execute("DELETE FROM streams WHERE id = ?", (stream.id,))
            drop_references(connection, JOURNAL, str(stream.id))

        self._database.write(act)

    def _fetch(self, name: str, position: int, limit: int | None) -> _Fetched:
        count = READ_BATCH_RECORDS if limit is None else min(limit, READ_BATCH_RECORDS)

        def act(connection: Connection) -> _Fetched:
            stream = _load(connection, name)
            if stream is None:
                return _Fetched(StreamState(), position, [])
            first = max(position, stream.state.first_sequence)
            rows = connection.execute(
                "SELECT sequence, payload, checksum FROM records "
                "WHERE stream = ? AND sequence >= ? AND sequence <= ? ORDER BY sequence",
                (stream.id, first, _last_of_batch(connection, stream.id, first, count)),
            ).fetchall()
            return _Fetched(stream.state, first, rows)

        fetched = self._database.read(act)
        if not fetched.rows and fetched.first < fetched.state.next_sequence:
            raise journals.gap(name, fetched.first)
        return fetched


def _last_of_batch(connection: Connection, stream_id: int, first: int, count: int) -> int:
    """Return the last record of those from ``first`` on that fit into one answer."""
    last, size_bytes = first, 0
    for sequence, length in connection.execute(
        "SELECT sequence, length(payload) FROM records "
        "WHERE stream = ? AND sequence >= ? ORDER BY sequence LIMIT ?",
        (stream_id, first, count),
    ):
        size_bytes += length
        if sequence > first and size_bytes > READ_BATCH_BYTES:
            break
        last = sequence
    return last


def _load(connection: Connection, name: str) -> _Stream | None:
    row = STREAMS.find(connection, name)
    return None if row is None else _Stream(row[1], StreamState(row[2], row[3]))


def _store(connection: Connection, name: str, stream: _Stream | None, state: StreamState) -> int:
    """Write the bounds of a stream; return its id."""
    stream_id = next_id(connection, STREAMS.name) if stream is None else stream.id
    row = STREAMS.sealed(name, stream_id, state.first_sequence, state.next_sequence)
    if stream is None:
        connection.execute(STREAMS.insertion, row)
    else:
        connection.execute(
            "UPDATE streams SET first_sequence = ?, next_sequence = ?, checksum = ? WHERE id = ?",
            (*row[2:], stream_id),
        )
    return stream_id
