"""One SQLite database: many readers, one writing thread, commits in groups.

Theory of operation
-------------------
All writes are *acts*, functions of a connection, and run on one thread (``sql.groups``), those that
wait together in one transaction, hence with one fsync. Each has a savepoint of its own, so that one
that raises undoes only itself.

An act that does something outside of the database, which no rollback undoes, asks to be *alone*:
what it sees is durable by then. A blob that only an open transaction has let go of must stay.

If the transaction itself fails because the disk is full, it is rolled back and its acts are tried
one by one, so that a large one does not take small ones down with it. Acts must therefore be
repeatable.

If the disk fails (fsync above all), the pages that were to be written may be marked clean in memory
although they are not on the disk. Trying again on the same files would acknowledge what the disk
does not have. The database stops for good, ``on_failure`` is called, and the process is expected to
end. At the next start, the log that can still be read is written over itself and synced
(``StateFolder.write_again``), then copied into the database file, and that is synced, before
anything is served.
"""

import contextlib
import os
import queue
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from phalanx.errors import DataLoss, FailedPrecondition, Internal, PhalanxError, Unavailable
from storage.backends.files import DATABASE_NAME, disk_full
from storage.backends.sql.connection import Act, Connection, ResultT
from storage.backends.sql.groups import Job, WritingThread
from storage.backends.sql.rows import TABLES
from storage.backends.sqlite.schema import APPLICATION_ID, migrate

FILE_NAME = DATABASE_NAME
LOG_NAME = f"{FILE_NAME}-wal"
_INCREMENTAL = 2
_READERS = 16
_VACUUM_PAGES = 2000
_BUSY_TIMEOUT_S = 10.0
_LOG_LIMIT_BYTES = 8 * 1024 * 1024
LOG_PAGES = 1000
"""Pages of the log at which it is copied into the database file."""


class SqliteConnection(sqlite3.Connection):
    """A connection of ``sql.connection``."""

    def scan(self, selection: str) -> Iterator[Any]:
        """Yield all rows of a table."""
        return iter(self.execute(f"{selection} NOT INDEXED"))


def ignore(_: object) -> None:
    """Take a report that nobody asked for."""


