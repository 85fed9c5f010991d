"""Storage's back end on a simulated disk: the stores that ship, over SQLite in memory.

A write of rows is one transaction, durable when it returns and never in part; blobs are files
that are written, synced and renamed as the shipped store does it. Killing the process loses what
was not synced. A disk that fails ends the process, after the write happened or before.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from phalanx.errors import DataLoss, InvalidArgument, NotFound, PhalanxError, Unavailable
from phalanx.testing.simulation.disk import DiskFailed, DiskFull, SimulatedDisk
from phalanx.testing.simulation.loop import World
from storage.backends.files import disk_full
from storage.backends.sql.catalog import SqlCatalog
from storage.backends.sql.jobs import SqlJobs
from storage.backends.sql.journals import SqlJournals
from storage.backends.sql.leases import SqlLeases
from storage.backends.sql.references import SqlReferences
from storage.backends.sql.snapshots import SqlSnapshots
from storage.backends.sqlite.database import SqliteConnection, used_bytes, vacuum_some
from storage.backends.sqlite.schema import migrate
from storage.core.garbage import is_old_enough
from storage.core.keys import check_digest, invalid, is_digest
from storage.interfaces import Backend, Buffer, StoredBlob


@cache
def _new_database() -> bytes:
    """A database with its tables and no rows."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    migrate(connection)
    content: bytes = connection.serialize()
    connection.close()
    return content


