"""All rows as of one moment, and the same rows put into a place that is empty.

What belongs to the place and not to what it holds stays out: the index of objects, which place the
blobs are in, the elapsed time, and rows that have no name (yet or any more).

Rows go as they are, with their checksums. One that is damaged is told, and goes as it is too: where
it is restored, whoever needs it is told what he would be told here, and nothing else is lost.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from phalanx.errors import FailedPrecondition
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.catalog import version_checksum
from storage.backends.sql.connection import Connection, Database, Value
from storage.backends.sql.links import UNNAMED
from storage.backends.sql.references import JOURNAL, LINK
from storage.backends.sql.rows import (
    CHECKPOINTS,
    JOBS,
    LEASES,
    NAMES,
    PINS,
    REFERENCES,
    REQUESTS,
    STREAMS,
    Table,
)
from storage.core.journals import record_checksum
from storage.core.snapshots import HISTORY_LEASE, HOLD_LEASE, RESTORE_LEASE

RECORDS = Table("records", ("stream", "sequence", "payload"), 2)
VERSIONS = Table("versions", ("id", "kind", "namespace", "name", "version", "message"), 1)

TABLES = (
    *(LEASES, STREAMS, RECORDS, JOBS, CHECKPOINTS),
    *(VERSIONS, NAMES, PINS, REFERENCES, REQUESTS),
)
"""In an order in which each row comes after those that it needs."""

_BY_NAME = {table.name: table for table in TABLES}
_MESSAGE_BYTES = 1024 * 1024
_MESSAGE_BLOBS = 5000
_FENCE_STRIDE = 2**30
_UNNAMED_ROWS = "SELECT id FROM versions WHERE kind = ?"
_NAMED = """
SELECT digest, max(CASE WHEN kind = ? THEN 0 ELSE 1 END) FROM blob_references
WHERE kind <> ? GROUP BY digest ORDER BY digest
"""

Tell = Callable[[pb.ReadSnapshotResponse], None]


@dataclass
class _Context:
    """What rows of one table have to say about those of others."""

    streams: dict[int, str]
    unnamed: set[int]


class SqlSnapshots:
    """A SnapshotStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, tell: Tell) -> None:
        """Tell all rows and the blobs that they name."""
        self._database.read(lambda connection: _read(connection, tell))

    def damaged_rows(self, count: Callable[[int], None]) -> list[str]:
        """Read all rows; return in words which ones are damaged."""
        found: list[str] = []

        def act(connection: Connection) -> None:
            found.clear()
            rows = 0
            for _, _, damage in _rows(connection):
                rows += 1
                found.extend([damage] if damage else [])
            count(rows)

        self._database.read(act)
        return found

    def is_empty(self) -> bool:
        """Say whether there is no row."""
        return self._database.read(
            lambda connection: all(_is_empty(connection, table) for table in TABLES)
        )

    def is_restoring(self) -> bool:
        """Say whether a restore began and did not end."""
        return self._database.read(
            lambda connection: LEASES.find_or_none(connection, RESTORE_LEASE) is not None
        )

    def begin_restore(self) -> None:
        """Remove all rows and note that what follows is not whole before ``end_restore``."""
        self._database.write(
            lambda connection: connection.execute(
                LEASES.replacement, LEASES.sealed(RESTORE_LEASE, "", 0, 0)
            )
        )
        for table in reversed(TABLES):
            self._database.write(partial(_clear, table=table))

    def insert(self, rows: Sequence[pb.SnapshotRow], stride: int) -> None:
        """Write rows; fencing tokens and terms are raised by ``stride``."""

        def act(connection: Connection) -> None:
            for row in rows:
                table = _BY_NAME[row.table]
                connection.execute(table.insertion, _restored(table, row, stride))

        self._database.write(act)

    def end_restore(self, stride: int) -> None:
        """What was restored is whole now, and has a history of its own."""

        def act(connection: Connection) -> None:
            # One that was restored before has been raised with all other leases.
            first = LEASES.sealed(HISTORY_LEASE, "", stride, 0)
            connection.execute(LEASES.insertion_if_new, first)
            connection.execute("DELETE FROM leases WHERE name = ?", (RESTORE_LEASE,))

        self._database.write(act)


def new_stride() -> int:
    """Return by how much a restore raises fencing tokens and terms.

    So much that nobody of the cluster that was saved, whatever it did after the snapshot, has a
    number that is valid where it was restored; by chance, so that this holds for two places that
    the same snapshot was restored into, too.
    """
    return _FENCE_STRIDE + secrets.randbelow(_FENCE_STRIDE)


