"""Where tests put files that many of them make, write through to the disk and remove again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108 - whoever uses it makes a folder of its own in it


def memory_folder(room_bytes: int) -> Path | None:
    """Return a folder in memory if it has so much room and programs in it can be run.

    Each fsync costs some 10 ms on a disk, nothing there; and only the loss of a machine could tell
    the difference, never that of a process. On ext4, moreover, making files is slow for all soon
    after many have been removed.
    """
    if not os.access(_MEMORY, os.W_OK) or os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC:
        return None
    return _MEMORY if shutil.disk_usage(_MEMORY).free >= room_bytes else None
