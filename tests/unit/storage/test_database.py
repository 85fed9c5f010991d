"""The writing thread: one fsync for many, nobody answered before it, failures that spread right."""

import sqlite3
import threading
from functools import partial

import pytest

from phalanx.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from storage.backends.sql import groups
from storage.backends.sql.references import (
    SqlReferences,
    add_references,
    drop_references,
)
from storage.backends.sql.rows import PINS
from storage.backends.sqlite.database import FILE_NAME, Database
from storage.backends.sqlite.schema import MIGRATIONS, migrate

GUARD_S = 30


@pytest.fixture
def failures():
    return []


@pytest.fixture
def database(tmp_path, failures):
    database = Database(tmp_path, failures.append)
    yield database
    database.close()


def insert(holder):
    def act(connection):
        connection.execute("INSERT INTO leases VALUES (?, ?, 1, 1, 0)", (holder, holder))
        return holder

    return act


def holders(database):
    rows = database.read(
        lambda connection: connection.execute("SELECT name FROM leases ORDER BY name").fetchall()
    )
    return [name for (name,) in rows]


class Gate:
    """Holds the writing thread inside one act, so that others queue up behind it."""

    def __init__(self, database):
        self._entered, self._open = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: database.write(self._act))
        self._thread.start()
        assert self._entered.wait(GUARD_S)

    def _act(self, connection):
        self._entered.set()
        assert self._open.wait(GUARD_S)

    def open(self):
        self._open.set()
        self._thread.join()


def queued(database, count):
    deadline = threading.Event()
    for _ in range(3000):
        if database._writing.queue.qsize() >= count:
            return
        deadline.wait(0.01)
    raise AssertionError("the acts never queued up")


def run_together(database, acts):
    """Run acts from threads of their own in one transaction; return their results or errors."""
    gate = Gate(database)
    outcomes = [None] * len(acts)

    def run(index):
        try:
            outcomes[index] = database.write(acts[index])
        except (PhalanxError, sqlite3.Error) as error:
            outcomes[index] = error

    threads = []
    for index in range(len(acts)):
        thread = threading.Thread(target=run, args=(index,))
        thread.start()
        threads.append(thread)
        queued(database, index + 1)
    gate.open()
    for thread in threads:
        thread.join()
    return outcomes


def test_acts_that_wait_together_share_one_commit(database):
    statements = []
    database._connection.set_trace_callback(statements.append)
    assert run_together(database, [insert(f"h{i}") for i in range(20)]) == [
        f"h{i}" for i in range(20)
    ]
    assert len(holders(database)) == 20
    # The act of the gate has one of its own.
    assert statements.count("COMMIT") == 2


def test_an_act_that_raises_undoes_only_itself(database):
    def fails(connection):
        insert("gone")(connection)
        raise Aborted("no")

    outcomes = run_together(database, [insert("a"), fails, insert("b")])
    assert outcomes[0] == "a"
    assert isinstance(outcomes[1], Aborted)
    assert outcomes[2] == "b"
    assert holders(database) == ["a", "b"]


def test_a_wrong_statement_is_the_error_of_its_act_alone(database):
    def wrong(connection):
        connection.execute("SELECT nothing FROM nowhere")

    outcomes = run_together(database, [insert("a"), wrong, insert("b")])
    assert isinstance(outcomes[1], sqlite3.OperationalError)
    assert holders(database) == ["a", "b"]


def test_an_act_sees_what_those_before_it_in_its_transaction_did(database):
    def count(connection):
        return connection.execute("SELECT count(*) FROM leases").fetchone()[0]

    assert run_together(database, [insert("a"), insert("b"), count])[2] == 2


def test_a_blob_goes_only_once_what_let_go_of_it_is_durable(database):
    """Else a crash at that moment brings back a checkpoint whose blob is gone."""
    digest = "ab" * 32
    references = SqlReferences(database, lambda: 0)
    database.write(lambda connection: add_references(connection, "pin", "job-1", 0, [digest]))
    removed = []

    def remove(found):
        # A reader sees what a restart would find.
        assert references.unreferenced([found]) == [found]
        removed.append(found)
        return 1

    sweep = partial(references.sweep, [digest], remove)
    acts = [lambda connection: drop_references(connection, "pin", "job-1"), sweep, insert("a")]
    gate = Gate(database)
    threads = []
    for index, act in enumerate(acts):
        run = act if act is sweep else partial(database.write, act)
        threads.append(threading.Thread(target=run))
        threads[-1].start()
        queued(database, index + 1)
    gate.open()
    for thread in threads:
        thread.join()
    assert removed == [digest]
    assert holders(database) == ["a"]


class FailingConnection:
    """Raises an SQLite error at chosen statements, as the disk would have it."""

    def __init__(self, connection, statement, code, times):
        self._connection = connection
        self._statement, self._code, self._left = statement, code, times

    def execute(self, statement, *arguments):
        if statement == self._statement and self._left:
            self._left -= 1
            error = sqlite3.OperationalError("injected")
            error.sqlite_errorcode = self._code
            error.sqlite_errorname = "SQLITE_INJECTED"
            raise error
        return self._connection.execute(statement, *arguments)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def test_a_large_write_on_a_full_disk_takes_no_small_one_with_it(database, failures):
    def large(connection):
        insert("gone")(connection)
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    outcomes = run_together(database, [insert("a"), large, insert("b")])
    assert (outcomes[0], outcomes[2]) == ("a", "b")
    assert isinstance(outcomes[1], ResourceExhausted)
    assert outcomes[1].reason == "DISK_FULL"
    assert holders(database) == ["a", "b"]
    assert failures == []


