"""Folders with the code of jobs, named by its hash, on the disk of the worker's cache.

Workers of one machine may share them. Who uses a folder holds a shared lock on it, which the kernel
drops with its process; a folder that nobody uses is removed, since it is made again at once from
the blobs in the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phalanx.wheels import write_code

_GONE = ".gone-"


@dataclass(eq=False)
class CodeFolder:
    """A folder of code that is kept until `release`."""

    path: Path
    _fd: int

    def fill(self, files: Mapping[str, bytes], wheels: Mapping[str, Path]) -> None:
        """Write the job's code. Raises InvalidArgument."""
        write_code(self.path, files, wheels)

    def release(self) -> None:
        """Let go of it and remove it unless somebody else uses it; harmless when called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            remove_unused(self.path)


def folder_name(digests: Mapping[str, str]) -> str:
    """Return the name of the folder for code with these hashes by path."""
    listing = "\n".join(f"{path} {digest}" for path, digest in sorted(digests.items()))
    return hashlib.sha256(listing.encode()).hexdigest()[:32]


def open_folder(root: Path, name: str) -> CodeFolder:
    """Return the folder of that name, made if need be and locked."""
    path = root / name
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # somebody has just removed it
        fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(fd)):
                return CodeFolder(path, fd)
        os.close(fd)


def remove_unused(path: Path) -> None:
    """Remove a folder of code unless somebody uses it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Out of the way at once: whoever wants the folder meanwhile makes it anew.
        grave = Path(tempfile.mkdtemp(prefix=_GONE, dir=path.parent))
        path.rename(grave / path.name)
    except (BlockingIOError, FileNotFoundError):
        return
    finally:
        os.close(fd)
    shutil.rmtree(grave, ignore_errors=True)


def remove_all_unused(root: Path) -> None:
    """Remove what workers that were killed have left behind."""
    with contextlib.suppress(FileNotFoundError):
        for path in root.iterdir():
            if path.name.startswith(_GONE):
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove_unused(path)
