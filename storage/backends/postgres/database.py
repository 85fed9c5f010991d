"""A PostgreSQL database that several storage processes share.

Theory of operation
-------------------
All acts that write, of all processes, run one after another: each transaction begins with an
advisory lock that the server holds for it until it has ended. So what is right for the one writing
thread of the embedded database is right here, and no act has to say what it may collide with. Each
statement reads what was committed before it (READ COMMITTED), which with the lock is what every act
before this one has left. Acts of one process that wait together share a transaction
(``sql.groups``). Readers wait for nobody: they see one committed state (REPEATABLE READ).

A connection that breaks ends its transaction, on the server too, and frees the lock. What was not
committed never happened, and the acts are run again on another connection. Each transaction leaves
a token of its own in a row of its process: so where the answer to a COMMIT did not come, the next
connection finds out whether it happened. (The number of the transaction would not do: a server that
crashed gives it again.) Callers see a broken connection, or a server that starts again, as a delay;
after PATIENCE_S they get Unavailable. A process that stops inside a transaction holds the others up
until the server ends that (``idle_in_transaction_session_timeout``, ``transaction_timeout``); what
it does later is refused.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import IsolationLevel
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from phalanx.errors import FailedPrecondition, PhalanxError, Unavailable
from phalanx.telemetry.logs import get_logger
from storage.backends.postgres.connection import PostgresConnection, RawConnection
from storage.backends.postgres.errors import passes, translated, was_waited_for
from storage.backends.postgres.schema import migrate
from storage.backends.sql.connection import Act, ResultT
from storage.backends.sql.groups import Job, WritingThread
from storage.backends.sql.rows import TABLES

PATIENCE_S = 10.0
"""So long an act is tried again while the database cannot be reached."""

CHECK_S = 2.0
"""So long a check of the database waits for a connection."""

WRITE_LOCK = 0x5048_4C58_0000
"""Number of the advisory lock that every writing transaction holds."""

_READERS = 16
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0

_CONNECTION: dict[str, Any] = {
    "application_name": "phalanx-storage",
    "connect_timeout": 5,
    # Of several hosts, the one that leads.
    "target_session_attrs": "read-write",
    # A server that is gone without a word is noticed within some ten seconds.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""What a URL may say otherwise."""

_SESSION = """
SELECT set_config('idle_in_transaction_session_timeout', '5s', false),
       set_config('statement_timeout', '30s', false),
       set_config('synchronous_commit', CASE current_setting('synchronous_commit')
           WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false)
"""
"""Acknowledged is what is durable, whatever is the default of the database."""

_WRITER_SESSION = """
SELECT set_config(name, '10s', false) FROM pg_settings WHERE name = 'transaction_timeout'
"""
"""Who stops in the midst of a statement is not idle. PostgreSQL has this since its version 17."""

_BEGIN = """
WITH noted AS (
    INSERT INTO outcomes VALUES (?, ?)
    ON CONFLICT (writer) DO UPDATE SET token = excluded.token RETURNING writer
)
SELECT pg_advisory_xact_lock(?) FROM noted
"""
"""Takes the lock, and leaves the token of the transaction, which is there later if it happened."""

_log = get_logger(__name__)


