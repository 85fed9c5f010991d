"""Files that stay where they are: what they looked like, and how they are opened again.

Whoever links a file says its path, and a service opens it for everyone who reads the data set. So
a service opens only what lies below folders that its operator named, and follows no symbolic link
on the way: with one, whoever may write into such a folder could have it read any file.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from phalanx.data.links import LinkedFile
from phalanx.errors import FailedPrecondition, InvalidArgument, PhalanxError, Unavailable

NOT_ALLOWED = "LINK_NOT_ALLOWED"
UNREADABLE = "LINKED_FILE_UNREADABLE"
CHANGED = "LINKED_FILE_CHANGED"
AWAY = "LINKED_FILE_AWAY"
"""The reason where the disk, the network or memory gave no answer: nothing is known of the file."""

_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.ESHUTDOWN,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_MAGIC = b"PAR1"
_TAIL_BYTES = 8
_FOOTER_LIMIT_BYTES = 256 * 1024 * 1024
_READ_BYTES = 1024 * 1024


def describe_file(path: Path, rows: int) -> LinkedFile:
    """What the file looks like now. Raises InvalidArgument where it is no Parquet file."""
    resolved = path.resolve(strict=True)
    descriptor = os.open(resolved, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(descriptor).st_size
        digest = footer_sha256(descriptor, size_bytes)
    finally:
        os.close(descriptor)
    if digest is None:
        raise InvalidArgument(f"{path} is not a Parquet file")
    return LinkedFile(str(resolved), size_bytes, rows, digest)


def open_linked(file: LinkedFile, roots: Sequence[str]) -> int:
    """Return a descriptor of the file if it lies below one of the folders and is what it was.

    Raises FailedPrecondition (LINK_NOT_ALLOWED, LINKED_FILE_UNREADABLE, LINKED_FILE_CHANGED), and
    Unavailable (LINKED_FILE_AWAY) where it cannot be told.
    """
    descriptor = _open_below(file.path, roots)
    try:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != file.size_bytes:
            raise _changed(file, f"it has {size_bytes} bytes, not {file.size_bytes}")
        if footer_sha256(descriptor, size_bytes) != file.footer_sha256:
            raise _changed(file, "its footer is another one")
    except OSError as error:
        os.close(descriptor)
        raise unreadable(file.path, error) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Read a file inside of this; raises Unavailable (LINKED_FILE_AWAY) for errors that pass."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from error
    except PhalanxError as error:
        # Whoever parses a file takes whatever its bytes cannot be had for as damage.
        if isinstance(error.__cause__, OSError) and _passes(error.__cause__):
            raise unreadable(path, error.__cause__) from error
        raise


def unreadable(path: str, error: OSError | MemoryError) -> PhalanxError:
    """What to tell of a file for which the system gave an error."""
    problem = "out of memory" if isinstance(error, MemoryError) else _said(error)
    text = f"the storage service cannot read {path}: {problem}"
    if _passes(error):
        return Unavailable(text, reason=AWAY)
    return FailedPrecondition(text, reason=UNREADABLE)


def footer_sha256(descriptor: int, size_bytes: int) -> str | None:
    """The hex SHA-256 of a Parquet file's footer; None where there is none."""
    if size_bytes < _TAIL_BYTES:
        return None
    tail = os.pread(descriptor, _TAIL_BYTES, size_bytes - _TAIL_BYTES)
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or footer_bytes > min(size_bytes - _TAIL_BYTES, _FOOTER_LIMIT_BYTES):
        return None
    checksum = hashlib.sha256()
    offset, end = size_bytes - _TAIL_BYTES - footer_bytes, size_bytes - _TAIL_BYTES
    while offset < end:
        piece = os.pread(descriptor, min(_READ_BYTES, end - offset), offset)
        if not piece:
            return None
        checksum.update(piece)
        offset += len(piece)
    return checksum.hexdigest()


def folder_of(path: str, roots: Sequence[str]) -> str:
    """Return which of the folders that its operator named a service finds the path below.

    Raises FailedPrecondition (LINK_NOT_ALLOWED) where it is below none.
    """
    if not roots:
        raise FailedPrecondition(
            f"{path} cannot be linked: this storage service reads no files in place until it is "
            "started with --link-root and the folder that they lie in (`phalanx up --link-root`)",
            reason=NOT_ALLOWED,
        )
    if not os.path.isabs(path) or path != os.path.normpath(path) or "\0" in path:
        raise FailedPrecondition(f"{path!r} is no absolute, plain path", reason=NOT_ALLOWED)
    for root in roots:
        # The folder may be named by a link, which is its operator's business.
        for folder in (os.path.normpath(root), os.path.realpath(root)):
            if path.startswith(os.path.join(folder, "")):
                return folder
    raise FailedPrecondition(
        f"{path} lies in none of the folders from which this storage service reads files in place "
        f"(--link-root {', '.join(roots)})",
        reason=NOT_ALLOWED,
    )


def _open_below(path: str, roots: Sequence[str]) -> int:
    """Open a regular file below one of the folders, one part of its path after another."""
    folder = folder_of(path, roots)
    try:
        return _walk(folder, os.path.relpath(path, folder).split(os.sep), path)
    except OSError as error:
        raise unreadable(path, error) from error


def _walk(root: str, parts: Sequence[str], path: str) -> int:
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(part, flags, dir_fd=folder)
            os.close(folder)
            folder = below
        # Opening a pipe would wait for someone who writes into it.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(parts[-1], flags, dir_fd=folder)
    finally:
        with suppress(OSError):
            os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FailedPrecondition(f"{path} is not a regular file", reason=UNREADABLE)
    return descriptor


def _passes(error: OSError | MemoryError) -> bool:
    return isinstance(error, MemoryError) or error.errno in _PASSING


def _said(error: OSError) -> str:
    problem = (error.strerror or str(error)).lower()
    if isinstance(error, FileNotFoundError):
        return "there is no such file where it runs"
    if isinstance(error, NotADirectoryError) or "symbolic link" in problem:
        return "a part of the path is a symbolic link or no folder"
    return problem


def _changed(file: LinkedFile, how: str) -> FailedPrecondition:
    return FailedPrecondition(f"{file.path} is not the file that was linked: {how}", reason=CHANGED)
