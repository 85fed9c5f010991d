"""What a download goes into: hashed by a thread while the next part is on its way."""

import asyncio
import errno
import hashlib
import os
import secrets
from abc import ABC, abstractmethod
from pathlib import Path

from phalanx.errors import FailedPrecondition, PhalanxError, ResourceExhausted

# Handing less than this to a thread costs more than it saves.
_INLINE_BYTES = 64 * 1024


class Sink(ABC):
    """Takes the parts of a download in order; subclasses say where they go."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._checksum = hashlib.sha256()
        self._work: asyncio.Future[None] | None = None

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes; large ones are dealt with by a thread meanwhile."""
        await self._settle()
        if len(chunk) <= _INLINE_BYTES:
            self._take(chunk)
        else:
            self._work = asyncio.get_running_loop().run_in_executor(None, self._take, chunk)

    async def digest(self) -> str:
        """Return the SHA-256 of everything taken."""
        await self._settle()
        return self._checksum.hexdigest()

    async def close(self) -> None:
        """Wait for the thread that may still be at work; its failure is of no interest any more."""
        if self._work is not None:
            await asyncio.wait([self._work])
            if not self._work.cancelled():
                self._work.exception()

    async def _settle(self) -> None:
        if self._work is not None:
            await asyncio.shield(self._work)
            self._work = None

    def _take(self, chunk: bytes) -> None:
        self._checksum.update(chunk)
        self.size_bytes += len(chunk)
        self._keep(chunk)

    @abstractmethod
    def _keep(self, chunk: bytes) -> None:
        """Put the bytes where they go; in a thread, where there are many."""


class MemorySink(Sink):
    """Keeps the parts in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._chunks: list[bytes] = []

    def content(self) -> bytes:
        """Return everything, once ``digest`` has been asked for."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def _keep(self, chunk: bytes) -> None:
        self._chunks.append(chunk)


class FileSink(Sink):
    """Writes to a file beside ``path`` that becomes ``path`` by ``publish``.

    Making it raises FailedPrecondition (FILE_UNWRITABLE), or ResourceExhausted where the disk is
    full, as all writing does; close it always.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        try:
            self._file = self._partial.open("xb", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error

    def publish(self) -> int:
        """Give the file its name and return its size; what was there before is replaced."""
        try:
            self._file.close()
            os.replace(self._partial, self._path)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        return self.size_bytes

    async def close(self) -> None:
        """Remove the file unless it was published."""
        await super().close()
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _keep(self, chunk: bytes) -> None:
        try:
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            raise _unwritable(self._path, error) from error


def _unwritable(path: Path, error: OSError) -> PhalanxError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    kind = ResourceExhausted if full else FailedPrecondition
    return kind(f"cannot write {path}: {error.strerror or error}", reason="FILE_UNWRITABLE")
