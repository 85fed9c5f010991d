"""What can be uploaded as a blob: bytes, buffers one after another, a file, or a stream."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from phalanx.errors import InvalidArgument

Buffer = bytes | bytearray | memoryview
BlobSource = Buffer | Path | Sequence[Buffer] | Iterator[Buffer] | AsyncIterator[Buffer]
"""Bytes, a file, a list of buffers (never joined), or a stream that can be read once."""

MESSAGE_BYTES = 1024 * 1024
"""Size of the messages of an upload: the best of those measured, 256 KiB to 2 MiB."""

_SMALL_BYTES = 64 * 1024


class Repeatable:
    """A source that can be read again, so that an upload can be retried and hashed before."""

    def __init__(self, source: Buffer | Path | Sequence[Buffer]) -> None:
        self._read: Callable[[], Iterable[memoryview]]
        if isinstance(source, Path):
            self._read = lambda: _file_pieces(source)
            self.size_bytes = _file_size(source)
            self._in_memory = False
        else:
            buffers = [source] if isinstance(source, bytes | bytearray | memoryview) else source
            views = [memoryview(buffer).cast("B") for buffer in buffers]
            self._read = lambda: (piece for view in views for piece in _cut(view))
            self.size_bytes = sum(view.nbytes for view in views)
            self._in_memory = True

    @property
    def is_small(self) -> bool:
        """Whether an upload costs no more than asking whether it is needed."""
        return self.size_bytes <= _SMALL_BYTES

    async def digest(self) -> str:
        """Return the SHA-256 of the content, computed in a thread unless it is small."""
        if self._in_memory and self.is_small:
            return self._digest()
        return await asyncio.to_thread(self._digest)

    async def pieces(self) -> AsyncIterator[memoryview]:
        """Yield the content in pieces of a message; files are read in threads."""
        pieces = iter(self._read())
        while (piece := await self._next(pieces)) is not None:
            yield piece

    async def _next(self, pieces: Iterator[memoryview]) -> memoryview | None:
        if self._in_memory:
            return next(pieces, None)
        return await asyncio.to_thread(next, pieces, None)

    def _digest(self) -> str:
        checksum = hashlib.sha256()
        for piece in self._read():
            checksum.update(piece)
        return checksum.hexdigest()


class Stream:
    """A source that can be read once; it is hashed while it passes."""

    def __init__(self, source: Iterator[Buffer] | AsyncIterator[Buffer]) -> None:
        self._source = source
        self._checksum = hashlib.sha256()

    async def pieces(self) -> AsyncIterator[memoryview]:
        """Yield the content in pieces of a message; a blocking source is read in threads."""
        async for buffer in self._buffers():
            for piece in _cut(memoryview(buffer).cast("B")):
                await asyncio.to_thread(self._checksum.update, piece)
                yield piece

    def digest(self) -> str:
        """Return the SHA-256 of what passed."""
        return self._checksum.hexdigest()

    async def _buffers(self) -> AsyncIterator[Buffer]:
        if isinstance(self._source, AsyncIterator):
            async for buffer in self._source:
                yield buffer
            return
        while (following := await asyncio.to_thread(_next_of, self._source)) is not None:
            yield following


def _next_of(source: Iterator[Buffer]) -> Buffer | None:
    return next(source, None)


def open_source(source: object) -> Repeatable | Stream:
    """Return what reads ``source``; InvalidArgument if it is nothing that can be uploaded."""
    if isinstance(source, bytes | bytearray | memoryview | Path):
        return Repeatable(source)
    if isinstance(source, Iterator | AsyncIterator):
        return Stream(source)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return Repeatable(source)
    raise InvalidArgument(
        f"a {type(source).__name__} is no blob; pass bytes, a list of buffers, a Path or an "
        "iterator"
    )


def _cut(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, view.nbytes, MESSAGE_BYTES):
        yield view[start : start + MESSAGE_BYTES]


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidArgument(
            f"cannot read {path}: {error.strerror or error}", reason="FILE_UNREADABLE"
        ) from error


def _file_pieces(path: Path) -> Iterator[memoryview]:
    with _opened(path) as file:
        while piece := file.read(MESSAGE_BYTES):
            yield memoryview(piece)


def _file_size(path: Path) -> int:
    with _opened(path) as file:
        return file.seek(0, 2)
