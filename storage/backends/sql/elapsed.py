"""The time that all processes on one database agree on; see ``storage.core.elapsed``."""

import time
from collections.abc import Callable
from uuid import uuid4

from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.rows import ELAPSED
from storage.core.elapsed import Elapsed, Look, advance, now_s, stamp_s

_ROW = 1


class SqlElapsed:
    """Reads the time and lets it go on; ``advance`` is to be called every now and then."""

    def __init__(self, database: Database, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock_s = clock_s
        self._last: Look | None = None
        self._last = self._look()

    def advance(self) -> None:
        """Add the time since the last call, unless somebody else did."""
        self._last = self._look()

    def stamp_s(self, connection: Connection) -> float:
        """Return the time for what happens in a transaction now; no age will be too great."""
        assert self._last is not None
        return stamp_s(_load(connection), self._last, self._clock_s())

    def now_s(self, connection: Connection) -> float:
        """Return the time to compare stamps with."""
        assert self._last is not None
        return now_s(_load(connection), self._last, self._clock_s())

    def _look(self) -> Look:
        def act(connection: Connection) -> Look:
            found = ELAPSED.find_or_none(connection, _ROW)
            row = None if found is None else Elapsed(*found[1:])
            after, look = advance(row, self._last, self._clock_s(), uuid4().hex)
            if after != row:
                sealed = ELAPSED.sealed(_ROW, after.elapsed_s, after.token)
                connection.execute(ELAPSED.replacement, sealed)
            return look

        # Kept by the caller only if the row was stored.
        return self._database.write(act)


def _load(connection: Connection) -> Elapsed:
    row = ELAPSED.find(connection, _ROW)
    assert row is not None
    return Elapsed(*row[1:])
