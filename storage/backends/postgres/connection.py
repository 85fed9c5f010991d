"""A connection to PostgreSQL in the words of ``sql.connection``."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import psycopg

from storage.backends.sql.connection import Cursor, Value

RawConnection = psycopg.Connection[tuple[Any, ...]]

_SCAN_ROWS = 2000


class PostgresConnection:
    """A connection of ``sql.connection``, around one of psycopg."""

    def __init__(self, raw: RawConnection) -> None:
        self.raw = raw

    def execute(self, statement: str, values: Sequence[Value] = (), /) -> Cursor:
        """Run a statement."""
        return self.raw.execute(_translated(statement), values)

    def executemany(self, statement: str, rows: Iterable[Sequence[Value]], /) -> Cursor:
        """Run a statement once for each row, in few round trips."""
        cursor = self.raw.cursor()
        cursor.executemany(_translated(statement), rows)
        return cursor

    def scan(self, selection: str) -> Iterator[Any]:
        """Yield all rows of a table, which is what PostgreSQL reads where no condition is."""
        with self.raw.cursor(name="scan") as cursor:
            cursor.itersize = _SCAN_ROWS
            cursor.execute(_translated(selection))
            yield from cursor

    def run_script(self, script: str) -> None:
        """Run statements that have no values."""
        self.raw.execute(script.encode())


@cache
def _translated(statement: str) -> bytes:
    """Return a statement with psycopg's marks; as bytes, since only a literal may be a str."""
    return statement.replace("?", "%s").encode()
