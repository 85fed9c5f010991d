"""The state folder itself, and what becomes of an error of the disk."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phalanx.errors import DataLoss, FailedPrecondition, ResourceExhausted, Unavailable
from storage.backends.file_system import THIS_MACHINE, FileSystem

DATABASE_NAME = "metadata.sqlite3"
"""The file of the state folder that has a database in it, where that is not elsewhere."""

_SPARE_BYTES = 256 * 1024
_COPY_BYTES = 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(what: str) -> ResourceExhausted:
    """Return the error for a full disk."""
    return ResourceExhausted(
        f"the disk of the storage service is full; {what} was not stored: free space, or delete "
        "jobs, models or data sets and collect garbage; storage goes on by itself",
        reason="DISK_FULL",
        retry_after_s=1.0,
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


@contextmanager
def folder(disk: FileSystem, name: str, parent: int) -> Iterator[int]:
    """Open a folder for the length of a ``with``."""
    descriptor = disk.open_folder(name, parent)
    try:
        yield descriptor
    finally:
        disk.close(descriptor)


class StateFolder:
    """The state folder, held by one process at a time.

    ``fd`` is its descriptor. Raises FailedPrecondition if another storage process uses it
    (STATE_IN_USE) or if it cannot be used at all (STATE_UNUSABLE).
    """

    def __init__(self, path: Path, disk: FileSystem = THIS_MACHINE) -> None:
        self.path = path
        self._disk = disk
        self.fd = self._lock = -1
        try:
            self._make()
            self.fd = disk.open_root(path)
            self._lock = disk.open_lock("lock", self.fd)
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
                self._disk.close(descriptor)
        self._lock = self.fd = -1

    def write_again(self, name: str) -> None:
        """Write a file's own content over it and sync it, if it exists.

        If a process ended because its sync failed, this file may hold what can be read and is not
        on the disk, in pages that the kernel takes for clean. Whoever builds on them, only to lose
        them with the power, has built on nothing; so they are made dirty and synced before anyone
        reads them. In place, because that takes no space, and harmless if it is cut off anywhere.
        """
        try:
            file = self._disk.open_for_update(name, self.fd)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            offset = 0
            while content := self._disk.read(file, _COPY_BYTES, offset):
                written = 0
                while written < len(content):
                    written += self._write_if_not_full(file, content[written:])
                offset += len(content)
            self._disk.sync(file)
        except OSError as error:
            raise _unusable(self.path, error) from error
        finally:
            self._disk.close(file)

    def _write_if_not_full(self, file: int, content: bytes) -> int:
        """Write; where the file system wants space even for this and has none, do without."""
        try:
            return self._disk.write(file, content)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return len(content)

    def sync(self) -> None:
        """Make the names in the state folder durable."""
        try:
            self._disk.sync(self.fd)
        except OSError as error:
            raise _unusable(self.path, error) from error

    def spend_spare(self) -> None:
        """Free the space that was set aside for starting on a full disk."""
        try:
            self._disk.unlink("spare", self.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unusable(self.path, error) from error

    def set_spare_aside(self) -> None:
        """Set space aside for the next start: opening a database takes some, even to read."""
        # The start succeeded; without space even for this, the next one can try.
        with contextlib.suppress(OSError, FailedPrecondition):
            self.spend_spare()
            descriptor = self._disk.create_file("spare", self.fd)
            try:
                self._disk.allocate(descriptor, _SPARE_BYTES)
            except OSError:
                self.spend_spare()
            finally:
                self._disk.close(descriptor)

    def _make(self) -> None:
        """Make the folder, and those above it that are missing, durably."""
        missing = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self._disk.make_root(self.path)
        # One that is there may come from a process that was killed before it got here.
        for each in missing or [self.path]:
            try:
                parent = self._disk.open_root(each.parent)
            except PermissionError:
                # Whoever may not look into it did not make the folder either.
                continue
            try:
                self._disk.sync(parent)
            finally:
                self._disk.close(parent)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._disk.read(self._lock, 32, 0).decode("ascii", "replace").strip()
            raise FailedPrecondition(
                f"the state folder {self.path} is in use by another storage process (pid "
                f"{holder or 'unknown'}); stop it or choose another folder",
                reason="STATE_IN_USE",
            ) from None
        pid = f"{os.getpid()}\n".encode()
        try:
            self._disk.truncate(self._lock, 0)
            self._disk.write(self._lock, pid)
        except OSError as error:
            # The pid is for people only; a full disk must not keep storage from starting.
            if error.errno not in _FULL:
                raise


def _unusable(path: Path, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"cannot use the state folder {path}: {error.strerror or error}", reason="STATE_UNUSABLE"
    )
