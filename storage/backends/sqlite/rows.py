"""Checksums of rows: what a table holds is what was written, or it is told.

SQLite finds damage to the structure of its file, not to what the rows say. A fencing token that
lost a bit would let an old leader write; a reference that lost one would have garbage collection
remove the blob that it named. So every row carries a checksum over all its columns, which is
compared when the row is read. A row that is *not* found is believed to be missing only if all rows
of its table are intact: the damaged one may be the one that was looked for.
"""

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phalanx.errors import DataLoss

Value = str | int | float | bytes


@dataclass(frozen=True)
class Table:
    """A table that also has a column ``checksum``; its first ``key`` columns identify a row."""

    name: str
    columns: tuple[str, ...]
    key: int

    @cached_property
    def insertion(self) -> str:
        """The statement that inserts a row of ``sealed``."""
        marks = ", ".join("?" * (len(self.columns) + 1))
        return f"INTO {self.name} ({', '.join(self.columns)}, checksum) VALUES ({marks})"

    @cached_property
    def _selection(self) -> str:
        # All names are constants of this program.
        return f"SELECT {', '.join(self.columns)}, checksum FROM {self.name}"  # noqa: S608

    @cached_property
    def _selection_by_key(self) -> str:
        where = " AND ".join(f"{column} = ?" for column in self.columns[: self.key])
        return f"{self._selection} WHERE {where}"

    def sealed(self, *row: Value) -> tuple[Value, ...]:
        """Return a row with its checksum."""
        return (*row, self.checksum(row))

    def checksum(self, row: Sequence[Value]) -> int:
        """Return the checksum of a row without it."""
        assert len(row) == len(self.columns)
        return row_checksum(self.name, *row)

    def find(self, connection: sqlite3.Connection, *key: Value) -> tuple[Any, ...] | None:
        """Return the row with this key, verified; None only if there is none for certain.

        Raises DataLoss (ROW_CORRUPT).
        """
        row = self.find_or_none(connection, *key)
        if row is None:
            self.verify(connection, absent=key)
        return row

    def find_or_none(self, connection: sqlite3.Connection, *key: Value) -> tuple[Any, ...] | None:
        """Do the same, but believe that a row that is not found was never there."""
        row = connection.execute(self._selection_by_key, key).fetchone()
        return None if row is None else self.opened(row)

    def opened(self, row: Sequence[Value]) -> tuple[Any, ...]:
        """Return a row without its checksum; DataLoss (ROW_CORRUPT) if that is wrong."""
        *values, checksum = row
        if self.checksum(values) != checksum:
            raise DataLoss(
                f"a row of the table {self.name!r} of storage does not match its checksum; "
                "restore storage from a backup",
                reason="ROW_CORRUPT",
            )
        return tuple(values)

    def select(
        self, connection: sqlite3.Connection, where: str, *values: Value
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of which ``where`` holds (a constant of this program), verified."""
        for row in connection.execute(f"{self._selection} WHERE {where}", values):
            yield self.opened(row)

    def verify(self, connection: sqlite3.Connection, absent: Sequence[Value] = ()) -> None:
        """Raise DataLoss (ROW_CORRUPT) if a row is damaged, or if one with this key is there."""
        rows = connection.execute(
            # Not by an index, which may be what is damaged.
            f"{self._selection} NOT INDEXED"
        )
        for row in rows:
            values = self.opened(row)
            if absent and values[: self.key] == tuple(absent):
                raise DataLoss(
                    f"the table {self.name!r} of storage is damaged: it hides a row that it has; "
                    "restore storage from a backup",
                    reason="ROW_CORRUPT",
                )


def row_checksum(table: str, *row: Value) -> int:
    """Return the checksum of a row of a table, also of one with the columns that it once had."""
    found = zlib.crc32(table.encode())
    for value in row:
        data = value if isinstance(value, bytes) else str(value).encode()
        found = zlib.crc32(data, zlib.crc32(b"%d:" % len(data), found))
    return found


def next_id(connection: sqlite3.Connection, table: Table) -> int:
    """Return an id that no row of the table has."""
    statement = f"SELECT ifnull(max(id), 0) + 1 FROM {table.name}"  # noqa: S608
    return int(connection.execute(statement).fetchone()[0])


LEASES = Table("leases", ("name", "holder", "token", "counter"), 1)
STREAMS = Table("streams", ("name", "id", "first_sequence", "next_sequence"), 1)
JOBS = Table("jobs", ("job_id", "term"), 1)
CHECKPOINTS = Table(
    "checkpoints", ("job_id", "term", "step", "final", "id", "whole", "manifest"), 4
)
REFERENCES = Table("blob_references", ("digest", "kind", "owner", "position"), 4)
PINS = Table("pins", ("kind", "namespace", "name", "version", "holder", "ended"), 5)
NAMES = Table("names", ("kind", "namespace", "name", "next_version"), 3)
REQUESTS = Table("requests", ("kind", "request_id", "request_sha256", "response", "create_s"), 2)

TABLES = (LEASES, STREAMS, JOBS, CHECKPOINTS, REFERENCES, PINS, NAMES, REQUESTS)
"""All but records and versions, whose checksums are those of ``storage.core``."""
