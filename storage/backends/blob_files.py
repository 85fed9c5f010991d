"""One upload to a file and one read of it; ``DirectoryBlobs`` decides where the files are."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol

from phalanx.errors import DataLoss, InvalidArgument
from storage.backends.file_system import FileSystem
from storage.backends.files import read_errors, write_errors
from storage.core.keys import invalid
from storage.interfaces import Buffer, StoredBlob

_VERIFY_CHUNK_BYTES = 1024 * 1024
_SPACE_CHECK_BYTES = 8 * 1024 * 1024


class Publisher(Protocol):
    """What an upload needs of its store."""

    def check_space(self, needed_bytes: int) -> None:
        """Raise ResourceExhausted if so much cannot be stored."""

    def publish(self, upload: str, digest: str, size_bytes: int) -> None:
        """Make a synced upload visible under its digest, durably."""


class FileBlobWriter:
    """A BlobWriter that hashes while it writes."""

    def __init__(self, store: Publisher, disk: FileSystem, uploads: int, name: str) -> None:
        self._store = store
        self._disk = disk
        self._uploads = uploads
        self._name = name
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._unchecked_bytes = 0
        self._descriptor = disk.create_file(name, uploads)

    def write(self, chunk: Buffer) -> None:
        """Take the next bytes."""
        with memoryview(chunk) as rest:
            self._unchecked_bytes += len(rest)
            if self._unchecked_bytes >= _SPACE_CHECK_BYTES:
                self._unchecked_bytes = 0
                self._store.check_space(len(rest))
            self._hash.update(rest)
            self._size_bytes += len(rest)
            written = 0
            with write_errors("a blob"):
                while written < len(rest):
                    written += self._disk.write(self._descriptor, rest[written:])

    def commit(self, expected_digest: str = "", expected_bytes: int = -1) -> StoredBlob:
        """Make the blob durable and visible."""
        digest = self._hash.hexdigest()
        if expected_bytes not in (-1, self._size_bytes):
            raise InvalidArgument(
                f"{self._size_bytes} bytes came, not the {expected_bytes} that were announced",
                reason="SIZE_MISMATCH",
            )
        if expected_digest not in ("", digest):
            raise InvalidArgument(
                f"what came has the digest {digest}, not {expected_digest}: it was changed on its "
                "way, or the digest belongs to something else",
                reason="DIGEST_MISMATCH",
            )
        with write_errors("a blob"):
            self._disk.sync(self._descriptor)
            self._close()
            self._store.publish(self._name, digest, self._size_bytes)
        self._name = ""
        return StoredBlob(digest, self._size_bytes)

    def abort(self) -> None:
        """Remove the upload's file."""
        self._close()
        if self._name:
            # Left for the next start if even that fails.
            with contextlib.suppress(OSError):
                self._disk.unlink(self._name, self._uploads)
            self._name = ""

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            self._disk.close(descriptor)


class FileBlobReader:
    """A BlobReader; ``report(digest, is_corrupt)`` hears the result of every verification."""

    def __init__(
        self, digest: str, disk: FileSystem, descriptor: int, report: Callable[[str, bool], None]
    ) -> None:
        self._digest = digest
        self._disk = disk
        self._descriptor = descriptor
        self._report = report
        try:
            self._size_bytes = disk.size_bytes(descriptor)
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        """Size of the whole blob."""
        return self._size_bytes

    def chunks(self, offset: int, length: int, chunk_bytes: int) -> Iterator[bytes]:
        """Yield a part of the blob, or all of it, verified."""
        if offset < 0 or length < 0 or offset + length > self._size_bytes:
            raise invalid(
                "offset",
                f"bytes {offset} to {offset + length} are not all inside blob {self._digest} of "
                f"{self._size_bytes} bytes",
            )
        if length == self._size_bytes:
            return self._verified(chunk_bytes)
        return self._read(offset, length, chunk_bytes)

    def verify(self) -> None:
        """Read the whole blob and raise DataLoss if it is not what its digest says."""
        for _ in self._verified(_VERIFY_CHUNK_BYTES):
            pass

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            self._disk.close(self._descriptor)
            self._descriptor = -1

    def _verified(self, chunk_bytes: int) -> Iterator[bytes]:
        checksum = hashlib.sha256()
        held = b""
        for chunk in self._read(0, self._size_bytes, chunk_bytes):
            checksum.update(chunk)
            if held:
                yield held
            held = chunk
        is_corrupt = checksum.hexdigest() != self._digest
        self._report(self._digest, is_corrupt)
        if is_corrupt:
            raise self._corrupt()
        if held:
            yield held

    def _read(self, offset: int, length: int, chunk_bytes: int) -> Iterator[bytes]:
        end = offset + length
        while offset < end:
            with read_errors(f"blob {self._digest}"):
                chunk = self._disk.read(self._descriptor, min(chunk_bytes, end - offset), offset)
            if not chunk:
                self._report(self._digest, True)
                raise self._corrupt()
            offset += len(chunk)
            yield chunk

    def _corrupt(self) -> DataLoss:
        return DataLoss(
            f"blob {self._digest} does not match its digest any more: put it again, or go back to "
            "the checkpoint before it",
            reason="BLOB_CORRUPT",
            details={"digest": self._digest},
        )