class PostgresDatabase:
    """The database behind ``url``.

    Raises FailedPrecondition (STATE_UNUSABLE, STATE_TOO_NEW).
    """

    def __init__(self, url: str) -> None:
        self._id = uuid4().hex
        self._settings = _CONNECTION | _parsed(url)
        self._stopping = threading.Event()
        self._writer: RawConnection | None = None
        self._pool: ConnectionPool[RawConnection] = ConnectionPool(
            kwargs=self._settings,
            min_size=1,
            max_size=_READERS,
            timeout=PATIENCE_S,
            # Whoever reads tries again by himself, and the pool must not sleep meanwhile.
            reconnect_timeout=_LONGEST_PAUSE_S / 4,
            # A server that started again has closed them all.
            check=ConnectionPool.check_connection,
            configure=_prepare_reader,
            name="phalanx-readers",
            open=False,
        )
        try:
            self._until_it_answers(self._migrate)
            self._pool.open()
        except psycopg.Error as error:
            self._close_connections()
            raise FailedPrecondition(
                f"cannot use the database: {str(error).strip()}", reason="STATE_UNUSABLE"
            ) from error
        except BaseException:
            self._close_connections()
            raise
        self._writing = WritingThread("postgres-writer", "database", self._commit)

    def _migrate(self) -> None:
        # In a session of its own, for which no time is too long.
        with psycopg.connect(**self._settings) as raw:
            # Whatever is the default of the database: after waiting for another process to migrate,
            # a snapshot from before would not show what it did.
            raw.isolation_level = IsolationLevel.READ_COMMITTED
            connection = PostgresConnection(raw)
            migrate(connection)
            (fsync,) = connection.execute("SELECT current_setting('fsync')").fetchone()
        if fsync == "off":
            _log.warning("database_is_not_durable", message="the database has fsync = off")

    def write(self, act: Act[ResultT], *, alone: bool = False) -> ResultT:
        """Run ``act`` in a transaction, or ``alone`` in it; return its result once it is durable.

        See ``sql.connection.Database``.
        """
        if self._writing.is_current:
            assert self._writer is not None
            return act(PostgresConnection(self._writer))
        return self._writing.run(act, alone=alone)

    def read(self, act: Act[ResultT]) -> ResultT:
        """Run ``act``, which only reads, on one consistent state; return its result.

        Inside an act it reads with that one's transaction, before which all writers wait: it must
        not wait itself for a reader's connection.
        """
        if self._writing.is_current:
            assert self._writer is not None
            return act(PostgresConnection(self._writer))

        def attempt() -> ResultT:
            with self._pool.connection() as raw:
                return act(PostgresConnection(raw))

        if self._stopping.is_set():
            raise Unavailable("storage is stopping; try again", reason="STOPPING")
        try:
            return self._until_it_answers(attempt)
        except psycopg.Error as error:
            raise translated(error) from error

    def check(self) -> None:
        """Raise Unavailable if the database does not answer at once."""
        try:
            with self._pool.connection(CHECK_S) as raw:
                raw.execute("SELECT 1")
        except psycopg.Error as error:
            raise translated(error) from error

    def reclaim(self) -> None:
        """Do nothing: the server's own autovacuum does it."""

    def used_bytes(self) -> int:
        """Return the size of all tables with their indexes."""
        names = [*(table.name for table in TABLES), "records", "versions"]
        sizes = " + ".join(f"pg_total_relation_size('{name}')" for name in names)
        return int(self.read(lambda found: found.execute(f"SELECT {sizes}").fetchone()[0]))

    def close(self) -> None:
        """Finish what is queued and close; later calls raise Unavailable."""
        self._stopping.set()
        if self._writing.close():
            with suppress(psycopg.Error):
                self._with_writer(self._leave)
            self._close_connections()

    def _leave(self, connection: PostgresConnection) -> None:
        connection.execute("DELETE FROM outcomes WHERE writer = ?", (self._id,))
        connection.raw.commit()

    def _close_connections(self) -> None:
        self._pool.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # What follows runs on the writing thread, but at the start.

    def _commit(self, jobs: Sequence[Job]) -> PhalanxError | None:
        """Run the jobs in one transaction; return why none of them happened, or None."""
        try:
            self._until_it_answers(lambda: self._with_writer(partial(self._run, jobs=jobs)))
        except (psycopg.Error, PhalanxError) as error:
            return translated(error)
        return None

    def _run(self, connection: PostgresConnection, *, jobs: Sequence[Job]) -> None:
        token = uuid4().hex
        connection.execute(_BEGIN, (self._id, token, WRITE_LOCK))
        for job in jobs:
            _run_in_savepoint(connection.raw, job)
        try:
            connection.raw.commit()
        except psycopg.Error as error:
            connection.raw.close()
            if not passes(error) or not self._has_committed(token):
                raise

    def _has_committed(self, token: str) -> bool:
        """Say whether a transaction happened whose end nobody told."""

        def ask(connection: PostgresConnection) -> bool:
            # Whoever has the lock knows that the transaction that had it is over.
            connection.execute("SELECT pg_advisory_xact_lock(?)", (WRITE_LOCK,))
            statement = "SELECT 1 FROM outcomes WHERE writer = ? AND token = ?"
            found = connection.execute(statement, (self._id, token)).fetchone()
            connection.raw.rollback()
            return found is not None

        return self._until_it_answers(lambda: self._with_writer(ask))

    def _with_writer(self, function: Callable[[PostgresConnection], ResultT]) -> ResultT:
        """Call a function with the connection that writes, made anew if it broke."""
        if self._writer is None or self._writer.closed:
            self._writer = psycopg.connect(**self._settings)
            # With a snapshot that is older than the lock, an act would not see those before it.
            self._writer.isolation_level = IsolationLevel.READ_COMMITTED
            self._writer.execute(_SESSION)
            self._writer.execute(_WRITER_SESSION)
            self._writer.commit()
        try:
            return function(PostgresConnection(self._writer))
        except BaseException:
            # Nothing of it may stay open, and the next one is sure to reach a server.
            self._writer.close()
            raise

    def _until_it_answers(self, attempt: Callable[[], ResultT]) -> ResultT:
        """Return what ``attempt`` returns, tried again while the database is away.

        It is known to be away from the first failure on. What an attempt took before that is no
        waiting: a process that stood still has tried once, with a connection that the server ended.
        """
        ends_s = time.monotonic() + PATIENCE_S
        is_first = True
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return attempt()
            except psycopg.Error as error:
                if is_first and not was_waited_for(error):
                    ends_s = time.monotonic() + PATIENCE_S
                is_first = False
                if not passes(error) or time.monotonic() >= ends_s or self._stopping.is_set():
                    raise
                _log.warning("database_away", message=str(error).strip())
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _parsed(url: str) -> dict[str, Any]:
    """Return what a URL says; where it is none no part of it is told, as it may be a password."""
    try:
        settings = conninfo_to_dict(url)
    except psycopg.Error:
        settings = {}
    # A password with a plain "@" or "/" ends early, and its rest would be told as a name.
    misplaced = any("@" in str(settings.get(name, "")) for name in ("host", "port", "dbname"))
    if not settings or misplaced:
        # From None: the other error quotes what it does not understand.
        raise FailedPrecondition(
            "the URL of the database is none that PostgreSQL takes; write "
            "postgresql://USER@HOST:PORT/DATABASE, with what is special in a user or password "
            "percent-encoded (%40 for @, %25 for %), or give the password in PGPASSWORD",
            reason="STATE_UNUSABLE",
        ) from None
    return settings


def _run_in_savepoint(raw: RawConnection, job: Job) -> None:
    job.result = job.error = None
    try:
        with raw.transaction():
            job.result = job.act(PostgresConnection(raw))
    except Exception as error:
        if isinstance(error, psycopg.Error) and (passes(error) or raw.closed):
            raise
        job.error = translated(error) if isinstance(error, psycopg.Error) else error


def _prepare_reader(raw: RawConnection) -> None:
    raw.execute(_SESSION)
    raw.commit()
    raw.isolation_level = IsolationLevel.REPEATABLE_READ
    raw.read_only = True
