"""What user code prints, tagged with the job, step and shard that printed it.

Standard output and error of a leaf process are pipes to the session process. Before the first
bytes of another leaf a tag line goes out; leaves that print nothing cost nothing.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

TAG = b"\x1e"
"""Starts a tag line: TAG, job number, step, shard (-1: none), separated by blanks."""

Context = tuple[int, int, int]
"""Job number, step, shard."""


class _TaggedPipe(io.RawIOBase):
    def __init__(self, fd: int, context: Callable[[], Context]) -> None:
        self._fd = fd
        self._context = context
        self._last: Context | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        context = self._context()
        if context != self._last:
            self._last = context
            _write_all(self._fd, b"%b%d %d %d\n" % (TAG, *context))
        _write_all(self._fd, view)
        return len(view)


def redirect(context: Callable[[], Context]) -> None:
    """Replace sys.stdout and sys.stderr by tagged ones; both are written line by line."""
    sys.stdout = _text(1, context)
    sys.stderr = _text(2, context)


def flush() -> None:
    """End an unfinished line, so that it is not taken for the next leaf's."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _text(fd: int, context: Callable[[], Context]) -> io.TextIOWrapper:
    raw = _TaggedPipe(fd, context)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="replace", line_buffering=True
    )


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
