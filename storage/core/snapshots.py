"""What keeps garbage collection away from a backup, and control away from half a restore.

A backup holds a lease for as long as it reads, and renews it. Garbage is swept in transactions that
look for that lease first: from the moment at which the rows of a snapshot were read, nothing goes
that they name. Whoever holds it may die: a collector that has seen it unchanged for a TTL on its
own clock takes it away, and the backup, if it should still live, hears so when it renews it.
"""

from dataclasses import dataclass

from phalanx.errors import FailedPrecondition
from storage.core.leases import LeaseRow

HOLD_LEASE = "storage/backup"
RESTORE_LEASE = "storage/restore"
"""There while a place is being restored into: what is in it is not whole."""

HISTORY_LEASE = "storage/history"
"""Nobody holds it; its token says which history this is. 0, as without a row: never restored.
Restoring raises it with all other fencing tokens, so that a restored place has one of its own."""

SCRUB_STREAM = "storage/scrub"
"""The journal in which scrubbing notes how far it is."""

HOLD_TTL_S = 60.0
BACKUP_RUNNING = "BACKUP_RUNNING"


@dataclass
class HoldWatch:
    """What one process has seen of the lease of backups, on its own clock."""

    seen: tuple[int, int] = (0, 0)
    since_s: float = 0.0

    def challenge(self, row: LeaseRow | None, now_s: float) -> tuple[int, int]:
        """Return what to take the lease over with: what was seen for a TTL, else zeros."""
        held = (0, 0) if row is None or not row.holder else (row.token, row.counter)
        if held != self.seen:
            self.seen, self.since_s = held, now_s
        return held if now_s - self.since_s >= HOLD_TTL_S else (0, 0)


def check_no_hold(row: LeaseRow | None) -> None:
    """Raise FailedPrecondition (BACKUP_RUNNING) while a backup reads."""
    if row is not None and row.holder:
        raise backup_running()


def backup_running() -> FailedPrecondition:
    """Return the error for what has to wait until a backup has ended."""
    return FailedPrecondition(
        "a backup is being made; try again when it has ended. One that was killed is forgotten "
        f"after {HOLD_TTL_S:.0f} s",
        reason=BACKUP_RUNNING,
        retry_after_s=HOLD_TTL_S,
    )