def test_a_full_disk_at_commit_is_rolled_back_and_over_when_there_is_space(database, failures):
    real = database._connection
    database._connection = FailingConnection(real, "COMMIT", sqlite3.SQLITE_FULL, 1)
    with pytest.raises(ResourceExhausted):
        database.write(insert("a"))
    assert holders(database) == []
    assert database.write(insert("a")) == "a"
    assert failures == []
    database._connection = real


@pytest.mark.parametrize(
    "code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_DIR_FSYNC]
)
def test_after_a_failed_fsync_nothing_is_acknowledged_ever_again(database, failures, code):
    database.write(insert("before"))
    real = database._connection
    database._connection = FailingConnection(real, "COMMIT", code, 1)
    with pytest.raises(Unavailable) as caught:
        database.write(insert("lost"))
    assert caught.value.reason == "IO_ERROR"
    assert failures == [caught.value]
    with pytest.raises(Unavailable):
        database.write(insert("later"))
    assert len(failures) == 1
    assert holders(database) == ["before"]
    database._connection = real


def test_an_index_that_cannot_grow_is_a_full_disk(database, failures):
    real = database._connection
    database._connection = FailingConnection(real, "COMMIT", sqlite3.SQLITE_IOERR_SHMSIZE, 1)
    with pytest.raises(ResourceExhausted):
        database.write(insert("a"))
    assert database.write(insert("b")) == "b"
    assert failures == []
    database._connection = real


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (sqlite3.SQLITE_CORRUPT, DataLoss),
        (sqlite3.SQLITE_BUSY, Unavailable),
        (sqlite3.SQLITE_MISUSE, Internal),
    ],
)
def test_other_errors_of_a_transaction(database, failures, code, error):
    real = database._connection
    database._connection = FailingConnection(real, "COMMIT", code, 1)
    with pytest.raises(error):
        database.write(insert("a"))
    assert database.write(insert("b")) == "b"
    assert holders(database) == ["b"]
    assert failures == []
    database._connection = real


def test_too_many_waiting_writes_are_refused(database, monkeypatch):
    gate = Gate(database)
    database._writing.queue.maxsize = 1
    waiting = threading.Thread(target=lambda: database.write(insert("a")))
    waiting.start()
    queued(database, 1)
    with pytest.raises(Unavailable) as caught:
        database.write(insert("b"))
    assert caught.value.reason == "OVERLOADED"
    gate.open()
    waiting.join()
    assert holders(database) == ["a"]


def test_close_finishes_what_is_queued(tmp_path):
    database = Database(tmp_path, print)
    gate = Gate(database)
    results = []
    threads = [
        threading.Thread(target=lambda name=name: results.append(database.write(insert(name))))
        for name in "abc"
    ]
    for thread in threads:
        thread.start()
    queued(database, 3)
    closer = threading.Thread(target=database.close)
    closer.start()
    gate.open()
    for thread in (*threads, closer):
        thread.join()
    assert sorted(results) == ["a", "b", "c"]
    with pytest.raises(Unavailable):
        database.write(insert("late"))
    with pytest.raises(Unavailable):
        database.read(lambda connection: None)
    reopened = Database(tmp_path, print)
    assert holders(reopened) == ["a", "b", "c"]
    reopened.close()


def test_readers_cannot_write(database):
    with pytest.raises(Internal, match="readonly"):
        database.read(insert("a"))


def test_durability_settings(database):
    def settings(connection):
        return [
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "auto_vacuum", "foreign_keys")
        ]

    assert database.write(settings) == ["wal", 2, 2, 1]


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    Database(tmp_path, print).close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.commit()
    connection.close()
    with pytest.raises(FailedPrecondition) as caught:
        Database(tmp_path, print)
    assert caught.value.reason == "STATE_TOO_NEW"


def test_migrations_run_once_each_and_whole_or_not_at_all(tmp_path):
    connection = sqlite3.connect(tmp_path / "x", isolation_level=None)
    steps = ("CREATE TABLE a (x);", "ALTER TABLE a ADD COLUMN y; INSERT INTO a VALUES (1, 2);")
    migrate(connection, steps[:1])
    migrate(connection, steps)
    migrate(connection, steps)
    assert connection.execute("SELECT * FROM a").fetchall() == [(1, 2)]
    broken = (*steps, "INSERT INTO a VALUES (3, 4); INSERT INTO nowhere VALUES (1);")
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, broken)
    connection.close()
    connection = sqlite3.connect(tmp_path / "x", isolation_level=None)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert connection.execute("SELECT count(*) FROM a").fetchone() == (1,)
    connection.close()


def test_pins_of_before_holders_could_end_are_those_of_holders_that_have_not(tmp_path):
    connection = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    migrate(connection, MIGRATIONS[:1])
    connection.execute("INSERT INTO pins VALUES ('job-1', 'dataset', 'default', 'adult', 3)")
    migrate(connection, MIGRATIONS)
    row = ("dataset", "default", "adult", 3, "job-1", 0)
    assert list(PINS.select(connection, "holder = ?", "job-1")) == [row]
    connection.close()


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"this is not a database" * 100)
    with pytest.raises(FailedPrecondition) as caught:
        Database(tmp_path, print)
    assert caught.value.reason == "STATE_UNUSABLE"


def test_a_database_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FailedPrecondition, match="plain file"):
        Database(tmp_path, print)


def test_a_slow_disk_is_told(database, monkeypatch):
    monkeypatch.setattr(groups, "WRITE_TIMEOUT_S", 0.01)
    entered, leave = threading.Event(), threading.Event()

    def slow(connection):
        entered.set()
        assert leave.wait(GUARD_S)

    with pytest.raises(DeadlineExceeded) as caught:
        database.write(slow)
    leave.set()
    assert caught.value.reason == "DISK_SLOW"
    assert entered.wait(GUARD_S)
