"""The index of objects: what is in an object store, and which blob each object holds."""

from collections.abc import Sequence
from typing import NamedTuple

from storage.backends.sql.connection import Connection
from storage.backends.sql.rows import OBJECTS

ARRIVING = "arriving"
STORED = "stored"
CORRUPT = "corrupt"
DOOMED = "doomed"

_ROWS_AT_ONCE = 500


class ObjectRow(NamedTuple):
    """One object; ``digest`` is that of the blob that it holds, or empty."""

    key: str
    digest: str
    size_bytes: int
    state: str
    since_s: float


def load(connection: Connection, key: str) -> ObjectRow | None:
    """Return the row of an object."""
    row = OBJECTS.find_or_none(connection, key)
    return None if row is None else ObjectRow(*row)


def load_blob(connection: Connection, digest: str) -> ObjectRow | None:
    """Return the row of the object that holds a blob, in whatever state."""
    for row in OBJECTS.select(connection, "digest = ?", digest):
        return ObjectRow(*row)
    return None


def load_stored(connection: Connection, digests: Sequence[str]) -> list[ObjectRow]:
    """Return the rows of those blobs that are stored and not known to be corrupt."""
    found: list[ObjectRow] = []
    for first in range(0, len(digests), _ROWS_AT_ONCE):
        some = digests[first : first + _ROWS_AT_ONCE]
        where = f"state = ? AND digest IN ({', '.join('?' * len(some))})"
        found += (ObjectRow(*row) for row in OBJECTS.select(connection, where, STORED, *some))
    return found


def load_page(connection: Connection, after: str, limit: int) -> list[ObjectRow]:
    """Return the rows of blobs, in the order of their digests."""
    rows = OBJECTS.select(connection, "digest > ? ORDER BY digest LIMIT ?", after, limit)
    return [ObjectRow(*row) for row in rows]


def load_older(connection: Connection, state: str, until_s: float, limit: int) -> list[ObjectRow]:
    """Return some of the objects that have been in a state since a time or longer."""
    where = "state = ? AND since_s <= ? LIMIT ?"
    return [ObjectRow(*row) for row in OBJECTS.select(connection, where, state, until_s, limit)]


def save(connection: Connection, rows: Sequence[ObjectRow]) -> None:
    """Write rows, in the place of those with their keys."""
    connection.executemany(OBJECTS.replacement, (OBJECTS.sealed(*row) for row in rows))


def doom(connection: Connection, row: ObjectRow, since_s: float) -> None:
    """Let an object count no more; it may be removed from the store after a while."""
    save(connection, [row._replace(digest="", state=DOOMED, since_s=since_s)])


def forget(connection: Connection, rows: Sequence[ObjectRow]) -> None:
    """Remove the rows of doomed objects that are gone from the store."""
    connection.executemany(
        "DELETE FROM objects WHERE key = ? AND state = ?", ((row.key, DOOMED) for row in rows)
    )


def blob_bytes(connection: Connection) -> int:
    """Return the size of all blobs."""
    statement = "SELECT coalesce(sum(size_bytes), 0) FROM objects WHERE digest <> ''"
    return int(connection.execute(statement).fetchone()[0])
