"""Which place holds the blobs that a database names.

A database whose blobs are elsewhere would report all of them as missing, and one that takes up the
place of another would remove what it does not know. So each says, durably, who belongs to it: the
database has a token, and the place has the same one.
"""

from typing import Protocol
from uuid import uuid4

from phalanx.errors import FailedPrecondition
from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.rows import HOME

_ROW = 1


class Place(Protocol):
    """Where blobs are."""

    name: str

    def owner(self) -> str:
        """Return the token that is there, or nothing."""

    def claim(self, token: str) -> str:
        """Leave a token there unless there is one; return the one that is there then."""


def settle(database: Database, place: Place) -> None:
    """Bind a database and a place to each other, or see that they are.

    Raises FailedPrecondition (BLOBS_ELSEWHERE) if either belongs to another.
    """
    database.write(lambda connection: _prepare(connection, place))

    def act(connection: Connection) -> None:
        row = HOME.find(connection, _ROW)
        assert row is not None
        _, name, token, settled = row
        found = place.owner() if settled else place.claim(token)
        if not found:
            raise _elsewhere(f"{place.name} is empty; the blobs of this database were in {name}")
        if found != token:
            raise _elsewhere(f"{place.name} has the blobs of another database")
        if not settled:
            connection.execute(HOME.replacement, HOME.sealed(_ROW, place.name, token, 1))

    # The place is asked inside, so that of several processes only one settles.
    database.write(act, alone=True)


def demand_homeless(database: Database) -> None:
    """Raise FailedPrecondition (BLOBS_ELSEWHERE) if the blobs are not beside the database."""
    row = database.read(lambda connection: HOME.find(connection, _ROW))
    if row is not None:
        raise _elsewhere(f"the blobs of this state folder are in {row[1]}; say so with --blobs")


def _prepare(connection: Connection, place: Place) -> None:
    if HOME.find(connection, _ROW) is not None:
        return
    if connection.execute("SELECT 1 FROM blob_references LIMIT 1").fetchone() is not None:
        raise _elsewhere("the blobs of this database are in its state folder")
    connection.execute(HOME.insertion, HOME.sealed(_ROW, place.name, uuid4().hex, 0))


def _elsewhere(why: str) -> FailedPrecondition:
    return FailedPrecondition(why, reason="BLOBS_ELSEWHERE")
