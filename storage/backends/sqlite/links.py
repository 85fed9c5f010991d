"""Which data set links which chunk, in SQLite.

One reference of the kind LINK leads from the digest of a chunk to the id of its data set's row.
There may be very many, and journals must not wait for all of them: they are written in pieces
before that row has a name, and dropped in pieces after it has lost it. Meanwhile a row of the kind
UNNAMED keeps the id, and nobody sees the links. So a data set has all its links or none, whenever
the process ends; what it left by half goes at the next start.
"""

import contextlib
import sqlite3
from collections.abc import Sequence
from functools import partial
from uuid import uuid4

from phalanx.errors import PhalanxError
from storage.backends.sqlite.database import Database
from storage.backends.sqlite.references import LINK, add_references
from storage.backends.sqlite.rows import REFERENCES

PIECE_LINKS = 2000
"""Written or dropped in one transaction, in some 10 ms where nothing else runs."""

_UNNAMED = "unnamed"


class SqliteLinks:
    """The links of a catalog; drops what a process before left by half."""

    def __init__(self, database: Database) -> None:
        self._database = database
        for row_id in database.read(_unnamed):
            self.give_up(row_id)

    def write(self, digests: Sequence[str]) -> int:
        """Note all links; return the id of the row that has them, which has no name yet.

        Whoever does not give it one drops it.
        """
        token = uuid4().hex
        row_id = self._database.write(lambda connection: _reserve(connection, token))
        try:
            for start in range(0, len(digests), PIECE_LINKS):
                piece = digests[start : start + PIECE_LINKS]
                self._database.write(partial(_add, row_id=row_id, digests=piece))
        except BaseException:
            self.give_up(row_id)
            raise
        return row_id

    def is_unnamed(self, row_id: int) -> bool:
        """Return whether the row has no name."""
        return self._database.read(lambda connection: _is_unnamed(connection, row_id))

    def drop(self, row_id: int) -> None:
        """Forget a row without a name, and its links; one that has a name stays."""
        while self._database.write(lambda connection: _drop_piece(connection, row_id)):
            pass

    def give_up(self, row_id: int) -> None:
        """Do the same after a failure: whatever fails here is left for another start."""
        with contextlib.suppress(PhalanxError):
            self.drop(row_id)


def _add(connection: sqlite3.Connection, row_id: int, digests: Sequence[str]) -> None:
    add_references(connection, LINK, "", row_id, digests)


def rows_linking(connection: sqlite3.Connection, digest: str) -> list[int]:
    """Return the ids of the rows with a link to a chunk, newest first; some may have no name."""
    where = "digest = ? AND kind = ? ORDER BY position DESC"
    return [row_id for _, _, _, row_id in REFERENCES.select(connection, where, digest, LINK)]


def give_up_name(connection: sqlite3.Connection, row_id: int) -> bool:
    """Take a row's name, if there are links that need it; return whether there are."""
    statement = "SELECT 1 FROM blob_references WHERE kind = ? AND owner = '' AND position = ?"
    if connection.execute(f"{statement} LIMIT 1", (LINK, row_id)).fetchone() is None:
        return False
    connection.execute("UPDATE versions SET kind = ? WHERE id = ?", (_UNNAMED, row_id))
    return True


def make_room(connection: sqlite3.Connection, row_id: int) -> None:
    """Remove a row without a name, so that one with a name can take its id and its links."""
    connection.execute("DELETE FROM versions WHERE id = ? AND kind = ?", (row_id, _UNNAMED))


def _reserve(connection: sqlite3.Connection, token: str) -> int:
    cursor = connection.execute(
        "INSERT INTO versions (kind, namespace, name, version, checksum, message) "
        "VALUES (?, '', ?, 0, 0, x'')",
        (_UNNAMED, token),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _drop_piece(connection: sqlite3.Connection, row_id: int) -> bool:
    """Drop some links of a row without a name, or the row; return whether there is more."""
    if not _is_unnamed(connection, row_id):
        return False
    dropped = connection.execute(
        "DELETE FROM blob_references WHERE kind = ?1 AND owner = '' AND position = ?2 "
        "AND digest IN (SELECT digest FROM blob_references "
        "WHERE kind = ?1 AND owner = '' AND position = ?2 LIMIT ?3)",
        (LINK, row_id, PIECE_LINKS),
    )
    if dropped.rowcount:
        return True
    make_room(connection, row_id)
    return False


def _is_unnamed(connection: sqlite3.Connection, row_id: int) -> bool:
    statement = "SELECT 1 FROM versions WHERE id = ? AND kind = ?"
    return connection.execute(statement, (row_id, _UNNAMED)).fetchone() is not None


def _unnamed(connection: sqlite3.Connection) -> list[int]:
    found = connection.execute("SELECT id FROM versions WHERE kind = ?", (_UNNAMED,))
    return [row_id for (row_id,) in found]
