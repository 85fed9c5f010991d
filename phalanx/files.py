"""Files that others read while they are written."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

NAME_LIMIT_BYTES = 245
"""File systems take names of 255 bytes; `replace_content` first writes to one that is 10 longer."""
PATH_LIMIT_BYTES = 512
LENGTH_RULE = f"at most {NAME_LIMIT_BYTES} bytes between slashes and {PATH_LIMIT_BYTES} together"


def is_too_long(path: str) -> bool:
    """Whether a relative path, or a name in it, is longer than what is sure to be writable."""
    name_bytes = max(len(part.encode()) for part in path.split("/"))
    return name_bytes > NAME_LIMIT_BYTES or len(path.encode()) > PATH_LIMIT_BYTES


def replace_content(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Give a file this content at once: readers see the old file or the whole new one.

    With a `mode` it has these permissions before a byte of the content is in it. Several threads
    and processes may write the same file; one of them wins.

    Raises:
        OSError: it cannot be written; then the old file is as it was and nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if mode is not None:
            partial.touch(mode=mode, exist_ok=False)
            partial.chmod(mode)
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def completed(path: Path) -> Iterator[Path]:
    """A path beside the file to write to; it becomes the file once the block has ended well.

    Raises:
        OSError: it cannot be written; the error names the file itself, which is as it was.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == str(partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
