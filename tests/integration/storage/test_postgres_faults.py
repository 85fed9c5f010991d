"""PostgreSQL goes away in the midst of all: nothing acknowledged is lost, nothing is half."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from uuid import uuid4

import psycopg
import pytest

from phalanx.errors import Aborted, FailedPrecondition, Internal, Unavailable
from phalanx.testing.storage_messages import acquire, append, digest_of, model, part, read
from phalanx.testing.tcp_proxy import Link, TcpProxy
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.opening import Places, open_backend
from storage.backends.postgres import database as database_module
from storage.backends.postgres.connection import PostgresConnection
from storage.backends.postgres.database import WRITE_LOCK, PostgresDatabase
from storage.backends.postgres.schema import MIGRATIONS, migrate
from storage.backends.sql.rows import ELAPSED, HOME, REQUESTS, TABLES
from storage.core.catalog import parse_name

GUARD_S = 60


@pytest.fixture
def name(postgres_server):
    """An empty database."""
    name = f"faults-{uuid4().hex}"
    postgres_server.create_database(name)
    yield name
    postgres_server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def opened(tmp_path):
    """Opens back ends that end with the test."""
    with contextlib.ExitStack() as stack:

        def open_at(url, folder="state"):
            backend = open_backend(
                Places(tmp_path / folder, url), now_unix_nanos=lambda: 1_700_000_000_000_000_000
            )
            stack.callback(backend.close)
            return backend

        yield open_at


def history(backend) -> list[Callable[[], object]]:
    """One act of every kind, each with an answer that shows whether it happened exactly once."""
    blobs = [b"chunk", b"manifest", b"weights", b"first", b"second", b"code", b"garbage"]
    for content in blobs:
        writer = backend.blobs.writer()
        writer.write(content)
        writer.commit()
    fence = pb.Fence(lease="leader", token=2)
    job = pb.RaiseTermRequest(job_id="job-1", fence=fence)
    dataset = dataset_pb.CreateDatasetRequest(
        name="d", manifest_digest=digest_of(b"manifest"), request_id="r-1"
    )
    linked = dataset_pb.CreateDatasetRequest(name="l", manifest_digest=digest_of(b"manifest"))
    links = [digest_of(b"%d" % number) for number in range(5)]
    return [
        lambda: backend.leases.acquire(acquire("leader", "one")).lease.token,
        lambda: backend.leases.acquire(acquire("leader", "one")).lease.token,
        lambda: (
            backend.leases.renew(pb.RenewLeaseRequest(name="leader", holder="one", token=2)).counter
        ),
        lambda: backend.journals.append(append("control", b"a", b"b", expected=0, fence=fence)),
        lambda: backend.journals.append(append("control", b"c", expected=2, fence=fence)),
        lambda: backend.journals.append(append("control", b"unnumbered")),
        lambda: backend.jobs.raise_term(job),
        lambda: backend.jobs.commit(part(b"first", step=1, index=0, ranges=2)).complete,
        lambda: backend.jobs.commit(part(b"second", step=1, index=1, ranges=2)).complete,
        lambda: (
            backend.catalog.create_dataset(
                dataset,
                dataset_pb.Dataset(manifest_digest=dataset.manifest_digest),
                [digest_of(b"chunk")],
            ).version
        ),
        lambda: (
            backend.catalog.create_dataset(
                linked,
                dataset_pb.Dataset(manifest_digest=linked.manifest_digest, linked=True),
                (),
                links,
            ).version
        ),
        lambda: (
            backend.catalog.create_model(
                model_pb.CreateModelRequest(model=model("m", weights=b"weights"), request_id="r-2")
            ).version
        ),
        lambda: backend.catalog.set_pins(
            pb.SetPinsRequest(holder="job-1", pins=[pb.Pin(blob=digest_of(b"code"))])
        ),
        lambda: backend.references.sweep([digest_of(b"garbage"), digest_of(b"code")], len),
        lambda: backend.catalog.delete_dataset(
            dataset_pb.DeleteDatasetRequest(name="l"), parse_name("", "l")
        ),
        lambda: backend.journals.truncate(
            pb.TruncateJournalRequest(stream="control", before_sequence=1, fence=fence)
        ),
    ]


def contents(server, name):
    """Return all rows, but for what no two runs have in common."""
    tables = {table.name for table in TABLES} - {ELAPSED.name, HOME.name, REQUESTS.name}
    return {
        table: sorted(server.execute(f"SELECT * FROM {table}", name), key=repr)
        for table in (*tables, "records", "versions")
    }


class Saboteur:
    """Ends the session of a back end at each statement and commit, once at every place."""

    def __init__(self, server, monkeypatch):
        self._server = server
        self._patch = monkeypatch
        self._places = set()
        self._transactions = Counter()
        self._statements = Counter()
        self._asleep = True
        self._breaks_statements = False
        for name in ("execute", "executemany"):
            run = getattr(PostgresConnection, name)
            monkeypatch.setattr(
                PostgresConnection,
                name,
                lambda connection, *args, run=run: self._count(connection, run, args),
            )
        commit = psycopg.Connection.commit

        def counted(raw):
            commit(raw)
            # But for those of a session that begins.
            if self._statements.pop(raw.info.backend_pid, 0):
                self._transactions[threading.get_ident()] += 1

        monkeypatch.setattr(psycopg.Connection, "commit", counted)

    @property
    def broken(self):
        return len(self._places)

    def wake(self):
        self._asleep = False

    def at_statements(self):
        self._breaks_statements = True

    def at_commits(self, *, happens):
        """Commits have no answer, whether they happen or not."""
        commit = psycopg.Connection.commit

        def broken(raw):
            # A reader's commit has nothing to lose.
            writes = threading.current_thread().name == "postgres-writer"
            begun = writes and self._statements[raw.info.backend_pid]
            is_first = begun and self._is_new("commit")
            if happens or not is_first:
                commit(raw)
            if is_first:
                self._end_session(raw)
                raise psycopg.OperationalError("the answer did not come")

        self._patch.setattr(psycopg.Connection, "commit", broken)

    def _count(self, connection, run, args):
        session = connection.raw.info.backend_pid
        if self._breaks_statements and self._is_new(self._statements[session]):
            self._end_session(connection.raw)
        else:
            self._statements[session] += 1
        return run(connection, *args)

    def _is_new(self, where):
        place = (threading.get_ident(), self._transactions[threading.get_ident()], where)
        if self._asleep or place in self._places:
            return False
        self._places.add(place)
        return True

    def _end_session(self, raw):
        self._server.execute(f"SELECT pg_terminate_backend({raw.info.backend_pid}, 10000)")


def run_history(server, opened, wake=lambda: None):
    """Return all answers, and what is stored then."""
    name = f"faults-{uuid4().hex}"
    backend = opened(server.create_database(name), folder=name)
    acts = history(backend)
    wake()
    answers = [act() for act in acts]
    stored = contents(server, name)
    backend.close()
    server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    return answers, stored


@pytest.mark.parametrize("where", ["statements", "commits that happen", "commits that do not"])
def test_a_session_that_ends_anywhere_changes_nothing(postgres_server, opened, monkeypatch, where):
    undisturbed = run_history(postgres_server, opened)
    for constant in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S"):
        monkeypatch.setattr(database_module, constant, 0.0)
    monkeypatch.setattr(database_module, "PATIENCE_S", GUARD_S)
    saboteur = Saboteur(postgres_server, monkeypatch)
    if where == "statements":
        saboteur.at_statements()
    else:
        saboteur.at_commits(happens=where.endswith("that happen"))
    assert run_history(postgres_server, opened, saboteur.wake) == undisturbed
    assert saboteur.broken > (100 if where == "statements" else 15)


def appended(backend, stream):
    return [
        record.payload
        for response in backend.journals.read(read(stream))
        for record in response.records
    ]


class Appenders:
    """Threads that append numbered records by compare-and-set, and remember what was answered."""

    def __init__(self, backends, count=4):
        self.acknowledged = []
        self.refused = 0
        self.stop = threading.Event()
        self._mutex = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(backends[number % len(backends)], number))
            for number in range(count)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self._threads:
            thread.join(GUARD_S)

    def _run(self, backend, number):
        expected, own = 0, 0
        while not self.stop.is_set():
            record = b"%d-%d" % (number, own)
            try:
                expected = backend.journals.append(append("s", record, expected=expected))
            except Aborted as error:
                expected = int(error.details["next_sequence"])
            except Unavailable:
                with self._mutex:
                    self.refused += 1
                own += 1  # it may have happened or not
            else:
                own += 1
                with self._mutex:
                    self.acknowledged.append((expected - 1, record))

    def wait_for(self, more):
        """Wait until so many more were acknowledged."""
        target = len(self.acknowledged) + more
        pause = threading.Event()
        for _ in range(GUARD_S * 100):
            if len(self.acknowledged) >= target:
                return
            pause.wait(0.01)
        raise AssertionError("nothing is acknowledged any more")

    def check(self, backend):
        """What was acknowledged is where it was said to be, and nothing is there twice."""
        records = appended(backend, "s")
        assert all(records[sequence] == record for sequence, record in self.acknowledged)
        assert len(set(records)) == len(records)
        assert len(records) <= len(self.acknowledged) + self.refused


def test_connections_are_reset_again_and_again(postgres_server, name, opened):
    with TcpProxy(postgres_server.address) as proxy:
        backend = opened(postgres_server.url(name, proxy.address))
        with Appenders([backend]) as appenders:
            for _ in range(20):
                appenders.wait_for(5)
                proxy.reset()
            appenders.wait_for(20)
        assert proxy.resets >= 20
        appenders.check(backend)
        # Without an answer to any request, each was still carried out exactly once.
        assert appenders.refused == 0


def test_a_network_that_swallows_everything_is_a_delay(postgres_server, name, opened):
    with TcpProxy(postgres_server.address) as proxy:
        backend = opened(postgres_server.url(name, proxy.address))
        with Appenders([backend]) as appenders:
            for direction in ("to_server", "to_client"):
                appenders.wait_for(5)
                proxy.disturb(**{direction: Link(black_hole=True)})
                proxy.reset()
                proxy.heal()
            appenders.wait_for(20)
        appenders.check(backend)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_server_that_starts_again_is_a_delay(postgres_server, name, opened, how):
    backend = opened(postgres_server.url(name))
    backend.leases.acquire(acquire("leader", "one"))
    with Appenders([backend]) as appenders:
        for _ in range(2):
            appenders.wait_for(20)
            getattr(postgres_server, how)()
            postgres_server.start()
            assert backend.leases.get("leader").holder == "one"
        appenders.wait_for(20)
    appenders.check(backend)
    assert appenders.refused == 0


def test_a_server_that_stays_away_is_told_and_comes_back(
    postgres_server, name, opened, monkeypatch
):
    monkeypatch.setattr(database_module, "PATIENCE_S", 0.2)
    with TcpProxy(postgres_server.address) as proxy:
        backend = opened(postgres_server.url(name, proxy.address))
        backend.journals.append(append("s", b"before"))
        proxy.refuse()
        proxy.reset()
        for call in (
            lambda: backend.journals.append(append("s", b"away")),
            lambda: appended(backend, "s"),
            lambda: backend.leases.get("leader"),
            backend.check,
        ):
            with pytest.raises(Unavailable) as caught:
                call()
            assert caught.value.reason == "DATABASE_UNREACHABLE"
        monkeypatch.setattr(database_module, "PATIENCE_S", GUARD_S)
        proxy.heal()
        backend.check()
        backend.journals.append(append("s", b"after"))
        assert appended(backend, "s") == [b"before", b"after"]


@pytest.mark.parametrize("where", ["between statements", "inside a statement"])
def test_a_writer_that_stands_still_holds_nobody_up_for_long(
    postgres_server, name, opened, monkeypatch, where
):
    """As a process does that was stopped in a transaction; its act is done after all, once."""
    for setting, long in (("_SESSION", "'5s'"), ("_WRITER_SESSION", "'10s'")):
        short = getattr(database_module, setting).replace(long, "'500ms'")
        monkeypatch.setattr(database_module, setting, short)
    slow, other = opened(postgres_server.url(name)), PostgresDatabase(postgres_server.url(name))
    inside, goes_on = threading.Event(), threading.Event()
    runs = []

    def stand_still():
        if len(runs) == 1:
            inside.set()
            assert goes_on.wait(GUARD_S)

    def rows():
        yield ("first", "one", 1, 1, 0)
        if where == "inside a statement":
            stand_still()
        yield ("second", "one", 1, 1, 0)

    def act(connection):
        runs.append(1)
        if where == "between statements":
            stand_still()
        connection.executemany("INSERT INTO leases VALUES (?, ?, ?, ?, ?)", rows())
        return len(runs)

    results = []
    writing = threading.Thread(target=lambda: results.append(slow.catalog._database.write(act)))
    writing.start()
    assert inside.wait(GUARD_S)
    other.write(lambda connection: connection.execute("DELETE FROM leases"))
    goes_on.set()
    writing.join(GUARD_S)
    other.close()
    assert len(runs) > 1, "the server never ended it"
    assert results == [len(runs)]
    assert postgres_server.execute("SELECT count(*) FROM leases", name) == [(2,)]


def test_acts_of_processes_run_one_after_another(postgres_server, name):
    """Reading and then writing is one step, without a lock on what is read."""
    databases = [PostgresDatabase(postgres_server.url(name)) for _ in range(3)]

    def act(connection):
        (term,) = connection.execute("SELECT coalesce(max(term), 0) FROM jobs").fetchone()
        connection.execute("INSERT INTO jobs VALUES (?, ?, 0)", (f"job-{term + 1}", term + 1))

    def count(database):
        for _ in range(30):
            database.write(act)

    threads = [threading.Thread(target=count, args=(each,)) for each in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    for database in databases:
        database.close()
    assert postgres_server.execute("SELECT count(*), max(term) FROM jobs", name) == [(90, 90)]


def test_a_database_of_a_newer_version_is_refused(postgres_server, name, opened):
    opened(postgres_server.url(name)).close()
    postgres_server.execute(f"UPDATE schema_version SET version = {len(MIGRATIONS) + 1}", name)
    with pytest.raises(FailedPrecondition) as caught:
        opened(postgres_server.url(name))
    assert caught.value.reason == "STATE_TOO_NEW"


def test_migrations_run_once_each_and_whole_or_not_at_all(postgres_server, name):
    steps = (
        "CREATE TABLE a (x BIGINT);",
        "ALTER TABLE a ADD y BIGINT; INSERT INTO a VALUES (1, 2);",
    )
    broken = (*steps, "INSERT INTO a VALUES (3, 4); INSERT INTO nowhere VALUES (1);")
    with psycopg.connect(postgres_server.url(name)) as raw:
        for known in (steps[:1], steps, steps):
            migrate(PostgresConnection(raw), known)
            raw.commit()
        with pytest.raises(psycopg.errors.UndefinedTable):
            migrate(PostgresConnection(raw), broken)
        raw.rollback()
        assert raw.execute("SELECT * FROM a").fetchall() == [(1, 2)]
        assert raw.execute("SELECT version FROM schema_version").fetchall() == [(2,)]


def test_of_several_processes_that_start_together_one_migrates(postgres_server, name):
    start = threading.Barrier(4)
    opened = []

    def open_database():
        start.wait()
        opened.append(PostgresDatabase(postgres_server.url(name)))

    threads = [threading.Thread(target=open_database) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert len(opened) == 4
    for database in opened:
        database.close()


def test_who_waited_for_another_to_migrate_sees_what_it_did(postgres_server, name):
    postgres_server.execute(
        f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'"
    )
    url = postgres_server.url(name)
    opened = []
    thread = threading.Thread(target=lambda: opened.append(PostgresDatabase(url)))
    waiting = (
        "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database "
        "WHERE datname = %s AND locktype = 'advisory' AND NOT granted"
    )
    with psycopg.connect(url) as raw, psycopg.connect(url, autocommit=True) as looking:
        migrate(PostgresConnection(raw))
        thread.start()
        while thread.is_alive() and looking.execute(waiting, (name,)).fetchone() == (0,):
            pass
        raw.commit()
    thread.join(GUARD_S)
    (database,) = opened
    database.close()


def test_durability_does_not_depend_on_the_defaults_of_the_database(postgres_server, name):
    postgres_server.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    postgres_server.execute(
        f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'"
    )
    database = PostgresDatabase(postgres_server.url(name))

    def settings(connection):
        return [
            connection.execute(f"SHOW {setting}").fetchone()[0]
            for setting in ("synchronous_commit", "transaction_isolation")
        ]

    assert database.write(settings) == ["on", "read committed"]
    assert database.read(settings)[1] == "repeatable read"
    database.close()


def test_an_act_that_reads_waits_for_no_reader(postgres_server, name, monkeypatch):
    """It has the lock, and all other processes would wait with it."""
    monkeypatch.setattr(database_module, "PATIENCE_S", 5.0)
    monkeypatch.setattr(database_module, "_READERS", 2)
    database = PostgresDatabase(postgres_server.url(name))
    began, end = threading.Barrier(3), threading.Event()

    def read_long(_):
        began.wait(GUARD_S)
        assert end.wait(GUARD_S)

    readers = [threading.Thread(target=database.read, args=(read_long,)) for _ in range(2)]
    for reader in readers:
        reader.start()
    began.wait(GUARD_S)

    def act(connection):
        connection.execute("INSERT INTO jobs VALUES ('job-1', 7, 0)")
        return database.read(
            lambda reading: reading.execute("SELECT term FROM jobs").fetchone(),
        )

    try:
        assert database.write(act) == (7,)
    finally:
        end.set()
        for reader in readers:
            reader.join(GUARD_S)
        database.close()


def test_readers_cannot_write(postgres_server, name, opened):
    database = opened(postgres_server.url(name)).catalog._database
    with pytest.raises(Internal, match="read-only"):
        database.read(lambda connection: connection.execute("DELETE FROM leases"))


def test_a_database_that_refuses_is_told_at_the_start(postgres_server, monkeypatch):
    monkeypatch.setattr(database_module, "PATIENCE_S", 0.1)
    with pytest.raises(FailedPrecondition, match="does not exist") as caught:
        PostgresDatabase(postgres_server.url("no-such-database"))
    assert caught.value.reason == "STATE_UNUSABLE"


def test_the_lock_is_held_by_the_transaction_alone(postgres_server, name):
    """A connection that goes back to a pool between transactions keeps nothing."""
    database = PostgresDatabase(postgres_server.url(name))
    database.write(lambda connection: None)
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    assert database.write(
        lambda connection: connection.execute(
            f"{held} AND (classid::bigint << 32) + objid::bigint = ?", (WRITE_LOCK,)
        ).fetchone()
    ) == (1,)
    assert postgres_server.execute(held, name) == [(0,)]
    database.close()
