"""Snapshots: all that a back end has, told and restored into every other kind."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from phalanx.backups.folder import BackupFolder
from phalanx.backups.saving import save
from phalanx.errors import Aborted, DataLoss, FailedPrecondition, NotFound
from phalanx.testing.snapshots import StoreBackend
from phalanx.testing.storage_messages import acquire, append, part, read
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.opening import Places, open_backend
from storage.core.catalog import Page, VersionName
from storage.core.snapshots import HOLD_LEASE
from storage.interfaces import Backend
from storage.restoring import restore


def fill(harness, put, add):
    """Something of every kind; returns the digest of a checkpoint's part."""
    backend = harness.backend
    add("adult", b"chunk", request_id="first")
    lease = backend.leases.acquire(acquire("control", "control-1")).lease
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1", expected_term=0))
    digest = put(b"part")
    backend.jobs.commit(part(b"part"))
    named = put(b"named by a record")
    fence = pb.Fence(lease="control", token=lease.token)
    backend.journals.append(append("control", b"one", named.encode(), b"0" * 64, fence=fence))
    backend.journals.append(append("control", bytes(range(256)) * 40))
    backend.journals.truncate(pb.TruncateJournalRequest(stream="control", before_sequence=1))
    backend.catalog.set_pins(
        pb.SetPinsRequest(
            holder="job-1",
            pins=[
                pb.Pin(blob=digest),
                pb.Pin(dataset=pb.PinnedVersion(namespace="default", name="adult", version=1)),
            ],
        )
    )
    return digest


def seen(backend: Backend) -> dict[str, object]:
    """What callers see of it."""
    (manifest,) = backend.jobs.list_checkpoints("job-1")
    records = [r for answer in backend.journals.read(read("control")) for r in answer.records]
    return {
        "records": [(record.sequence, record.payload) for record in records],
        "manifest": manifest.SerializeToString(deterministic=True),
        "datasets": [
            found.SerializeToString(deterministic=True)
            for found in backend.catalog.list_datasets(Page("default", 10, None))[0]
        ],
        "pins": backend.catalog.pin_holders("", 10),
        "blobs": sorted(blob.digest for blob in backend.blobs.scan()),
    }


@pytest.fixture
def target(harness, tmp_path: Path, request) -> Iterator[Places]:
    """An empty place of another kind."""
    if harness.backend.name == "embedded":
        objects = request.getfixturevalue("object_server")
        yield Places(tmp_path / "target", "", f"{objects.create_bucket(tmp_path.name)}/here")
    elif harness.backend.name == "sqlite+s3":
        postgres = request.getfixturevalue("postgres_server")
        name = f"target-{uuid4().hex}"
        yield Places(tmp_path / "target", postgres.create_database(name))
        postgres.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    else:
        yield Places(tmp_path / "target")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[BackupFolder]:
    folder = BackupFolder(tmp_path / "backups", create=True)
    with folder.locked(alone=True):
        yield folder


def test_what_was_saved_is_restored_into_another_kind(harness, put, add, folder, target):
    fill(harness, put, add)
    before = seen(harness.backend)
    saved = save(StoreBackend(harness.backend), folder)
    assert not saved.snapshot.damage
    restore(folder, saved.snapshot, lambda: open_backend(target))
    backend = open_backend(target)
    try:
        assert seen(backend) == before
        assert not backend.snapshots.damaged_rows(lambda _: None)
        with pytest.raises(FailedPrecondition, match="already") as caught:
            restore(folder, saved.snapshot, lambda: backend)
        assert caught.value.reason == "NOT_EMPTY"
    finally:
        backend.close()


def test_whoever_led_before_cannot_write_where_it_was_restored(harness, put, add, folder, target):
    fill(harness, put, add)
    old = harness.backend.leases.get("control")
    saved = save(StoreBackend(harness.backend), folder)
    restore(folder, saved.snapshot, lambda: open_backend(target))
    backend = open_backend(target)
    try:
        row = backend.leases.get("control")
        assert row.holder == ""
        assert row.token > old.token + 2**29
        # Also one that took over after the snapshot.
        for token in range(old.token, old.token + 100):
            fence = pb.Fence(lease="control", token=token)
            with pytest.raises(Aborted, match="not current"):
                backend.journals.append(append("control", b"late", fence=fence))
        with pytest.raises(Aborted) as caught:
            backend.jobs.commit(part(b"part", step=11))
        assert caught.value.reason == "STALE_TERM"
        assert backend.leases.acquire(acquire("control", "control-9")).acquired
    finally:
        backend.close()


def test_every_restored_place_has_a_history_and_first_terms_of_its_own(
    harness, put, add, folder, target, tmp_path
):
    """A job that the snapshot knows without a term may have had any number of them since."""
    fill(harness, put, add)
    first = {each: pb.RaiseTermRequest(job_id=each) for each in ("queued-0", "queued-1")}
    lease = harness.backend.leases.acquire(acquire("leader", "control-1"))
    assert (lease.HasField("history"), lease.history) == (True, 0)
    assert not harness.backend.leases.acquire(acquire("leader", "other")).HasField("history")
    saved = save(StoreBackend(harness.backend), folder)
    assert [harness.backend.jobs.raise_term(each) for each in first.values()] == [1, 1]
    histories = []
    for places in (target, Places(tmp_path / "another")):
        restore(folder, saved.snapshot, lambda places=places: open_backend(places))
        backend = open_backend(places)
        try:
            histories.append(backend.leases.acquire(acquire("leader", "control-2")).history)
            term = backend.jobs.raise_term(first.popitem()[1])
            assert term == histories[-1] + 1 > 2**29
            saved = save(StoreBackend(backend), folder)
        finally:
            backend.close()
    # The second is a restored copy of what was restored before.
    assert histories[1] > histories[0] + 2**29


