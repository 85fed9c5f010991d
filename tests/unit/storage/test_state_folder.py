"""One storage process per state folder, and folders that cannot be used."""

import os
import sqlite3

import pytest

from phalanx.errors import DataLoss, FailedPrecondition
from phalanx.testing.storage_messages import append, part, read
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.files import StateFolder
from storage.backends.sqlite import open_embedded_backend


def test_a_second_process_is_told_who_has_it(tmp_path):
    first = StateFolder(tmp_path / "state")
    with pytest.raises(FailedPrecondition) as caught:
        StateFolder(tmp_path / "state")
    assert caught.value.reason == "STATE_IN_USE"
    assert f"pid {os.getpid()}" in caught.value.message
    first.close()
    StateFolder(tmp_path / "state").close()


def test_a_failed_start_lets_the_folder_go(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (state / "metadata.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(FailedPrecondition) as caught:
        open_embedded_backend(state)
    assert caught.value.reason == "STATE_UNUSABLE"
    (state / "metadata.sqlite3").unlink()
    open_embedded_backend(state).close()


def test_a_file_is_no_state_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FailedPrecondition) as caught:
        open_embedded_backend(tmp_path / "file")
    assert caught.value.reason == "STATE_UNUSABLE"


def test_only_the_owner_may_read_the_state(tmp_path):
    open_embedded_backend(tmp_path / "state").close()
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
    assert (tmp_path / "state" / "blobs").stat().st_mode & 0o077 == 0


def test_no_descriptor_leaks(tmp_path):
    open_embedded_backend(tmp_path / "state").close()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        backend = open_embedded_backend(tmp_path / "state")
        writer = backend.blobs.writer()
        writer.write(b"x")
        writer.commit()
        list(backend.blobs.scan())
        list(backend.journals.read(read("control")))
        backend.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_closing_twice_closes_nothing_of_others(tmp_path):
    backend = open_embedded_backend(tmp_path / "state")
    backend.close()
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(16)]
    backend.close()
    for descriptor in others:
        os.close(descriptor)


@pytest.fixture
def damaged(tmp_path):
    """Lets a test change rows behind the back of a closed back end."""

    def damage(*statements):
        connection = sqlite3.connect(tmp_path / "state" / "metadata.sqlite3")
        for statement in statements:
            assert connection.execute(statement).rowcount == 1, statement
        connection.commit()
        connection.close()

    return damage


def test_damaged_records_are_found(tmp_path, damaged):
    backend = open_embedded_backend(tmp_path / "state")
    backend.journals.append(append("control", *[b"record %d" % i for i in range(5)]))
    backend.close()
    for statement, reason in [
        ("UPDATE records SET payload = x'00' WHERE sequence = 3", "JOURNAL_CORRUPT"),
        ("DELETE FROM records WHERE sequence = 3", "JOURNAL_GAP"),
        ("UPDATE records SET sequence = 3 WHERE sequence = 2", "JOURNAL_GAP"),
        ("UPDATE records SET sequence = 2 WHERE sequence = 3", "JOURNAL_CORRUPT"),
        ("UPDATE streams SET next_sequence = 6", "ROW_CORRUPT"),
    ]:
        damaged(statement)
        backend = open_embedded_backend(tmp_path / "state")
        with pytest.raises(DataLoss) as caught:
            list(backend.journals.read(read("control")))
        backend.close()
        assert caught.value.reason in (reason, "JOURNAL_GAP"), statement


def test_a_damaged_manifest_is_skipped_and_told(tmp_path, damaged):
    told = []
    backend = open_embedded_backend(tmp_path / "state")
    writer = backend.blobs.writer()
    writer.write(b"parameters")
    writer.commit()
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1"))
    for step in (1, 2, 3):
        backend.jobs.commit(part(b"parameters", step=step))
    backend.close()
    damaged("UPDATE checkpoints SET manifest = substr(manifest, 1, 40) WHERE step = 3")
    damaged("UPDATE checkpoints SET step = 7 WHERE step = 2")
    backend = open_embedded_backend(tmp_path / "state", on_corruption=told.append)
    assert [m.step for m in backend.jobs.list_checkpoints("job-1")] == [1]
    assert len(told) == 3, "at the start, and of each that was passed over"
    backend.close()


def test_a_damaged_final_manifest_is_data_loss_and_no_success_is_forgotten(tmp_path, damaged):
    backend = open_embedded_backend(tmp_path / "state")
    writer = backend.blobs.writer()
    writer.write(b"parameters")
    writer.commit()
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1"))
    backend.jobs.commit(part(b"parameters", final=True))
    backend.close()
    damaged("UPDATE checkpoints SET manifest = x'00'")
    backend = open_embedded_backend(tmp_path / "state")
    for use in (
        lambda: backend.jobs.get_row("job-1"),
        lambda: backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1", expected_term=1)),
    ):
        with pytest.raises(DataLoss) as caught:
            use()
        assert caught.value.reason == "MANIFEST_CORRUPT"
    backend.close()
