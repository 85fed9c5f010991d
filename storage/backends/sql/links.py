"""Which data set links which chunk.

One reference of the kind LINK leads from the digest of a chunk to the id of its data set's row.
There may be very many, and journals must not wait for all of them: they are written in pieces
before that row has a name, and dropped in pieces after it has lost it. Meanwhile a row of the kind
UNNAMED keeps the id, and nobody sees the links. So a data set has all its links or none, whenever
the process ends; what it left by half goes at the next start, or where others share the database,
once it is old enough.
"""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple
from uuid import uuid4

from phalanx.errors import PhalanxError, Unavailable
from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.elapsed import SqlElapsed
from storage.backends.sql.references import LINK, add_references
from storage.backends.sql.rows import REFERENCES, next_id

PIECE_LINKS = 2000
"""Written or dropped in one transaction, in some 10 ms where nothing else runs."""

ABANDONED_S = 3600.0
"""A row without a name that is older belongs to a process that ended."""

UNNAMED = "unnamed"
"""The kind of rows that have no name."""


class Unnamed(NamedTuple):
    """A row that has no name; ids are given again, tokens are not."""

    id: int
    token: str


class SqlLinks:
    """The links of a catalog; drops what processes before left by half.

    With ``elapsed`` other processes may have rows under way in the same database; without it there
    is this one only.
    """

    def __init__(self, database: Database, elapsed: SqlElapsed | None = None) -> None:
        self._database = database
        self._elapsed = elapsed
        self.drop_abandoned()

    def drop_abandoned(self) -> None:
        """Drop what nobody will give a name any more."""
        for row in self._database.read(self._abandoned):
            self.give_up(row)

    def write(self, digests: Sequence[str]) -> Unnamed:
        """Note all links; return the row that has them, which has no name yet.

        Whoever does not give it one drops it.
        """
        token = uuid4().hex
        row = self._database.write(lambda connection: self._reserve(connection, token))
        try:
            for start in range(0, len(digests), PIECE_LINKS):
                piece = digests[start : start + PIECE_LINKS]
                self._database.write(partial(_add, row=row, digests=piece))
        except BaseException:
            self.give_up(row)
            raise
        return row

    def is_unnamed(self, row: Unnamed) -> bool:
        """Return whether the row is there and has no name."""
        return self._database.read(lambda connection: _is_unnamed(connection, row))

    def drop(self, row: Unnamed) -> None:
        """Forget a row without a name, and its links; one that has a name stays."""
        while self._database.write(lambda connection: _drop_piece(connection, row)):
            pass

    def give_up(self, row: Unnamed) -> None:
        """Do the same after a failure: whatever fails here is left for later."""
        with contextlib.suppress(PhalanxError):
            self.drop(row)

    def give_up_name(self, connection: Connection, row_id: int) -> Unnamed | None:
        """Take a row's name, if there are links that need it; return the row then."""
        statement = "SELECT 1 FROM blob_references WHERE kind = ? AND owner = '' AND position = ?"
        if connection.execute(f"{statement} LIMIT 1", (LINK, row_id)).fetchone() is None:
            return None
        row = Unnamed(row_id, uuid4().hex)
        connection.execute(
            "UPDATE versions SET kind = ?, namespace = '', name = ?, version = ? WHERE id = ?",
            (UNNAMED, row.token, self._stamp_s(connection), row_id),
        )
        return row

    def _reserve(self, connection: Connection, token: str) -> Unnamed:
        row_id = next_id(connection, "versions")
        connection.execute(
            "INSERT INTO versions (id, kind, namespace, name, version, checksum, message) "
            "VALUES (?, ?, '', ?, ?, 0, ?)",
            (row_id, UNNAMED, token, self._stamp_s(connection), b""),
        )
        return Unnamed(row_id, token)

    def _stamp_s(self, connection: Connection) -> int:
        """The time from which a row has no name; it stands where others have their version."""
        return 0 if self._elapsed is None else math.ceil(self._elapsed.stamp_s(connection))

    def _abandoned(self, connection: Connection) -> list[Unnamed]:
        found = connection.execute(
            "SELECT id, name, version FROM versions WHERE kind = ?", (UNNAMED,)
        ).fetchall()
        if self._elapsed is not None:
            now_s = self._elapsed.now_s(connection)
            found = [row for row in found if now_s - row[2] >= ABANDONED_S]
        return [Unnamed(row_id, token) for row_id, token, _ in found]


def make_room(connection: Connection, row: Unnamed) -> None:
    """Remove a row without a name, so that one with a name can take its id and its links.

    Raises Unavailable if it was dropped meanwhile.
    """
    _demand_unnamed(connection, row)
    connection.execute("DELETE FROM versions WHERE id = ?", (row.id,))


def rows_linking(connection: Connection, digest: str) -> list[int]:
    """Return the ids of the rows with a link to a chunk, newest first; some may have no name."""
    where = "digest = ? AND kind = ? ORDER BY position DESC"
    return [row_id for _, _, _, row_id in REFERENCES.select(connection, where, digest, LINK)]


def _add(connection: Connection, row: Unnamed, digests: Sequence[str]) -> None:
    _demand_unnamed(connection, row)
    add_references(connection, LINK, "", row.id, digests)


def _drop_piece(connection: Connection, row: Unnamed) -> bool:
    """Drop some links of a row without a name, or the row; return whether there is more."""
    if not _is_unnamed(connection, row):
        return False
    dropped = connection.execute(
        "DELETE FROM blob_references WHERE kind = ? AND owner = '' AND position = ? "
        "AND digest IN (SELECT digest FROM blob_references "
        "WHERE kind = ? AND owner = '' AND position = ? LIMIT ?)",
        (LINK, row.id, LINK, row.id, PIECE_LINKS),
    )
    if dropped.rowcount:
        return True
    make_room(connection, row)
    return False


def _is_unnamed(connection: Connection, row: Unnamed) -> bool:
    statement = "SELECT 1 FROM versions WHERE id = ? AND kind = ? AND name = ?"
    return connection.execute(statement, (row.id, UNNAMED, row.token)).fetchone() is not None


def _demand_unnamed(connection: Connection, row: Unnamed) -> None:
    if not _is_unnamed(connection, row):
        raise Unavailable("the registration took too long and was given up; try again")
