"""Backups of a service that runs: what it does meanwhile, and what comes of failures on the way."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.backups.checking import check
from phalanx.backups.folder import BackupFolder
from phalanx.backups.saving import save
from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from phalanx.sdk.methods import COLLECT_GARBAGE, READ_SNAPSHOT, SCRUB, SET_PINS
from phalanx.sdk.transport import Transport
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.opening import Places, open_backend
from storage.core.leases import LeaseRow
from storage.core.snapshots import HOLD_TTL_S, HoldWatch
from storage.restore import main as restore_main
from storage.runtime import StorageProcess as Service

BLOBS = 12


class Remote:
    """What `save` needs of a cluster, of storage alone."""

    def __init__(self, address: str) -> None:
        self.transport = Transport([address])
        self.blobs = SyncStorageClient(address)

    def stream(self, method, request, *, timeout_s=60.0):
        return self.transport.stream(method, request, timeout_s=timeout_s)

    def get_blob_to(self, digest: str, path: Path) -> None:
        self.blobs.get_blob_to(digest, path)

    def close(self) -> None:
        self.transport.close()
        self.blobs.close()


@pytest.fixture
async def remote(service: Service):
    remote = Remote(service.server.address)
    yield remote
    await asyncio.to_thread(remote.close)


@pytest.fixture
def folder(tmp_path: Path):
    folder = BackupFolder(tmp_path / "backups", create=True)
    with folder.locked(alone=True):
        yield folder


@pytest.fixture
async def digests(client) -> list[str]:
    """Blobs that a holder pins."""
    found = [await client.put_blob(b"blob %d" % number * 100) for number in range(BLOBS)]
    await client.set_pins("job-1", [pb.Pin(blob=digest) for digest in found])
    return found


def gc(remote: Remote) -> pb.CollectGarbageResponse:
    return remote.transport.call(COLLECT_GARBAGE, pb.CollectGarbageRequest(grace_s=0))


async def test_nothing_that_a_snapshot_names_goes_while_it_is_read(client, remote, folder, digests):
    released = []

    class Releasing(Remote):
        """Lets go of all blobs once the rows are there, and collects garbage."""

        def get_blob_to(self, digest: str, path: Path) -> None:
            if not released:
                self.transport.call(SET_PINS, pb.SetPinsRequest(holder="job-1"))
                with pytest.raises(FailedPrecondition) as caught:
                    gc(self)
                released.append(caught.value.reason)
            super().get_blob_to(digest, path)

    releasing = Releasing(remote.blobs.address)
    saved = await asyncio.to_thread(save, releasing, folder)
    assert released == ["BACKUP_RUNNING"]
    assert not saved.snapshot.damage
    assert saved.snapshot.blobs == BLOBS
    assert await asyncio.to_thread(check, folder, saved.snapshot) == []

    def collected() -> int:
        try:
            return gc(remote).blobs_removed
        except FailedPrecondition:  # it has not been let go of yet
            return 0

    async with asyncio.timeout(30):
        while not (removed := await asyncio.to_thread(collected)):
            await asyncio.sleep(0.01)
    assert removed == BLOBS
    await asyncio.to_thread(releasing.close)


async def test_one_that_is_broken_off_leaves_the_former_and_is_ended_by_the_next(
    client, remote, folder, digests
):
    first = await asyncio.to_thread(save, remote, folder)
    more = [await client.put_blob(b"more %d" % number) for number in range(BLOBS)]
    await client.set_pins("job-2", [pb.Pin(blob=digest) for digest in more])
    fetched = []

    class Full(Remote):
        def get_blob_to(self, digest: str, path: Path) -> None:
            if len(fetched) == 5:
                raise ResourceExhausted("no space left on the device", reason="FILE_UNWRITABLE")
            super().get_blob_to(digest, path)
            fetched.append(digest)

    full = Full(remote.blobs.address)
    with pytest.raises(ResourceExhausted):
        await asyncio.to_thread(save, full, folder)
    await asyncio.to_thread(full.close)
    assert folder.names() == [first.snapshot.name]
    assert check(folder, folder.load()) == []
    # As one leaves it that is killed before its manifest is there.
    snapshots = folder.path / "snapshots"
    left = [snapshots / "20990101-a.rows", snapshots / ".20990101-a.json.partial"]
    for path in left:
        path.write_bytes(b"half")
    second = await asyncio.to_thread(save, remote, folder)
    assert second.new_blobs == BLOBS - 5
    assert second.snapshot.blobs == 2 * BLOBS
    folder._tidy()
    assert not any(path.exists() for path in left)
    assert [check(folder, folder.load(name)) for name in folder.names()] == [[], []]


async def test_a_connection_that_breaks_is_no_damage(client, remote, folder, digests):
    attempts = []

    class Breaking(Remote):
        def get_blob_to(self, digest: str, path: Path) -> None:
            attempts.append(digest)
            if len(attempts) == 3:
                raise Unavailable("gone")
            super().get_blob_to(digest, path)

    breaking = Breaking(remote.blobs.address)
    saved = await asyncio.to_thread(save, breaking, folder)
    await asyncio.to_thread(breaking.close)
    assert not saved.snapshot.damage
    assert saved.snapshot.blobs == BLOBS
    assert len(attempts) == BLOBS + 1


async def test_what_is_missing_is_damage_only_while_storage_held_on(
    client, remote, folder, digests, tmp_path
):
    lost = sorted(digests)[4]
    (tmp_path / "state" / "blobs" / lost[:2] / lost).unlink()
    saved = await asyncio.to_thread(save, remote, folder)
    assert [damage.digest for damage in saved.snapshot.damage] == [lost]
    assert saved.snapshot.blobs == BLOBS - 1
    assert check(folder, saved.snapshot) == []


async def test_pruning_keeps_what_the_rest_names(client, remote, folder, digests):
    first = await asyncio.to_thread(save, remote, folder)
    only = await client.put_blob(b"only in the second")
    await client.set_pins("job-1", [pb.Pin(blob=only), pb.Pin(blob=digests[0])])
    second = await asyncio.to_thread(save, remote, folder)
    folder.remove(first.snapshot.name)
    assert folder.sweep()[0] == BLOBS - 1
    assert folder.names() == [second.snapshot.name]
    assert check(folder, second.snapshot) == []


async def test_two_at_a_time_are_refused(remote, folder, monkeypatch):
    monkeypatch.setattr("storage.service.holds._PATIENCE_S", 0.0)

    def two() -> str:
        first = remote.transport.stream(READ_SNAPSHOT, pb.ReadSnapshotRequest())
        assert any(message.complete for message in iter(lambda: next(first), None))
        second = remote.transport.stream(READ_SNAPSHOT, pb.ReadSnapshotRequest())
        try:
            with pytest.raises(FailedPrecondition) as caught:
                next(second)
        finally:
            first.close()
        return caught.value.reason

    assert await asyncio.to_thread(two) == "BACKUP_RUNNING"
    with (
        pytest.raises(FailedPrecondition, match="another process uses"),
        BackupFolder(folder.path).locked(alone=True),
    ):
        pytest.fail("two had the folder")


def test_a_hold_is_taken_away_once_nobody_renews_it():
    watch = HoldWatch()
    row = LeaseRow("backup", 3, 7)
    assert watch.challenge(row, 100.0) == (0, 0)
    assert watch.challenge(row, 100.0 + HOLD_TTL_S - 1) == (0, 0)
    assert watch.challenge(LeaseRow("backup", 3, 8), 100.0 + HOLD_TTL_S) == (0, 0)
    assert watch.challenge(LeaseRow("backup", 3, 8), 100.0 + 2 * HOLD_TTL_S) == (3, 8)
    assert watch.challenge(None, 1000.0) == (0, 0)


async def test_a_scrub_finds_rot_and_says_whose_it_is(client, remote, digests, tmp_path, service):
    rotten = digests[3]
    path = tmp_path / "state" / "blobs" / rotten[:2] / rotten
    content = bytearray(path.read_bytes())
    content[10] ^= 4
    path.write_bytes(content)
    found = await asyncio.to_thread(lambda: list(remote.transport.stream(SCRUB, pb.ScrubRequest())))
    assert found[-1].blobs_read == BLOBS
    assert found[-1].rows_read >= BLOBS
    (corruption,) = [each for message in found for each in message.corruptions]
    assert corruption.digest == rotten
    assert list(corruption.named_by) == ["pin of job-1"]


async def test_scrubbing_in_the_background_goes_on_where_it_was(
    client, digests, service, tmp_path, monkeypatch
):
    rotten = digests[3]
    path = tmp_path / "state" / "blobs" / rotten[:2] / rotten
    path.write_bytes(b"rot")
    scrubber = service.scrubber
    folders = []
    listed = service.backend.blobs.scan
    monkeypatch.setattr(
        type(service.backend.blobs),
        "scan",
        lambda _, prefix="": (folders.append(prefix), listed(prefix))[1],
    )
    for _ in range(300):
        await scrubber._go_on()
    assert folders[:256] == [f"{number:02x}" for number in range(256)]
    assert folders[256:] == folders[:44]
    gauge = scrubber._metrics.storage_scrub_corrupt_records
    assert gauge.collect()[0].samples[0].value == 1
    assert scrubber._position()[1] == 44


def test_folders_that_cannot_be_told_are_refused(tmp_path, capsys):
    with pytest.raises(NotFound):
        BackupFolder(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FailedPrecondition) as caught:
        BackupFolder(tmp_path / "other", create=True)
    assert caught.value.reason == "BACKUP_ELSEWHERE"
    newer = BackupFolder(tmp_path / "newer", create=True)
    (newer.path / "format").write_text('{"format": 2}')
    assert restore_main([str(newer.path), "--state", str(tmp_path / "state")]) == 6
    assert "newer Phalanx (format 2" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_place_that_is_restored_by_half_serves_nobody(tmp_path):
    backend = open_backend(Places(tmp_path / "target"))
    backend.snapshots.begin_restore()
    backend.close()
    command = [sys.executable, "-P", "-m", "storage", "--state", str(tmp_path / "target")]
    command += ["--listen", "127.0.0.1:0"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "run `phalanx restore` again" in ended.stderr
