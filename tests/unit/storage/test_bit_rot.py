"""Damage to the database file: no changed row is believed, and no hidden one is missed."""

import random
import sqlite3

import pytest

from bench.reliability.disk_scenario import ACTS, observe, open_state
from phalanx.errors import DataLoss, FailedPrecondition, PhalanxError
from phalanx.testing.storage_messages import acquire, append, part, read
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.rows import LEASES, TABLES
from storage.backends.sqlite import open_embedded_backend
from storage.backends.sqlite.database import FILE_NAME, Database
from storage.backends.sqlite.schema import MIGRATIONS, migrate
from storage.service.collection import collect_garbage

FLIPS = 100


@pytest.fixture
def state(tmp_path):
    """A state folder in which everything has happened, and what can be seen of it."""
    backend = open_state(tmp_path / "state")
    for _, act in ACTS:
        act(backend)
    seen = observe(backend)
    backend.close()
    return tmp_path / "state", seen


@pytest.fixture
def change(state):
    """Lets a test change rows behind the back of a closed back end."""

    def change_rows(statement):
        connection = sqlite3.connect(state[0] / FILE_NAME)
        connection.execute("PRAGMA foreign_keys = OFF")
        assert connection.execute(statement).rowcount >= 1
        connection.commit()
        connection.close()

    return change_rows


def places_in_use(path):
    """Offsets of bytes that say something and are not a journal's records, page by page."""
    content = path.read_bytes()
    connection = sqlite3.connect(path)
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    roots = connection.execute(
        "SELECT rootpage FROM sqlite_schema WHERE rootpage AND name != 'records'"
    ).fetchall()
    connection.close()
    found = []
    for (page,) in roots:
        start = (page - 1) * size
        cells = int.from_bytes(content[start + 3 : start + 5], "big")
        first = int.from_bytes(content[start + 5 : start + 7], "big")
        found.append([*range(start, start + 8 + 2 * cells), *range(start + first, start + size)])
    return found


def test_no_flipped_bit_is_believed(state):
    """Any flip is harmless, or the service refuses, or it tells of it."""
    folder, seen = state
    path = folder / FILE_NAME
    content, pages = path.read_bytes(), places_in_use(path)
    draw = random.Random(5)
    outcomes = {"harmless": 0, "told": 0, "refused": 0}
    for number in range(FLIPS):
        place = draw.choice(pages[number % len(pages)])
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        told = []
        try:
            backend = open_state(folder, on_corruption=told.append)
        except FailedPrecondition:
            outcomes["refused"] += 1
            continue
        try:
            found = observe(backend)
        except PhalanxError:
            outcomes["refused"] += 1
        else:
            outcomes["told" if told else "harmless"] += 1
            assert told or found == seen, f"byte {place} changed what is seen, and nothing told"
        backend.close()
    assert min(outcomes.values()) > FLIPS // 50, outcomes


def test_a_changed_token_fences_nobody_and_lets_nobody_in(state, change):
    change("UPDATE leases SET token = 1")
    backend = open_state(state[0])
    for use in (
        lambda: backend.leases.get("leader"),
        lambda: backend.leases.acquire(acquire("leader", "three")),
        lambda: backend.journals.append(
            append("control", b"late", fence=pb.Fence(lease="leader", token=1))
        ),
    ):
        with pytest.raises(DataLoss) as caught:
            use()
        assert caught.value.reason == "ROW_CORRUPT"
    backend.close()


@pytest.mark.parametrize(
    ("statement", "use"),
    [
        ("UPDATE leases SET name = 'leadez'", lambda b: b.leases.acquire(acquire("leader", "x"))),
        ("UPDATE jobs SET job_id = 'job-3'", lambda b: b.jobs.get_row("job-1")),
        ("UPDATE streams SET name = 'controm'", lambda b: list(b.journals.read(read("control")))),
    ],
)
def test_what_lost_its_name_is_not_taken_for_new(state, change, statement, use):
    change(statement)
    told = []
    backend = open_state(state[0], on_corruption=told.append)
    assert told
    with pytest.raises(DataLoss):
        use(backend)
    backend.close()


