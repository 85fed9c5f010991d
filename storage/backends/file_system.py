"""The few calls of the operating system that a state folder is made of.

Everything the embedded back end does to files outside of SQLite goes through a FileSystem, so that
a disk that fails, fills up or loses power can take the place of the real one.

Everything is opened relative to a folder's descriptor and with O_NOFOLLOW, so that neither a name
nor a link planted in the state folder leads outside it.
"""

import os
from pathlib import Path
from typing import Protocol

from storage.interfaces import Buffer

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a named pipe would wait for a writer.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_UPDATE_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class FileSystem(Protocol):
    """All methods raise OSError; ``folder`` and ``file`` are descriptors."""

    def make_root(self, path: Path) -> None:
        """Make the folder at a path, and those above it, unless it is there."""

    def open_root(self, path: Path) -> int:
        """Open the folder at a path, which may be a link; return its descriptor."""

    def open_folder(self, name: str, parent: int) -> int:
        """Open a folder inside another; return its descriptor."""

    def open_file(self, name: str, folder: int) -> int:
        """Open a file for reading; return its descriptor."""

    def open_for_update(self, name: str, folder: int) -> int:
        """Open a file for reading and writing; return its descriptor."""

    def create_file(self, name: str, folder: int) -> int:
        """Create a file that does not exist yet; return its descriptor."""

    def open_lock(self, name: str, folder: int) -> int:
        """Open a file for reading and writing, and create it if it is missing."""

    def close(self, descriptor: int) -> None:
        """Close a file or folder."""

    def make_folder(self, name: str, parent: int) -> bool:
        """Make a folder unless it is there; return whether it was made."""

    def names(self, folder: int) -> list[str]:
        """List a folder."""

    def status(self, name: str, folder: int) -> os.stat_result:
        """Describe what has this name, not following it if it is a link."""

    def size_bytes(self, file: int) -> int:
        """Return the size of an open file."""

    def free_bytes(self, folder: int) -> int:
        """Return how much of the disk this process may still take."""

    def read(self, file: int, length: int, offset: int) -> bytes:
        """Read up to ``length`` bytes; none at the end of the file."""

    def write(self, file: int, content: Buffer) -> int:
        """Write at the file's position; return how many bytes were taken."""

    def truncate(self, file: int, size_bytes: int) -> None:
        """Cut a file off, or lengthen it with zeros."""

    def allocate(self, file: int, size_bytes: int) -> None:
        """Reserve disk space for the file."""

    def sync(self, descriptor: int) -> None:
        """Make a file's content, or a folder's names, durable."""

    def rename(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        """Move a file, replacing what has its new name."""

    def unlink(self, name: str, folder: int) -> None:
        """Remove a file."""

    def touch(self, name: str, folder: int) -> None:
        """Set a file's times to now."""


class OsFileSystem:
    """The FileSystem of this machine."""

    def make_root(self, path: Path) -> None:
        """Make the folder at a path, and those above it, unless it is there."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open_root(self, path: Path) -> int:
        """Open the folder at a path."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_folder(self, name: str, parent: int) -> int:
        """Open a folder inside another."""
        return os.open(name, _FOLDER_FLAGS, dir_fd=parent)

    def open_file(self, name: str, folder: int) -> int:
        """Open a file for reading."""
        return os.open(name, _READ_FLAGS, dir_fd=folder)

    def open_for_update(self, name: str, folder: int) -> int:
        """Open a file for reading and writing."""
        return os.open(name, _UPDATE_FLAGS, dir_fd=folder)

    def create_file(self, name: str, folder: int) -> int:
        """Create a file that does not exist yet."""
        return os.open(name, _CREATE_FLAGS, 0o600, dir_fd=folder)

    def open_lock(self, name: str, folder: int) -> int:
        """Open a file for reading and writing."""
        return os.open(name, _LOCK_FLAGS, 0o600, dir_fd=folder)

    def close(self, descriptor: int) -> None:
        """Close a file or folder."""
        os.close(descriptor)

    def make_folder(self, name: str, parent: int) -> bool:
        """Make a folder unless it is there."""
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            return False
        return True

    def names(self, folder: int) -> list[str]:
        """List a folder."""
        return os.listdir(folder)

    def status(self, name: str, folder: int) -> os.stat_result:
        """Describe what has this name."""
        return os.stat(name, dir_fd=folder, follow_symlinks=False)

    def size_bytes(self, file: int) -> int:
        """Return the size of an open file."""
        return os.fstat(file).st_size

    def free_bytes(self, folder: int) -> int:
        """Return how much of the disk this process may still take."""
        usage = os.fstatvfs(folder)
        return usage.f_bavail * usage.f_frsize

    def read(self, file: int, length: int, offset: int) -> bytes:
        """Read up to ``length`` bytes."""
        return os.pread(file, length, offset)

    def write(self, file: int, content: Buffer) -> int:
        """Write at the file's position."""
        return os.write(file, content)

    def truncate(self, file: int, size_bytes: int) -> None:
        """Cut a file off."""
        os.ftruncate(file, size_bytes)

    def allocate(self, file: int, size_bytes: int) -> None:
        """Reserve disk space for the file."""
        os.posix_fallocate(file, 0, size_bytes)

    def sync(self, descriptor: int) -> None:
        """Make a file's content, or a folder's names, durable."""
        os.fsync(descriptor)

    def rename(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        """Move a file."""
        os.rename(name, new_name, src_dir_fd=folder, dst_dir_fd=new_folder)

    def unlink(self, name: str, folder: int) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=folder)

    def touch(self, name: str, folder: int) -> None:
        """Set a file's times to now."""
        os.utime(name, dir_fd=folder, follow_symlinks=False)


THIS_MACHINE = OsFileSystem()