def test_a_later_backup_writes_only_what_is_new(harness, put, add, folder):
    fill(harness, put, add)
    first = save(StoreBackend(harness.backend), folder)
    add("wine", b"another chunk")
    second = save(StoreBackend(harness.backend), folder)
    assert first.new_blobs == first.snapshot.blobs
    assert second.new_blobs == 2
    assert second.snapshot.blobs == first.snapshot.blobs + 2
    assert folder.names() == sorted([first.snapshot.name, second.snapshot.name])


def test_a_damaged_blob_is_told_and_the_rest_is_saved(harness, put, add, folder, target):
    digest = fill(harness, put, add)
    harness.flip_bit(digest, 3)
    saved = save(StoreBackend(harness.backend), folder)
    assert [damage.digest for damage in saved.snapshot.damage] == [digest]
    assert "job-1" in " ".join(harness.backend.references.named_by(digest))
    with pytest.raises(FailedPrecondition) as caught:
        restore(folder, saved.snapshot, lambda: open_backend(target))
    assert caught.value.reason == "SOURCE_DAMAGED"
    restore(folder, saved.snapshot, lambda: open_backend(target), with_damage=True)
    backend = open_backend(target)
    try:
        assert backend.catalog.get_dataset(VersionName("default", "adult", 1)).version == 1
        with pytest.raises(NotFound):
            backend.blobs.open(digest)
    finally:
        backend.close()


def test_damaged_rows_are_told(harness, put, add, folder):
    fill(harness, put, add)
    changed = {"jobs": "term", "records": "sequence", "versions": "version", "leases": "token"}
    for table, column in changed.items():
        statement = f"UPDATE {table} SET {column} = {column} + 64"
        harness.database.write(lambda connection, act=statement: connection.execute(act).rowcount)
    counted = []
    found = harness.backend.snapshots.damaged_rows(counted.append)
    assert {table for table in changed for text in found if f"{table!r}" in text} == set(changed)
    saved = save(StoreBackend(harness.backend), folder)
    assert [damage.message for damage in saved.snapshot.damage] == list(found)
    assert saved.snapshot.rows == counted[-1]


def test_nothing_is_swept_while_a_backup_reads(harness, put):
    digest = put(b"garbage")
    backend = harness.backend
    lease = backend.leases.acquire(acquire(HOLD_LEASE, "backup")).lease
    with pytest.raises(FailedPrecondition) as caught:
        backend.references.sweep([digest], lambda _: 7)
    assert caught.value.reason == "BACKUP_RUNNING"
    backend.leases.release(
        pb.ReleaseLeaseRequest(name=HOLD_LEASE, holder="backup", token=lease.token)
    )
    assert backend.references.sweep([digest], lambda _: 7) == [7]


def test_a_restore_that_was_broken_off_is_ended_by_the_next(harness, put, add, folder, target):
    fill(harness, put, add)
    before = seen(harness.backend)
    saved = save(StoreBackend(harness.backend), folder)
    backend = open_backend(target)
    backend.snapshots.begin_restore()
    rows = next(folder.messages(saved.snapshot.name)).rows
    backend.snapshots.insert(rows[: len(rows) // 2], 5)
    backend.close()
    restore(folder, saved.snapshot, lambda: open_backend(target))
    backend = open_backend(target)
    try:
        assert not backend.snapshots.is_restoring()
        assert seen(backend) == before
    finally:
        backend.close()


def test_a_damaged_backup_is_refused_before_anything_is_written(harness, put, add, folder, target):
    digest = fill(harness, put, add)
    saved = save(StoreBackend(harness.backend), folder)
    path = folder.blob_path(digest)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(FailedPrecondition) as caught:
        restore(folder, saved.snapshot, lambda: pytest.fail("opened"))
    assert caught.value.reason == "BACKUP_DAMAGED"
    # The next backup fetches it again, and the old snapshot is whole, too.
    assert save(StoreBackend(harness.backend), folder).new_blobs == 1
    restore(folder, saved.snapshot, lambda: open_backend(target))


def test_blobs_are_listed_by_their_first_digits(harness, put):
    digests = {put(b"%d" % number) for number in range(40)}
    for prefix in {digest[:2] for digest in digests} | {"00", "ff"}:
        found = {blob.digest for blob in harness.backend.blobs.scan(prefix)}
        assert found == {digest for digest in digests if digest.startswith(prefix)}


def test_damage_of_a_blob_is_found_by_reading_it(harness, put):
    digest = put(b"content")
    harness.flip_bit(digest, 0)
    with pytest.raises(DataLoss):
        harness.backend.blobs.open(digest).verify()
    assert [blob.digest for blob in harness.backend.blobs.scan(digest[:2])] == [digest]
