"""What all BlobReaders have in common: whole blobs are verified while they are read."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from phalanx.errors import DataLoss
from storage.core.keys import invalid

_VERIFY_CHUNK_BYTES = 1024 * 1024


class CheckedReader(ABC):
    """A BlobReader; ``report(digest, is_corrupt)`` hears the result of every verification."""

    def __init__(self, digest: str, size_bytes: int, report: Callable[[str, bool], None]) -> None:
        self.digest = digest
        self._size_bytes = size_bytes
        self._report = report

    @abstractmethod
    def fetch(self, offset: int, length: int) -> bytes:
        """Read at most ``length`` bytes, and at least one if there is one."""

    @abstractmethod
    def close(self) -> None:
        """Let the blob go."""

    @property
    def size_bytes(self) -> int:
        """Size of the whole blob."""
        return self._size_bytes

    def chunks(self, offset: int, length: int, chunk_bytes: int) -> Iterator[bytes]:
        """Yield a part of the blob, or all of it, verified."""
        if offset < 0 or length < 0 or offset + length > self._size_bytes:
            raise invalid(
                "offset",
                f"bytes {offset} to {offset + length} are not all inside blob {self.digest} of "
                f"{self._size_bytes} bytes",
            )
        if length == self._size_bytes:
            return self._verified(chunk_bytes)
        return self._read(offset, length, chunk_bytes)

    def verify(self) -> None:
        """Read the whole blob and raise DataLoss if it is not what its digest says."""
        for _ in self._verified(_VERIFY_CHUNK_BYTES):
            pass

    def _verified(self, chunk_bytes: int) -> Iterator[bytes]:
        checksum = hashlib.sha256()
        held = b""
        for chunk in self._read(0, self._size_bytes, chunk_bytes):
            checksum.update(chunk)
            if held:
                yield held
            held = chunk
        is_corrupt = checksum.hexdigest() != self.digest
        self._report(self.digest, is_corrupt)
        if is_corrupt:
            raise self._corrupt()
        if held:
            yield held

    def _read(self, offset: int, length: int, chunk_bytes: int) -> Iterator[bytes]:
        end = offset + length
        while offset < end:
            chunk = self.fetch(offset, min(chunk_bytes, end - offset))
            if not chunk:
                self._report(self.digest, True)
                raise self._corrupt()
            offset += len(chunk)
            yield chunk

    def _corrupt(self) -> DataLoss:
        return DataLoss(
            f"blob {self.digest} does not match its digest any more: put it again, or go back to "
            "the checkpoint before it",
            reason="BLOB_CORRUPT",
            details={"digest": self.digest},
        )