def test_an_index_that_hides_a_stream_is_made_anew(state):
    path = state[0] / FILE_NAME
    connection = sqlite3.connect(path)
    (page,) = connection.execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_autoindex_streams_1'"
    ).fetchone()
    connection.close()
    content = bytearray(path.read_bytes())
    place = content.index(b"control", (page - 1) * 4096)
    assert place < page * 4096
    content[place] ^= 1
    path.write_bytes(content)
    told = []
    backend = open_state(state[0], on_corruption=told.append)
    assert len(told) == 1
    assert "made anew" in told[0]
    assert observe(backend) == state[1]
    backend.close()


def test_garbage_collection_stands_still_when_a_reference_is_damaged(state, change):
    change("UPDATE blob_references SET digest = replace(digest, 'a', 'b')")
    backend = open_state(state[0])
    with pytest.raises(DataLoss):
        collect_garbage(backend, 0.0, dry_run=False)
    backend.close()
    assert len(list((state[0] / "blobs").glob("*/*"))) >= 8


def test_success_is_not_forgotten_with_the_mark_of_the_final_checkpoint(state, change):
    change("UPDATE checkpoints SET final = 0 WHERE final = 1")
    backend = open_state(state[0])
    with pytest.raises(DataLoss) as caught:
        backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1", expected_term=2))
    assert caught.value.reason == "MANIFEST_CORRUPT"
    backend.close()


def test_a_whole_checkpoint_that_says_it_is_not_is_neither_served_nor_dropped(tmp_path):
    backend = open_embedded_backend(tmp_path)
    writer = backend.blobs.writer()
    writer.write(b"parameters")
    writer.commit()
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1"))
    backend.jobs.commit(part(b"parameters", step=1))
    backend.jobs.commit(part(b"parameters", step=2))
    backend.close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("UPDATE checkpoints SET whole = 0 WHERE step = 2")
    connection.commit()
    told = []
    backend = open_embedded_backend(tmp_path, on_corruption=told.append)
    assert [m.step for m in backend.jobs.list_checkpoints("job-1")] == [1]
    assert len(told) == 2, "at the start, and when it was passed over"
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1", expected_term=1))
    backend.close()
    assert connection.execute("SELECT count(*) FROM checkpoints").fetchone() == (2,)
    connection.close()


def test_rows_of_the_first_schema_get_their_checksums(tmp_path):
    connection = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    migrate(connection, MIGRATIONS[:1])
    connection.execute("INSERT INTO leases VALUES ('leader', 'one', 3, 4)")
    connection.execute("INSERT INTO streams VALUES (1, 'control', 0, 7)")
    connection.execute("INSERT INTO jobs VALUES ('job-1', 2)")
    connection.execute("INSERT INTO checkpoints VALUES (1, 'job-1', 2, 10, 0, 0, x'00')")
    connection.execute("INSERT INTO blob_references VALUES ('ab', 'pin', 'job-1', 0)")
    connection.execute("INSERT INTO pins VALUES ('job-1', 'model', 'default', 'm', 1)")
    connection.execute("INSERT INTO names VALUES ('model', 'default', 'm', 2)")
    connection.execute("INSERT INTO requests VALUES ('k', 'r', 'ff', x'01', 1.5)")
    connection.close()
    told = []
    database = Database(tmp_path, print, told.append)
    assert told == []
    assert database.read(lambda c: LEASES.find(c, "leader")) == ("leader", "one", 3, 4)
    counts = {
        t.name: database.read(lambda c, t=t: c.execute(f"SELECT count(*) FROM {t.name}").fetchone())
        for t in TABLES
    }
    later = dict.fromkeys(("elapsed", "home", "objects", "term_owners"), (0,))
    assert counts == {t.name: (1,) for t in TABLES} | later
    database.close()
