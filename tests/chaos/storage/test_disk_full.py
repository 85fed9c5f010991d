"""A disk that is really full: refused with a reason, nothing lost, and over when there is space."""

import random

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import ResourceExhausted
from phalanx.testing.storage_messages import digest_of, part

MIB = 1024 * 1024

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("embedded_only")]


def fill(disk, left_bytes=0):
    """Take all of the disk but ``left_bytes`` with a file that a test can remove."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        chunk = bytes(65536)
        try:
            while True:
                file.write(chunk)
        except OSError:
            pass
        file.truncate(max(0, file.tell() - left_bytes))
    return ballast


def test_blobs_are_refused_and_the_last_checkpoint_stays_readable(small_storage):
    with SyncStorageClient(small_storage.address) as client:
        run, calls = client._run, client._client
        run(calls.raise_term("job-1", 0))
        parameters = random.Random(0).randbytes(2 * MIB)
        client.put_blob(parameters)
        run(calls.commit_checkpoint(part(parameters)))
        stored = []
        with pytest.raises(ResourceExhausted) as caught:
            while len(stored) < 100:
                stored += [client.put_blob(random.Random(len(stored) + 1).randbytes(2 * MIB))]
        assert caught.value.reason == "DISK_FULL"
        assert len(stored) > 3
        assert list((small_storage.state / "uploads").iterdir()) == []

        # The reserve lets facts be journalled while blobs are refused.
        client.append_journal("control", [b"fact"] * 100)
        [manifest] = client.list_checkpoints("job-1")
        assert client.get_blob(manifest.parts[0].digest) == parameters
        for digest in stored:
            assert digest_of(client.get_blob(digest)) == digest

        # The service recovers by itself once there is space.
        assert client.collect_garbage(grace_s=0).blobs_removed == len(stored)
        client.put_blob(random.Random(999).randbytes(2 * MIB))
        assert client.get_blob(manifest.parts[0].digest) == parameters
    assert small_storage.running()


def test_journals_on_a_disk_without_a_byte_left(small_storage, small_disk):
    with SyncStorageClient(small_storage.address) as client:
        acknowledged = 0
        for number in range(20):
            client.append_journal("control", [b"%d" % number], expected_sequence=number)
            acknowledged += 1
        ballast = fill(small_disk)
        refused = 0
        for _ in range(200):
            try:
                record = [random.Random(acknowledged).randbytes(60_000)]
                client.append_journal("control", record, expected_sequence=acknowledged)
                acknowledged += 1
            except ResourceExhausted as error:
                refused += error.reason == "DISK_FULL"
                if refused == 3:
                    break
        assert refused == 3, "the disk never was full"
        found = client.read_journal("control")
        assert [record.sequence for record in found] == list(range(acknowledged))

        ballast.unlink()
        client.append_journal("control", [b"there is space"], expected_sequence=acknowledged)
        found = client.read_journal("control", acknowledged)
        assert [record.payload for record in found] == [b"there is space"]
    assert small_storage.running()


def test_a_disk_that_is_full_when_the_log_is_to_be_copied(small_storage, small_disk):
    """There is room for SQLite's log and none for the database file that it is copied into."""
    log = small_storage.state / "metadata.sqlite3-wal"
    with SyncStorageClient(small_storage.address) as client:
        client.append_journal("control", [b"before"])
        database_bytes = (small_storage.state / "metadata.sqlite3").stat().st_size
        ballast = fill(small_disk, left_bytes=6 * MIB)
        records = [b"before"]
        refused = 0
        while refused < 3:
            record = random.Random(len(records)).randbytes(60_000)
            try:
                client.append_journal("control", [record], expected_sequence=len(records))
                records.append(record)
            except ResourceExhausted as error:
                refused += error.reason == "DISK_FULL"
        assert log.stat().st_size > 1000 * 4096, "the log was not long enough to be copied"
        grown = (small_storage.state / "metadata.sqlite3").stat().st_size - database_bytes
        assert grown < sum(map(len, records)), "it was copied whole, the disk was not full then"
        assert [record.payload for record in client.read_journal("control")] == records

        ballast.unlink()
        records.append(b"there is space")
        client.append_journal("control", records[-1:], expected_sequence=len(records) - 1)
        assert [record.payload for record in client.read_journal("control")] == records
    assert small_storage.running()
    small_storage.kill()
    small_storage.start()
    with SyncStorageClient(small_storage.address) as client:
        assert [record.payload for record in client.read_journal("control")] == records


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_it_starts_on_a_full_disk_and_serves_what_it_has(small_storage, small_disk, end):
    with SyncStorageClient(small_storage.address) as client:
        digest = client.put_blob(b"content")
        client.append_journal("control", [b"a", b"b"])
    getattr(small_storage, end)()
    ballast = fill(small_disk)
    small_storage.start()
    with SyncStorageClient(small_storage.address) as client:
        assert client.get_blob(digest) == b"content"
        assert [record.payload for record in client.read_journal("control")] == [b"a", b"b"]
        with pytest.raises(ResourceExhausted):
            client.put_blob(b"more")
        ballast.unlink()
        client.put_blob(b"more")
        assert client.append_journal("control", [b"c"], expected_sequence=2) == 3


@pytest.mark.parametrize("left_kib", range(0, 260, 20))
def test_a_checkpoint_at_every_stage_of_a_filling_disk(small_storage, small_disk, left_kib):
    """Wherever the space ends, the checkpoint before stays and the new one is whole or absent."""
    with SyncStorageClient(small_storage.address) as client:
        run, calls = client._run, client._client
        run(calls.raise_term("job-1", 0))
        before = random.Random(1).randbytes(100_000)
        client.put_blob(before)
        run(calls.commit_checkpoint(part(before, step=1)))
        ballast = fill(small_disk, left_kib * 1024)
        after = random.Random(2).randbytes(100_000)
        committed = True
        try:
            client.put_blob(after)
            run(calls.commit_checkpoint(part(after, step=2)))
        except ResourceExhausted as error:
            committed = error.reason != "DISK_FULL"
        steps = [manifest.step for manifest in client.list_checkpoints("job-1")]
        assert steps == ([2, 1] if committed else [1])
        assert client.get_blob(digest_of(before)) == before
        ballast.unlink()
        client.put_blob(after)
        assert run(calls.commit_checkpoint(part(after, step=2))).complete
        assert client.get_blob(digest_of(after)) == after
