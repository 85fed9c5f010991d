"""A file that a blob is downloaded to: hashed while it is written, renamed when it is right."""

import asyncio
import hashlib
import os
import secrets
from pathlib import Path

from phalanx.errors import FailedPrecondition


class FileSink:
    """A file beside ``path`` that becomes ``path`` by ``publish``.

    Making it raises FailedPrecondition (FILE_UNWRITABLE), as all writing does; close it always.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        self._checksum = hashlib.sha256()
        self._size_bytes = 0
        self._work: asyncio.Future[None] | None = None
        try:
            self._file = self._partial.open("xb", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes; they are hashed and written by a thread meanwhile."""
        await self._settle()
        self._work = asyncio.get_running_loop().run_in_executor(None, self._write, chunk)

    async def digest(self) -> str:
        """Return the SHA-256 of everything taken."""
        await self._settle()
        return self._checksum.hexdigest()

    def publish(self) -> int:
        """Give the file its name and return its size; what was there before is replaced."""
        try:
            self._file.close()
            os.replace(self._partial, self._path)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        return self._size_bytes

    async def close(self) -> None:
        """Remove the file unless it was published."""
        if self._work is not None:
            await asyncio.wait([self._work])
            if not self._work.cancelled():
                self._work.exception()
        self._file.close()
        self._partial.unlink(missing_ok=True)

    async def _settle(self) -> None:
        if self._work is not None:
            await asyncio.shield(self._work)
            self._work = None

    def _write(self, chunk: bytes) -> None:
        self._checksum.update(chunk)
        self._size_bytes += len(chunk)
        try:
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            raise _unwritable(self._path, error) from error


def _unwritable(path: Path, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"cannot write {path}: {error.strerror or error}", reason="FILE_UNWRITABLE"
    )
