"""The state folder of a local cluster: who runs it, and where its processes are.

The supervisor holds a lock on the folder as long as it lives, so that two never share one; the
operating system releases it even when the supervisor is killed. ``cluster.json`` is for other
programs to read and is replaced whole at each change.
"""

import fcntl
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from phalanx.errors import FailedPrecondition
from phalanx.files import replace_content
from phalanx.sdk.discovery import STATE_FILE

_LOCK_FILE = "lock"
_LOCK_ATTEMPTS = 20


@dataclass(frozen=True)
class Member:
    """One process of the cluster. ``pid`` is 0 while it is down."""

    role: str
    id: str
    pid: int
    address: str
    metrics_address: str
    restarts: int
    log: str


@dataclass(frozen=True)
class ClusterState:
    """What ``cluster.json`` says."""

    pid: int
    address: str
    storage_address: str
    version: str
    start_unix_s: float
    ready: bool
    members: tuple[Member, ...]
    keys_dir: str = ""
    """Where the keys of a cluster with keys are."""


def write_state(state_dir: Path, state: ClusterState) -> None:
    """Replace the file; readers see the old or the new one."""
    text = json.dumps(asdict(state), indent=2) + "\n"
    replace_content(state_dir / STATE_FILE, text.encode())


def read_state(state_dir: Path) -> ClusterState | None:
    """Return the state of the cluster that runs on this folder; None when none does."""
    if not is_locked(state_dir):
        return None
    try:
        fields = json.loads((state_dir / STATE_FILE).read_text())
        members = tuple(Member(**member) for member in fields.pop("members"))
        return ClusterState(**fields, members=members)
    except (OSError, ValueError, KeyError, TypeError):
        # The supervisor is just starting or just leaving.
        return None


def remove_state(state_dir: Path) -> None:
    """Remove the file at an orderly end."""
    (state_dir / STATE_FILE).unlink(missing_ok=True)


def is_locked(state_dir: Path) -> bool:
    """Return whether a supervisor lives on this folder."""
    try:
        with open(state_dir / _LOCK_FILE, "rb") as lock_file:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except FileNotFoundError:
        return False


def lock(state_dir: Path) -> IO[bytes]:
    """Take the folder; the lock lasts until the returned file is closed or this process ends.

    Raises FailedPrecondition when another supervisor has it.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_file = open(state_dir / _LOCK_FILE, "ab")  # noqa: SIM115 - held for the cluster's life
    # Whoever reads the state holds the lock for an instant; that must not look like a second
    # supervisor.
    for _ in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return lock_file
    lock_file.close()
    raise FailedPrecondition(
        f"a cluster already runs with its state in {state_dir}; stop it with `phalanx down` "
        "or give another folder with --state",
        reason="STATE_IN_USE",
    )


def unlock(lock_file: IO[bytes]) -> None:
    """Give the folder back, also where a fork of this program still holds a copy of the file."""
    fcntl.flock(lock_file, fcntl.LOCK_UN)
    lock_file.close()
