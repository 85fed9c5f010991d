"""How long storage waits for PostgreSQL, on a clock that the tests move."""

from uuid import uuid4

import pytest

from phalanx.errors import Unavailable
from storage.backends.postgres import database as database_module
from storage.backends.postgres.database import PATIENCE_S, PostgresDatabase


@pytest.fixture
def name(postgres_server):
    """An empty database."""
    name = f"patience-{uuid4().hex}"
    postgres_server.create_database(name)
    yield name
    postgres_server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(database_module, "time", clock)
    return clock


class Clock:
    """A clock that stands still but when it is moved."""

    def __init__(self):
        self.now_s = 0.0

    def monotonic(self):
        return self.now_s


@pytest.mark.parametrize("stands_s", [[3 * PATIENCE_S], [0.9 * PATIENCE_S] * 2])
def test_a_writer_that_stood_still_for_long_tries_again(postgres_server, name, clock, stands_s):
    """Its time went by without its knowing: nobody can say that the database is away."""
    database = PostgresDatabase(postgres_server.url(name))
    runs = []

    def act(connection):
        runs.append(1)
        if len(runs) <= len(stands_s):
            clock.now_s += stands_s[len(runs) - 1]
            session = connection.raw.info.backend_pid
            postgres_server.execute(f"SELECT pg_terminate_backend({session}, 10000)")
        connection.execute("INSERT INTO jobs VALUES ('job-1', 7, 0)")

    database.write(act)
    database.close()
    assert len(runs) == len(stands_s) + 1
    assert postgres_server.execute("SELECT term FROM jobs", name) == [(7,)]


def test_a_statement_that_takes_too_long_is_not_tried_for_ever(postgres_server, name, clock):
    database = PostgresDatabase(postgres_server.url(name))
    runs = []

    def act(connection):
        runs.append(1)
        clock.now_s += 3 * PATIENCE_S
        connection.execute("SET LOCAL statement_timeout = '1ms'")
        connection.execute("SELECT pg_sleep(60)")

    with pytest.raises(Unavailable, match="statement timeout"):
        database.write(act)
    database.close()
    assert len(runs) == 1
