"""What the rows need of a database.

Statements are written in what SQLite and PostgreSQL have in common. A ``?`` stands for a value and
for nothing else; identifiers are constants of this program.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

Value = str | int | float | bytes
ResultT = TypeVar("ResultT")


class Cursor(Protocol):
    """The outcome of a statement."""

    @property
    def rowcount(self) -> int:
        """How many rows it changed."""

    def fetchone(self) -> Any:
        """Return the next row, or None."""

    def fetchall(self) -> list[Any]:
        """Return the rest of the rows."""

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """A connection inside a transaction; sqlite3's own one has most of this."""

    def execute(self, statement: str, values: Sequence[Value] = (), /) -> Cursor:
        """Run a statement; its rows may all be in memory at once."""

    def executemany(self, statement: str, rows: Iterable[Sequence[Value]], /) -> Cursor:
        """Run a statement once for each row."""

    def scan(self, selection: str) -> Iterator[Any]:
        """Yield all rows of a SELECT without conditions, in any order.

        The rows come from the table, not from an index, which may be what is damaged; few are in
        memory at once.
        """


Act = Callable[[Connection], ResultT]


class Database(Protocol):
    """A database that runs acts; any of them may run more than once."""

    def write(self, act: Act[ResultT], *, alone: bool = False) -> ResultT:
        """Run ``act`` in a transaction; return its result once that is durable.

        All acts, of all processes that share the database, run one after another. One that does
        something outside of the database asks to be ``alone`` in its transaction: what it sees is
        durable by then. Called from inside an act, it joins that one's transaction. The act must
        have no effects but those on its connection, or repeatable ones; what it raises is raised
        here.
        """

    def read(self, act: Act[ResultT]) -> ResultT:
        """Run ``act``, which only reads, on one consistent state that is durable."""

    def reclaim(self) -> None:
        """Give freed space back to the operating system."""

    def used_bytes(self) -> int:
        """Return the size of all tables."""
