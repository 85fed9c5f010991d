"""Checksums of rows: what a table holds is what was written, or it is told.

A database finds damage to the structure of its files, not always to what the rows say. A fencing
token that lost a bit would let an old leader write; a reference that lost one would have garbage
collection remove the blob that it named. So every row carries a checksum over all its columns,
which is compared when the row is read. A row that is *not* found is believed to be missing only if
all rows of its table are intact: the damaged one may be the one that was looked for.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phalanx.errors import DataLoss
from storage.backends.sql.connection import Connection, Value


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
        # All names are constants of this program.
        return f"INSERT INTO {self.name} ({', '.join(self.columns)}, checksum) VALUES ({marks})"  # noqa: S608

    @cached_property
    def insertion_if_new(self) -> str:
        """The statement that inserts a row, or does nothing if there is one with its key."""
        return f"{self.insertion} ON CONFLICT DO NOTHING"

    @cached_property
    def replacement(self) -> str:
        """The statement that inserts a row in the place of the one with its key, if there is."""
        changed = ", ".join(f"{name} = excluded.{name}" for name in self._others)
        key = ", ".join(self.columns[: self.key])
        return f"{self.insertion} ON CONFLICT ({key}) DO UPDATE SET {changed}"

    @property
    def _others(self) -> tuple[str, ...]:
        return (*self.columns[self.key :], "checksum")

    @cached_property
    def selection(self) -> str:
        """The statement that reads all rows, each with its checksum."""
        return f"SELECT {', '.join(self.columns)}, checksum FROM {self.name}"  # noqa: S608

    @cached_property
    def _selection_by_key(self) -> str:
        where = " AND ".join(f"{column} = ?" for column in self.columns[: self.key])
        return f"{self.selection} WHERE {where}"

    def sealed(self, *row: Value) -> tuple[Value, ...]:
        """Return a row with its checksum."""
        return (*row, self.checksum(row))

    def checksum(self, row: Sequence[Value]) -> int:
        """Return the checksum of a row without it."""
        assert len(row) == len(self.columns)
        return row_checksum(self.name, *row)

    def find(self, connection: Connection, *key: Value) -> tuple[Any, ...] | None:
        """Return the row with this key, verified; None only if there is none for certain.

        Raises DataLoss (ROW_CORRUPT).
        """
        row = self.find_or_none(connection, *key)
        if row is None:
            self.verify(connection, absent=key)
        return row

    def find_or_none(self, connection: Connection, *key: Value) -> tuple[Any, ...] | None:
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
        self, connection: Connection, where: str, *values: Value
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of which ``where`` holds (a constant of this program), verified."""
        for row in connection.execute(f"{self.selection} WHERE {where}", values):
            yield self.opened(row)

    def verify(self, connection: Connection, absent: Sequence[Value] = ()) -> None:
        """Raise DataLoss (ROW_CORRUPT) if a row is damaged, or if one with this key is there."""
        for row in connection.scan(self.selection):
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


def next_id(connection: Connection, table: str) -> int:
    """Return an id that no row of the table has."""
    statement = f"SELECT coalesce(max(id), 0) + 1 FROM {table}"  # noqa: S608
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
ELAPSED = Table("elapsed", ("id", "elapsed_s", "token"), 1)
HOME = Table("home", ("id", "place", "token", "settled"), 1)
OBJECTS = Table("objects", ("key", "digest", "size_bytes", "state", "since_s"), 1)
TERM_OWNERS = Table("term_owners", ("job_id", "term", "owners"), 1)

TABLES = (
    *(LEASES, STREAMS, JOBS, CHECKPOINTS, REFERENCES, PINS, NAMES, REQUESTS),
    *(ELAPSED, HOME, OBJECTS, TERM_OWNERS),
)
"""All but records and versions, whose checksums are those of ``storage.core``."""
