"""Restoring a backup into a place that is empty, whichever back end that is.

Everything in the backup is checked before the first byte is written. Then the place is marked, so
that no storage serves from it, gets the blobs and the rows, and loses the mark. A restore that was
broken off is begun again by the same command; blobs that are there already are not written again.

Leases come back as nobody's, and their fencing tokens and the terms of jobs are raised far beyond
what the cluster that was saved can have reached since: whoever of it should still live, and reach
this place, is refused. The place also gets a history of its own, which control tells its members:
one that holds a job of another history lets go of it, and the job goes on from what is stored here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from phalanx.backups.checking import demand_sound
from phalanx.backups.folder import BackupFolder, Snapshot
from phalanx.errors import FailedPrecondition
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.snapshots import check_tables, new_stride
from storage.interfaces import Backend

_CHUNK_BYTES = 1024 * 1024
_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class Restored:
    """What was written."""

    snapshot: Snapshot
    rows: int
    blobs: int


def restore(
    folder: BackupFolder,
    snapshot: Snapshot,
    open_backend: Callable[[], Backend],
    *,
    with_damage: bool = False,
) -> Restored:
    """Restore a snapshot into what ``open_backend`` opens, and close it.

    Raises FailedPrecondition (BACKUP_DAMAGED, BACKUP_UNREADABLE, SOURCE_DAMAGED, NOT_EMPTY).
    """
    demand_sound(folder, snapshot)
    if snapshot.damage and not with_damage:
        raise FailedPrecondition(
            f"snapshot {snapshot.name} was made of storage that was damaged: "
            f"{snapshot.damage[0].message} ({len(snapshot.damage)} in all). With --with-damage it "
            "is restored as it was",
            reason="SOURCE_DAMAGED",
        )
    tables = next(iter(folder.messages(snapshot.name)), pb.ReadSnapshotResponse()).tables
    check_tables(tables)
    backend = open_backend()
    try:
        _demand_empty(backend)
        backend.snapshots.begin_restore()
        blobs = _restore_blobs(folder, snapshot, backend)
        stride = new_stride()
        rows = _restore_rows(folder, snapshot, backend, stride)
        backend.snapshots.end_restore(stride)
    finally:
        backend.close()
    return Restored(snapshot, rows, blobs)


def _demand_empty(backend: Backend) -> None:
    if backend.snapshots.is_restoring():
        return
    if not backend.snapshots.is_empty() or next(backend.blobs.scan(), None) is not None:
        raise FailedPrecondition(
            "something is stored there already: restore into a new place", reason="NOT_EMPTY"
        )


def _restore_blobs(folder: BackupFolder, snapshot: Snapshot, backend: Backend) -> int:
    count = 0
    for blob in folder.blobs(snapshot.name):
        path = folder.blob_path(blob.digest)
        if not path.exists():
            continue
        count += 1
        if backend.blobs.sizes([blob.digest]):
            continue
        size_bytes = path.stat().st_size
        writer = backend.blobs.writer(size_bytes)
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    writer.write(chunk)
            writer.commit(blob.digest, size_bytes)
        finally:
            writer.abort()
    return count


def _restore_rows(folder: BackupFolder, snapshot: Snapshot, backend: Backend, stride: int) -> int:
    count = 0
    for message in folder.messages(snapshot.name):
        for first in range(0, len(message.rows), _ROWS_AT_ONCE):
            rows = message.rows[first : first + _ROWS_AT_ONCE]
            backend.snapshots.insert(rows, stride)
            count += len(rows)
    return count
