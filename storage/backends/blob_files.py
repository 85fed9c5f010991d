"""One upload to a file and one read of it; ``DirectoryBlobs`` decides where the files are."""

import contextlib
import hashlib
from collections.abc import Callable
from typing import Protocol

from storage.backends.checked_reader import CheckedReader
from storage.backends.file_system import FileSystem
from storage.backends.files import read_errors, write_errors
from storage.core.uploads import check_upload
from storage.interfaces import Buffer, StoredBlob

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
        check_upload(digest, self._size_bytes, expected_digest, expected_bytes)
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


class FileBlobReader(CheckedReader):
    """A BlobReader; ``report(digest, is_corrupt)`` hears the result of every verification."""

    def __init__(
        self, digest: str, disk: FileSystem, descriptor: int, report: Callable[[str, bool], None]
    ) -> None:
        self._disk = disk
        self._descriptor = descriptor
        try:
            size_bytes = disk.size_bytes(descriptor)
        except BaseException:
            self.close()
            raise
        super().__init__(digest, size_bytes, report)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            self._disk.close(self._descriptor)
            self._descriptor = -1

    def fetch(self, offset: int, length: int) -> bytes:
        """Read from the file."""
        with read_errors(f"blob {self.digest}"):
            return self._disk.read(self._descriptor, length, offset)