class Database:
    """The database in ``folder``.

    ``on_failure`` is called once, from the writing thread, when the disk failed; ``on_corruption``
    hears of damage that was found at the start and does not keep it from serving.
    """

    def __init__(
        self,
        folder: Path,
        on_failure: Callable[[PhalanxError], None],
        on_corruption: Callable[[str], None] = ignore,
        *,
        log_pages: int = LOG_PAGES,
    ) -> None:
        self._path = folder / FILE_NAME
        self._log_pages = log_pages
        self._on_corruption = on_corruption
        self._on_failure = on_failure
        self._failure: PhalanxError | None = None
        self._readers: queue.LifoQueue[SqliteConnection] = queue.LifoQueue(_READERS)
        self._reader_slots = threading.BoundedSemaphore(_READERS)
        self._connection = self._open()
        self._writing = WritingThread("sqlite-writer", "disk", self._commit)

    def _open(self) -> SqliteConnection:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(self._path).st_mode):
                raise FailedPrecondition(
                    f"{FILE_NAME} in the state folder is not a plain file", reason="STATE_UNUSABLE"
                )
        connection = self._connect()
        try:
            # Said again of a database that has it already, it writes, which a full disk refuses.
            if connection.execute("PRAGMA auto_vacuum").fetchone()[0] != _INCREMENTAL:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            _write_ahead(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA journal_size_limit = {_LOG_LIMIT_BYTES}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {self._log_pages}")
            application_id = connection.execute("PRAGMA application_id").fetchone()[0]
            migrate(connection)
            if application_id != APPLICATION_ID:
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            _settle_log(connection)
            self._check(connection)
        except BaseException as error:
            connection.close()
            if not isinstance(error, sqlite3.Error):
                raise
            raise _unusable(error) from error
        return connection

    def _check(self, connection: SqliteConnection) -> None:
        """Look for damage; FailedPrecondition (STATE_UNUSABLE) where it cannot be mended."""
        found = _damage(connection)
        if found:
            # An index is mended from its table.
            connection.execute("REINDEX")
            self._on_corruption(f"{FILE_NAME} was damaged, its indexes were made anew: {found}")
            found = _damage(connection)
        if found:
            raise FailedPrecondition(
                f"{FILE_NAME} in the state folder is damaged: {found}; restore it from a backup",
                reason="STATE_UNUSABLE",
            )
        for orphan in connection.execute("PRAGMA foreign_key_check"):
            self._on_corruption(f"a row of the table {orphan[0]!r} of storage belongs to nothing")
        for table in TABLES:
            try:
                table.verify(connection)
            except DataLoss as error:
                # What needs the row will say so; the rest is served.
                self._on_corruption(error.message)

    def _connect(self) -> SqliteConnection:
        try:
            return sqlite3.connect(
                self._path,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
                factory=SqliteConnection,
            )
        except sqlite3.Error as error:
            raise _unusable(error) from error

    def write(self, act: Act[ResultT], *, alone: bool = False) -> ResultT:
        """Run ``act`` in a transaction, or ``alone`` in it; return its result once that is durable.

        The act may be run more than once and must have no effects but those on its connection, or
        repeatable ones. What it raises is raised here. Called from inside an act, it joins that
        one's transaction.
        """
        if self._writing.is_current:
            return act(self._connection)
        if self._failure is not None:
            raise self._failure
        return self._writing.run(act, alone=alone)

    def read(self, act: Act[ResultT]) -> ResultT:
        """Run ``act``, which only reads, on one consistent state; return its result."""
        if self._writing.is_closed:
            raise Unavailable("storage is stopping; try again", reason="STOPPING")
        with self._reader_slots:
            try:
                connection = self._take_reader()
                connection.execute("BEGIN")
                try:
                    return act(connection)
                finally:
                    connection.execute("COMMIT")
                    self._readers.put_nowait(connection)
            except sqlite3.Error as error:
                raise _translated(error) from error

    def reclaim(self) -> None:
        """Shrink the file."""
        while self.write(vacuum_some):
            pass

    def used_bytes(self) -> int:
        """Return the size of the database without its free pages."""
        return self.read(used_bytes)

    def close(self) -> None:
        """Finish what is queued and close; later calls raise Unavailable."""
        if not self._writing.close():
            return
        while True:
            try:
                self._readers.get_nowait().close()
            except queue.Empty:
                break
        self._connection.close()

    def _take_reader(self) -> SqliteConnection:
        try:
            return self._readers.get_nowait()
        except queue.Empty:
            connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
            return connection

    def _commit(self, jobs: Sequence[Job]) -> PhalanxError | None:
        """Run the jobs in one transaction; return why none of them happened, or None."""
        if self._failure is not None:
            return self._failure
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for job in jobs:
                self._run_in_savepoint(job)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            if _kind(error) == sqlite3.SQLITE_IOERR and not _is_full(error):
                return self._fail(error)
            return _translated(error)
        return None

    def _run_in_savepoint(self, job: Job) -> None:
        job.result = job.error = None
        self._connection.execute("SAVEPOINT act")
        try:
            job.result = job.act(self._connection)
        except Exception as error:
            if not self._connection.in_transaction or _ends_transaction(error):
                raise
            job.error = error
            self._connection.execute("ROLLBACK TO act")
        self._connection.execute("RELEASE act")

    def _fail(self, error: sqlite3.Error) -> PhalanxError:
        self._failure = Unavailable(
            f"the disk of the storage service failed ({error.sqlite_errorname}); nothing was "
            "acknowledged, and storage must start again",
            reason="IO_ERROR",
        )
        self._on_failure(self._failure)
        return self._failure


def vacuum_some(connection: Connection) -> bool:
    """Give some free pages back; return whether there are more."""
    connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
    free: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
    return free > 0


def used_bytes(connection: Connection) -> int:
    """Return the size of all pages that are not free."""
    pages, free, size_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size_bytes)


def _unusable(error: sqlite3.Error) -> FailedPrecondition:
    return FailedPrecondition(
        f"cannot open {FILE_NAME} in the state folder: {error}", reason="STATE_UNUSABLE"
    )


def _damage(connection: sqlite3.Connection) -> str:
    """Return what is wrong with the structure of the file, or nothing."""
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    return "" if found == "ok" else str(found)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Log before writing. SQLite says which mode it has then, and no error where it is another:
    without the log, the last commit before a power failure can be lost."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise sqlite3.OperationalError(
            f"its write-ahead log cannot be used (journal mode {mode}); start storage again, and "
            "look at the disk if that does not help"
        )


def _settle_log(connection: sqlite3.Connection) -> None:
    """Make durable what a killed process had written but not synced, before anyone reads it."""
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error as error:
        # On a full disk reads must go on; the log stays as it is, and the next commit syncs it.
        if not _is_full(error):
            raise


_TRANSACTION_ERRORS = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_BUSY,
)


def _kind(error: sqlite3.Error) -> int:
    # Errors that Python's module raises by itself, for wrong arguments, have no code.
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _is_full(error: sqlite3.Error) -> bool:
    # The index of the log lies in shared memory; on a full disk it cannot grow.
    code: int = getattr(error, "sqlite_errorcode", 0)
    return _kind(error) == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE


def _ends_transaction(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) and _kind(error) in _TRANSACTION_ERRORS


def _translated(error: sqlite3.Error) -> PhalanxError:
    """Return what callers see of an error that is not the fault of one act."""
    if _is_full(error):
        return disk_full("the record")
    if _kind(error) == sqlite3.SQLITE_BUSY:
        return Unavailable("the database is busy; try again", reason="OVERLOADED")
    if _kind(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR):
        return DataLoss(
            "the database of the storage service is damaged; restore it from a backup",
            reason="DATABASE_CORRUPT",
        )
    return Internal(f"the database refused a statement: {error}", reason="DATABASE_ERROR")
