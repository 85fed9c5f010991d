"""Checking a backup: everything in it is read and compared with what was saved."""

from __future__ import annotations

from phalanx.backups.folder import BackupFolder, Snapshot
from phalanx.errors import FailedPrecondition
from phalanx.texts import number_of


def check(folder: BackupFolder, snapshot: Snapshot) -> list[str]:
    """Read a snapshot and all its blobs; return in words what is wrong, nothing if all is well.

    What was damaged already where it was saved from is not wrong with the backup.
    """
    try:
        folder.check_rows(snapshot)
        blobs = list(folder.blobs(snapshot.name))
    except FailedPrecondition as error:
        return [error.message]
    could_not_be_saved = {damage.digest for damage in snapshot.damage}
    found: list[str] = []
    count = 0
    for blob in blobs:
        path = folder.blob_path(blob.digest)
        if folder.holds(blob.digest):
            count += 1
        elif path.exists():
            found.append(f"blob {blob.digest} does not match its digest")
        elif blob.required and blob.digest not in could_not_be_saved:
            found.append(f"blob {blob.digest} is missing")
    if not found and count < snapshot.blobs:
        found.append(f"{snapshot.blobs - count} of {number_of(snapshot.blobs, 'blob')} missing")
    return found


def demand_sound(folder: BackupFolder, snapshot: Snapshot) -> None:
    """Raise FailedPrecondition (BACKUP_DAMAGED) unless everything is as it was saved."""
    wrong = check(folder, snapshot)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise FailedPrecondition(
            f"snapshot {snapshot.name} is damaged: {wrong[0]}{more}; restore another one, or make "
            "a new backup, which fetches what is damaged again",
            reason="BACKUP_DAMAGED",
        )