def check_tables(tables: Sequence[pb.SnapshotTable]) -> None:
    """Raise FailedPrecondition (BACKUP_UNREADABLE) unless these are the tables that there are."""
    found = {table.name: tuple(table.columns) for table in tables}
    if found != {table.name: (*table.columns, "checksum") for table in TABLES}:
        raise FailedPrecondition(
            "the backup has other tables than this version of Phalanx knows: restore it with the "
            "version that wrote it",
            reason="BACKUP_UNREADABLE",
        )


def _read(connection: Connection, tell: Tell) -> None:
    message = pb.ReadSnapshotResponse(
        tables=[
            pb.SnapshotTable(name=table.name, columns=(*table.columns, "checksum"))
            for table in TABLES
        ]
    )
    size_bytes = 0
    for table, row, damage in _rows(connection):
        told = pb.SnapshotRow(table=table.name, values=[_value(value) for value in row])
        # The largest record nearly fills a message by itself.
        if size_bytes and size_bytes + told.ByteSize() > _MESSAGE_BYTES:
            tell(message)
            message, size_bytes = pb.ReadSnapshotResponse(), 0
        message.rows.append(told)
        message.damage.extend([damage] if damage else [])
        size_bytes += told.ByteSize() + len(damage)
    tell(message)
    message = pb.ReadSnapshotResponse()
    for digest, required in connection.execute(_NAMED, (JOURNAL, LINK)):
        message.blobs.add(digest=digest, required=bool(required))
        if len(message.blobs) >= _MESSAGE_BLOBS:
            tell(message)
            message = pb.ReadSnapshotResponse()
    message.complete = True
    tell(message)


def _rows(connection: Connection) -> Iterator[tuple[Table, Sequence[Any], str]]:
    """Yield all rows, each with its checksum and with what is wrong with it, in words."""
    context = _Context(
        dict(connection.execute("SELECT id, name FROM streams").fetchall()),
        {row_id for (row_id,) in connection.execute(_UNNAMED_ROWS, (UNNAMED,))},
    )
    for table in TABLES:
        for row in connection.scan(table.selection):
            if not _stays(table, row, context):
                yield table, row, _damage(table, row, context)


def _stays(table: Table, row: Sequence[Any], context: _Context) -> bool:
    """Say whether a row is of no use elsewhere."""
    if table is LEASES:
        return row[0] in (HOLD_LEASE, RESTORE_LEASE)
    if table is VERSIONS:
        return row[0] in context.unnamed
    return table is REFERENCES and row[1] == LINK and row[3] in context.unnamed


def _damage(table: Table, row: Sequence[Any], context: _Context) -> str:
    *values, checksum = row
    if table is RECORDS:
        stream = context.streams.get(values[0], "")
        name, right = f"{stream} {values[1]}", record_checksum(stream, values[1], values[2])
    elif table is VERSIONS:
        _, kind, namespace, name, version, message = values
        name, right = f"{namespace}/{name}@{version}", version_checksum(kind, version, message)
    else:
        name, right = " ".join(map(str, values[: table.key])), table.checksum(values)
    if right == checksum:
        return ""
    return f"a row of the table {table.name!r} does not match its checksum: {name}"


def _value(value: Value) -> pb.SnapshotValue:
    if isinstance(value, int):
        return pb.SnapshotValue(integer=value)
    if isinstance(value, float):
        return pb.SnapshotValue(real=value)
    if isinstance(value, str):
        return pb.SnapshotValue(text=value)
    return pb.SnapshotValue(data=bytes(value))


def _restored(table: Table, row: pb.SnapshotRow, stride: int) -> tuple[Value, ...]:
    """Return the values of a row; those by which the past is kept out are others then."""
    values = tuple(getattr(value, str(value.WhichOneof("kind"))) for value in row.values)
    if table not in (LEASES, JOBS) or table.checksum(values[:-1]) != values[-1]:
        return values  # a damaged row is not made right
    if table is JOBS:
        job_id, term, _ = values
        return table.sealed(job_id, term + stride)
    name, _, token, counter, _ = values
    return table.sealed(name, "", token + stride, counter)


def _is_empty(connection: Connection, table: Table) -> bool:
    statement = f"SELECT 1 FROM {table.name} LIMIT 1"  # noqa: S608
    return connection.execute(statement).fetchone() is None


def _clear(connection: Connection, table: Table) -> None:
    if table is LEASES:
        connection.execute("DELETE FROM leases WHERE name <> ?", (RESTORE_LEASE,))
    else:
        connection.execute(f"DELETE FROM {table.name}")  # noqa: S608
