"""Who names which blob, in SQLite, and giving space back."""

import sqlite3
from collections.abc import Callable, Iterable, Sequence

from storage.backends.sqlite.database import Database
from storage.backends.sqlite.rows import REFERENCES
from storage.core.catalog import REQUEST_MEMORY_S
from storage.core.keys import check_digest

LINK = "link"
"""The kind of reference with which a data set names a chunk that is made, not stored."""

_VACUUM_PAGES = 2000


def add_references(
    connection: sqlite3.Connection, kind: str, owner: str, position: int, digests: Iterable[str]
) -> None:
    """Note that an owner names these blobs."""
    connection.executemany(
        f"INSERT OR IGNORE {REFERENCES.insertion}",
        (REFERENCES.sealed(digest, kind, owner, position) for digest in digests),
    )


def drop_references(
    connection: sqlite3.Connection, kind: str, owner: str, position: int | None = None
) -> None:
    """Forget what an owner names, at one position or (None) at all."""
    if position is None:
        connection.execute(
            "DELETE FROM blob_references WHERE kind = ? AND owner = ?", (kind, owner)
        )
    else:
        connection.execute(
            "DELETE FROM blob_references WHERE kind = ? AND owner = ? AND position = ?",
            (kind, owner, position),
        )


class SqliteReferences:
    """A ReferenceStore; sweeps run on the writing thread, as all registrations do."""

    def __init__(self, database: Database, now_unix_nanos: Callable[[], int]) -> None:
        self._database = database
        self._now_unix_nanos = now_unix_nanos

    def verify(self) -> None:
        """Read all references; raise DataLoss if one is damaged."""
        self._database.read(REFERENCES.verify)

    def unreferenced(self, digests: Sequence[str]) -> list[str]:
        """Return those that nothing names."""
        return self._database.read(lambda connection: _unreferenced(connection, digests))

    def sweep(self, digests: Sequence[str], remove: Callable[[str], int | None]) -> list[int]:
        """Remove those that nothing names."""

        def act(connection: sqlite3.Connection) -> list[int]:
            results = [remove(digest) for digest in _unreferenced(connection, digests)]
            return [size_bytes for size_bytes in results if size_bytes is not None]

        return self._database.write(act, alone=True)

    def reclaim(self) -> None:
        """Forget old request ids and shrink the file."""
        oldest_s = self._now_unix_nanos() / 1e9 - REQUEST_MEMORY_S
        self._database.write(
            lambda connection: (
                connection.execute("DELETE FROM requests WHERE create_s < ?", (oldest_s,)).rowcount
            )
        )
        while self._database.write(_vacuum_some):
            pass

    def usage_bytes(self) -> int:
        """Return the size of the database without its free pages."""
        return self._database.read(_used_bytes)


def _unreferenced(connection: sqlite3.Connection, digests: Sequence[str]) -> list[str]:
    statement = "SELECT 1 FROM blob_references WHERE digest = ? AND kind <> ? LIMIT 1"
    found = (
        (digest, connection.execute(statement, (check_digest(digest, "digests"), LINK)).fetchone())
        for digest in digests
    )
    return [digest for digest, row in found if row is None]


def _vacuum_some(connection: sqlite3.Connection) -> bool:
    """Give some free pages back; return whether there are more."""
    connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
    free: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
    return free > 0


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free, size_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size_bytes)
