"""Who names which blob, and giving space back."""

from collections.abc import Callable, Iterable, Sequence

from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.rows import LEASES, REFERENCES
from storage.core.catalog import REQUEST_MEMORY_S
from storage.core.keys import check_digest
from storage.core.leases import LeaseRow
from storage.core.snapshots import HOLD_LEASE, check_no_hold

JOURNAL = "journal"
"""The kind of reference of what looks like a digest in a record."""

PIN = "pin"
"""The kind of reference of a pinned blob."""

LINK = "link"
"""The kind of reference with which a data set names a chunk that is made, not stored."""


def add_references(
    connection: Connection, kind: str, owner: str, position: int, digests: Iterable[str]
) -> None:
    """Note that an owner names these blobs."""
    connection.executemany(
        REFERENCES.insertion_if_new,
        (REFERENCES.sealed(digest, kind, owner, position) for digest in digests),
    )


def drop_references(
    connection: Connection, kind: str, owner: str, position: int | None = None
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


_NAMED_BY_LIMIT = 20


class SqlReferences:
    """A ReferenceStore; sweeps are acts, as all registrations are.

    ``housekeeping`` is what else is to be done to give space back.
    """

    def __init__(
        self,
        database: Database,
        now_unix_nanos: Callable[[], int],
        housekeeping: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._database = database
        self._now_unix_nanos = now_unix_nanos
        self._housekeeping = housekeeping

    def verify(self) -> None:
        """Read all references; raise DataLoss if one is damaged."""
        self._database.read(REFERENCES.verify)

    def unreferenced(self, digests: Sequence[str]) -> list[str]:
        """Return those that nothing names."""
        return self._database.read(lambda connection: _unreferenced(connection, digests))

    def sweep(self, digests: Sequence[str], remove: Callable[[str], int | None]) -> list[int]:
        """Remove those that nothing names."""

        def act(connection: Connection) -> list[int]:
            row = LEASES.find(connection, HOLD_LEASE)
            check_no_hold(None if row is None else LeaseRow(*row[1:]))
            results = [remove(digest) for digest in _unreferenced(connection, digests)]
            return [size_bytes for size_bytes in results if size_bytes is not None]

        return self._database.write(act, alone=True)

    def reclaim(self) -> None:
        """Forget old request ids and give their space back."""
        oldest_s = self._now_unix_nanos() / 1e9 - REQUEST_MEMORY_S
        self._database.write(
            lambda connection: (
                connection.execute("DELETE FROM requests WHERE create_s < ?", (oldest_s,)).rowcount
            )
        )
        for work in self._housekeeping:
            work()
        self._database.reclaim()

    def usage_bytes(self) -> int:
        """Return the size of the database."""
        return self._database.used_bytes()

    def pinned_by(self, holder_prefix: str) -> list[str]:
        """Return the blobs that holders whose names begin so pin."""
        # Constants of this program have no character that means something in a pattern.
        where = "kind = ? AND owner LIKE ?"
        values = (PIN, f"{holder_prefix}%")
        return self._database.read(
            lambda connection: sorted(
                {row[0] for row in REFERENCES.select(connection, where, *values)}
            )
        )

    def named_by(self, digest: str) -> list[str]:
        """Return in words who names a blob."""
        check_digest(digest, "digest")
        return self._database.read(lambda connection: _named_by(connection, digest))


def _unreferenced(connection: Connection, digests: Sequence[str]) -> list[str]:
    statement = "SELECT 1 FROM blob_references WHERE digest = ? AND kind <> ? LIMIT 1"
    found = (
        (digest, connection.execute(statement, (check_digest(digest, "digests"), LINK)).fetchone())
        for digest in digests
    )
    return [digest for digest, row in found if row is None]


def _named_by(connection: Connection, digest: str) -> list[str]:
    where = "digest = ? AND kind <> ? ORDER BY kind, owner, position LIMIT ?"
    rows = REFERENCES.select(connection, where, digest, LINK, _NAMED_BY_LIMIT)
    return list(dict.fromkeys(_in_words(connection, *row[1:]) for row in rows))


def _in_words(connection: Connection, kind: str, owner: str, position: int) -> str:
    """Say who has a reference, as precisely as the rows that it leads to allow."""
    if kind == JOURNAL:
        names = connection.execute("SELECT name FROM streams WHERE id = ?", (int(owner),))
        name = names.fetchone()
        return f"journal {name[0] if name else owner} at record {position}"
    if kind == "checkpoint":
        steps = connection.execute("SELECT step FROM checkpoints WHERE id = ?", (position,))
        step = steps.fetchone()
        return f"checkpoint of job {owner}" + (f" at step {step[0]}" if step else "")
    if kind == "pin":
        return f"pin of {owner}"
    statement = "SELECT namespace, name, version FROM versions WHERE id = ?"
    row = connection.execute(statement, (position,)).fetchone()
    what = "data set" if kind == "dataset" else kind
    return f"{what} {row[0]}/{row[1]}@{row[2]}" if row else f"a {what} that is gone"