class Machine:
    """The machine of storage: what outlives its processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.disk = SimulatedDisk()
        self.on_write: Callable[[], None] = lambda: None
        """Called when a part of a blob was written and is not synced."""
        self.collected: set[str] = set()
        """Blobs that were garbage once."""
        self.touched_s: dict[str, float] = {}
        """When each blob was stored, or asked for as one that is needed."""
        self.connection = sqlite3.connect(
            ":memory:", isolation_level=None, cached_statements=256, factory=SqliteConnection
        )
        self.connection.deserialize(_new_database())
        self.connection.execute("PRAGMA foreign_keys = ON")

    def backend(
        self,
        on_corruption: Callable[[str], None],
        on_failure: Callable[[PhalanxError], None],
        now_unix_nanos: Callable[[], int],
        namespace_bytes_max: int,
    ) -> Backend:
        """Open what the disk holds, as a process does when it starts."""
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")
        database: Any = Database(self, on_failure)
        blobs = Blobs(self, on_failure)
        return Backend(
            name="simulated",
            blobs=blobs,
            journals=SqlJournals(database),
            leases=SqlLeases(database, now_unix_nanos),
            jobs=SqlJobs(database, blobs, now_unix_nanos, on_corruption),
            catalog=SqlCatalog(database, blobs, now_unix_nanos, namespace_bytes_max),
            references=SqlReferences(database, now_unix_nanos),
            snapshots=SqlSnapshots(database),
            close=lambda: None,
        )


class Database:
    """Stands in for `storage.backends.sqlite.database.Database`."""

    def __init__(self, machine: Machine, on_failure: Callable[[PhalanxError], None]) -> None:
        self._machine = machine
        self._on_failure = on_failure

    def write(self, act: Callable[[sqlite3.Connection], Any], *, alone: bool = False) -> Any:
        machine = self._machine
        machine.world.transitions += 1
        try:
            machine.disk.demand_room("the record")
        except DiskFull:
            raise disk_full("the record") from None
        if machine.disk.failing and machine.world.chance.random() < 0.5:
            self._fail()
        connection = machine.connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = act(connection)
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        if machine.disk.failing:
            self._fail()
        return result

    def read(self, act: Callable[[sqlite3.Connection], Any]) -> Any:
        self._machine.world.transitions += 1
        return act(self._machine.connection)

    def reclaim(self) -> None:
        while self.write(vacuum_some):
            pass

    def used_bytes(self) -> int:
        return int(self.read(used_bytes))

    def _fail(self) -> None:
        # The process is replaced; by then the disk works again.
        self._machine.disk.failing = False
        self._machine.disk.failed += 1
        self._on_failure(Unavailable("the disk failed", reason="IO_ERROR"))


class Blobs:
    """Stands in for `storage.backends.directory_blobs.DirectoryBlobs`."""

    def __init__(self, machine: Machine, on_failure: Callable[[PhalanxError], None]) -> None:
        self._machine = machine
        self._disk = machine.disk
        self._world = machine.world
        self._touched_s = machine.touched_s
        self._uploads = 0
        self._on_failure = on_failure
        self._corrupt: set[str] = set()
        for name in self._disk.names():
            if not is_digest(name):
                self._disk.remove(name)
        self._disk.sync_folder()

    def writer(self, expected_bytes: int = -1) -> _Writer:
        try:
            self._disk.demand_room("a blob")
        except DiskFull:
            raise disk_full("a blob") from None
        self._uploads += 1
        self._world.transitions += 1
        name = f"upload-{self._uploads}"
        return _Writer(self._disk, name, self._stored, self._machine.on_write)

    def open(self, digest: str) -> _Reader:
        check_digest(digest, "digest")
        self._world.transitions += 1
        content = self._disk.read(digest)
        if content is None:
            raise NotFound(f"blob {digest} is not stored", reason="BLOB_NOT_FOUND")
        return _Reader(digest, content, self._corrupt)

    def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        found = {}
        for digest in digests:
            content = self._disk.read(check_digest(digest, "digests"))
            if content is not None and digest not in self._corrupt:
                found[digest] = len(content)
        return found

    def touch(self, digests: Iterable[str]) -> Mapping[str, int]:
        found = self.sizes(digests)
        self._touched_s.update(dict.fromkeys(found, self._world.now_s))
        return found

    def scan(self) -> Iterator[StoredBlob]:
        for name in self._disk.names():
            if is_digest(name):
                yield StoredBlob(name, len(self._disk.read(name) or b""), self._age_s(name))

    def remove_if_old(self, digest: str, grace_s: float) -> int | None:
        content = self._disk.read(digest)
        if content is None or not is_old_enough(self._age_s(digest), grace_s):
            return None
        self._disk.remove(digest)
        self._machine.collected.add(digest)
        self._corrupt.discard(digest)
        return len(content)

    def usage_bytes(self) -> int:
        return 0

    def _age_s(self, digest: str) -> float:
        return self._world.now_s - self._touched_s.get(digest, 0.0)

    def _stored(self, digest: str) -> None:
        self._corrupt.discard(digest)
        self._touched_s[digest] = self._world.now_s


class _Writer:
    def __init__(
        self,
        disk: SimulatedDisk,
        name: str,
        stored: Callable[[str], None],
        on_write: Callable[[], None],
    ) -> None:
        self._disk = disk
        self._on_write = on_write
        self._name = name
        self._stored = stored
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._over = False
        self._act(lambda: disk.write(name, b""))

    def write(self, chunk: Buffer) -> None:
        self._hash.update(chunk)
        self._size_bytes += len(chunk)
        self._act(lambda: self._disk.write(self._name, chunk))
        if len(chunk):
            self._on_write()

    def commit(self, expected_digest: str = "", expected_bytes: int = -1) -> StoredBlob:
        digest = self._hash.hexdigest()
        if expected_bytes not in (-1, self._size_bytes):
            raise InvalidArgument("another size than announced", reason="SIZE_MISMATCH")
        if expected_digest not in ("", digest):
            raise InvalidArgument("another digest than announced", reason="DIGEST_MISMATCH")
        self._act(lambda: self._disk.sync(self._name))
        self._over = True
        self._disk.rename(self._name, digest)
        self._act(self._disk.sync_folder)
        self._stored(digest)
        return StoredBlob(digest, self._size_bytes)

    def abort(self) -> None:
        if not self._over:
            self._over = True
            self._disk.remove(self._name)

    def _act(self, act: Callable[[], None]) -> None:
        try:
            act()
        except DiskFull:
            raise disk_full("a blob") from None
        except DiskFailed as error:
            raise Unavailable(str(error), reason="IO_ERROR") from None


class _Reader:
    def __init__(self, digest: str, content: bytes, corrupt: set[str]) -> None:
        self._digest = digest
        self._content = content
        self._corrupt = corrupt
        self.size_bytes = len(content)

    def chunks(self, offset: int, length: int, chunk_bytes: int) -> Iterator[bytes]:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise invalid("offset", "the bytes are not all inside the blob")
        if length == self.size_bytes:
            self.verify()
        return iter([self._content[offset : offset + length]] if length else [])

    def verify(self) -> None:
        if hashlib.sha256(self._content).hexdigest() != self._digest:
            self._corrupt.add(self._digest)
            raise DataLoss(f"blob {self._digest} is damaged", reason="BLOB_CORRUPT")

    def close(self) -> None:
        pass
