"""Files and folders below one state folder, opened without following links.

Everything is opened relative to a folder's descriptor and with O_NOFOLLOW, so that neither a name
nor a link planted in the state folder leads outside it.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phalanx.errors import DataLoss, FailedPrecondition, ResourceExhausted, Unavailable

_SPARE_BYTES = 256 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a named pipe would wait for a writer.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def disk_full(what: str) -> ResourceExhausted:
    """Return the error for a full disk."""
    return ResourceExhausted(
        f"the disk of the storage service is full; {what} was not stored: free space, or delete "
        "jobs, models or data sets and collect garbage; storage goes on by itself",
        reason="DISK_FULL",
    )


@contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Turn an OSError into ResourceExhausted (DISK_FULL) or Unavailable (IO_ERROR)."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(what) from error
        raise Unavailable(
            f"the disk of the storage service failed while writing {what} "
            f"({errno.errorcode.get(error.errno or 0, 'unknown')}); nothing was stored, try again",
            reason="IO_ERROR",
        ) from error


@contextmanager
def read_errors(what: str) -> Iterator[None]:
    """Turn an OSError of reading ``what`` into DataLoss (IO_ERROR)."""
    try:
        yield
    except OSError as error:
        raise DataLoss(
            f"the disk of the storage service failed while reading {what} "
            f"({errno.errorcode.get(error.errno or 0, 'unknown')})",
            reason="IO_ERROR",
        ) from error


def open_folder(name: str, parent: int | None = None) -> int:
    """Open a folder; return its descriptor."""
    return os.open(name, _FOLDER_FLAGS, dir_fd=parent)


def make_folder(name: str, parent: int) -> bool:
    """Make a folder unless it is there; return whether it was made."""
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def open_file(name: str, folder: int) -> int:
    """Open a file for reading; return its descriptor."""
    return os.open(name, _READ_FLAGS, dir_fd=folder)


def create_file(name: str, folder: int) -> int:
    """Create a file that does not exist yet; return its descriptor."""
    return os.open(name, _CREATE_FLAGS, 0o600, dir_fd=folder)


@contextmanager
def folder(name: str, parent: int) -> Iterator[int]:
    """Open a folder for the length of a ``with``."""
    descriptor = open_folder(name, parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class StateFolder:
    """The state folder, held by one process at a time.

    ``fd`` is its descriptor. Raises FailedPrecondition if another storage process uses it
    (STATE_IN_USE) or if it cannot be used at all (STATE_UNUSABLE).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open("lock", flags, 0o600, dir_fd=self.fd)
            self._take_lock()
        except OSError as error:
            self.close()
            raise _unusable(path, error) from error
        except FailedPrecondition:
            self.close()
            raise

    def close(self) -> None:
        """Let the folder go."""
        for descriptor in (self._lock, self.fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self.fd = -1

    def spend_spare(self) -> None:
        """Free the space that was set aside for starting on a full disk."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink("spare", dir_fd=self.fd)

    def set_spare_aside(self) -> None:
        """Set space aside for the next start: opening a database takes some, even to read."""
        self.spend_spare()
        descriptor = create_file("spare", self.fd)
        try:
            os.posix_fallocate(descriptor, 0, _SPARE_BYTES)
        except OSError:
            # No space even for this: the start succeeded, and the next one can try.
            self.spend_spare()
        finally:
            os.close(descriptor)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            raise FailedPrecondition(
                f"the state folder {self.path} is in use by another storage process (pid "
                f"{holder or 'unknown'}); stop it or choose another folder",
                reason="STATE_IN_USE",
            ) from None
        pid = f"{os.getpid()}\n".encode()
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, pid, 0)
        except OSError as error:
            # The pid is for people only; a full disk must not keep storage from starting.
            if error.errno not in _FULL:
                raise


def _unusable(path: Path, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"cannot use the state folder {path}: {error.strerror or error}", reason="STATE_UNUSABLE"
    )
