"""Blobs as files named by their digest: ``blobs/ab/abcdef…``.

A blob is written to ``uploads/``, synced, renamed, and the folder is synced: after a crash at any
point it is there whole or not at all, and what is left in ``uploads/`` is removed at the next
start. The 256 folders are made once, so that storing a blob never makes a folder.

A failed fsync is never repeated on its descriptor: the kernel has marked the pages clean and a
second call would succeed without writing them. The upload fails, its file is removed, and the
sender starts anew. If the fsync of the *folder* fails, the blob is whole but may vanish with the
power; it stays invisible until an upload of the same content succeeds or storage starts again.
After a start, each folder is synced before anything in it is reported as stored.
"""

import contextlib
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

from phalanx.errors import DataLoss, FailedPrecondition, NotFound
from storage.backends.blob_ages import BlobAges
from storage.backends.blob_files import FileBlobReader, FileBlobWriter
from storage.backends.file_system import THIS_MACHINE, FileSystem
from storage.backends.files import disk_full, folder, read_errors, write_errors
from storage.core.garbage import is_old_enough
from storage.core.keys import check_digest, is_digest
from storage.interfaces import StoredBlob

_FAN_OUT = [f"{index:02x}" for index in range(256)]


class DirectoryBlobs:
    """A BlobStore in a folder; see ``storage.interfaces`` for what its methods promise.

    ``state_fd`` is the descriptor of the state folder. Uploads are refused as DISK_FULL while less
    than ``reserve_bytes`` of the disk are free, so that journals can still be written when blobs
    cannot.
    """

    def __init__(
        self, state_fd: int, *, reserve_bytes: int = 0, disk: FileSystem = THIS_MACHINE
    ) -> None:
        self._disk = disk
        self._reserve_bytes = reserve_bytes
        self._mutex = threading.Lock()
        # Renamed, but the folder is not synced yet: nobody may rely on them.
        self._settling: set[str] = set()
        # Found corrupt by a reader: reported as missing, so that the next upload replaces them.
        self._corrupt: set[str] = set()
        # Synced by this process. In the others, what a process that was killed had renamed is
        # visible but may not be durable.
        self._synced_folders: set[str] = set()
        self._usage_bytes = 0
        self._ages = BlobAges()
        self._blobs = self._uploads = -1
        try:
            for name in ("blobs", "uploads"):
                disk.make_folder(name, state_fd)
            self._blobs = disk.open_folder("blobs", state_fd)
            self._uploads = disk.open_folder("uploads", state_fd)
            self._prepare(state_fd)
        except OSError as error:
            self.close()
            raise FailedPrecondition(
                f"cannot use the blobs of the state folder: {error}", reason="STATE_UNUSABLE"
            ) from error

    def _prepare(self, state_fd: int) -> None:
        """Remove what a crash left behind, make the folders and count what is there."""
        for name in self._disk.names(self._uploads):
            self._disk.unlink(name, self._uploads)
        present = set(self._disk.names(self._blobs))
        for name in _FAN_OUT:
            if name not in present:
                self._disk.make_folder(name, self._blobs)
                continue
            with self._folder(name) as parent:
                for entry in self._disk.names(parent):
                    self._usage_bytes += self._disk.status(entry, parent).st_size
        self._disk.sync(self._blobs)
        self._disk.sync(state_fd)

    def close(self) -> None:
        """Close the folders; harmless when called twice."""
        for descriptor in (self._blobs, self._uploads):
            if descriptor >= 0:
                self._disk.close(descriptor)
        # A number that was closed soon belongs to somebody else's file or socket.
        self._blobs = self._uploads = -1

    def writer(self, expected_bytes: int = -1) -> FileBlobWriter:
        """Begin an upload."""
        name = secrets.token_hex(16)
        self.check_space(max(expected_bytes, 0))
        with write_errors("a blob"):
            return FileBlobWriter(self, self._disk, self._uploads, name)

    def check_space(self, needed_bytes: int) -> None:
        """Raise ResourceExhausted (DISK_FULL) unless so much fits beside the reserve."""
        with write_errors("a blob"):
            free_bytes = self._disk.free_bytes(self._uploads)
        if free_bytes < needed_bytes + self._reserve_bytes:
            raise disk_full("a blob")

    def publish(self, upload: str, digest: str, size_bytes: int) -> None:
        """Rename a synced upload to its digest and make that durable."""
        with self._folder(digest[:2]) as target:
            with self._mutex:
                before = self._size(target, digest)
                if before is None or digest in self._corrupt:
                    self._settling.add(digest)
                self._disk.rename(upload, self._uploads, digest, target)
                self._ages.touched(digest)
                self._usage_bytes += size_bytes - (before or 0)
            self._disk.sync(target)
        with self._mutex:
            self._synced_folders.add(digest[:2])
            self._settling.discard(digest)
            self._corrupt.discard(digest)

    def open(self, digest: str) -> FileBlobReader:
        """Open a blob for reading."""
        check_digest(digest, "digest")
        try:
            with self._folder(digest[:2]) as parent:
                descriptor = self._disk.open_file(digest, parent)
            return FileBlobReader(digest, self._disk, descriptor, self._found_corrupt)
        except FileNotFoundError:
            raise NotFound(f"blob {digest} is not stored", reason="BLOB_NOT_FOUND") from None
        except OSError as error:
            raise DataLoss(f"blob {digest} cannot be opened", reason="IO_ERROR") from error

    def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        """Return the sizes of those that are stored."""
        return self._look(digests, touch=False)

    def touch(self, digests: Iterable[str]) -> Mapping[str, int]:
        """Return the sizes of those that are stored, which are young from now on."""
        return self._look(digests, touch=True)

    def scan(self, prefix: str = "") -> Iterator[StoredBlob]:
        """List all blobs, or those that begin with two digits."""
        for name in [prefix] if prefix else _FAN_OUT:
            yield from self._scan_folder(name)

    def _scan_folder(self, name: str) -> list[StoredBlob]:
        found: list[StoredBlob] = []
        with read_errors("the list of blobs"), self._folder(name) as parent:
            for entry in self._disk.names(parent):
                if not is_digest(entry):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = self._disk.status(entry, parent)
                    age_s = self._age_s(entry, status.st_mtime)
                    found.append(StoredBlob(entry, status.st_size, age_s))
        return found

    def remove_if_old(self, digest: str, grace_s: float) -> int | None:
        """Remove the blob unless it is young."""
        check_digest(digest, "digest")
        with (
            write_errors("the removal of a blob"),
            self._folder(digest[:2]) as parent,
            self._mutex,
        ):
            try:
                status = self._disk.status(digest, parent)
            except FileNotFoundError:
                return None
            self._ages.asked_for(grace_s)
            if not is_old_enough(self._ages.age_s(digest, status.st_mtime), grace_s):
                return None
            self._disk.unlink(digest, parent)
            self._settling.discard(digest)
            self._corrupt.discard(digest)
            self._ages.removed(digest)
            self._usage_bytes -= status.st_size
            return status.st_size

    def usage_bytes(self) -> int:
        """Return the size of all blobs."""
        return self._usage_bytes

    def _look(self, digests: Iterable[str], *, touch: bool) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for digest in digests:
            check_digest(digest, "digests")
            with read_errors("the folders of blobs"), self._folder(digest[:2]) as parent:
                self._sync_once(digest[:2], parent)
                with self._mutex:
                    size_bytes = self._size(parent, digest)
                    if size_bytes is None or digest in self._settling or digest in self._corrupt:
                        continue
                    if touch:
                        self._disk.touch(digest, parent)
                        self._ages.touched(digest)
                    found[digest] = size_bytes
        return found

    def _sync_once(self, name: str, descriptor: int) -> None:
        """Make durable what is visible, before anyone is told that it is stored."""
        if name not in self._synced_folders:
            with write_errors("the folders of blobs"):
                self._disk.sync(descriptor)
            self._synced_folders.add(name)

    def _found_corrupt(self, digest: str, is_corrupt: bool) -> None:
        with self._mutex:
            if is_corrupt:
                self._corrupt.add(digest)
            else:
                self._corrupt.discard(digest)

    def _folder(self, name: str) -> AbstractContextManager[int]:
        return folder(self._disk, name, self._blobs)

    def _age_s(self, digest: str, modified_s: float) -> float:
        with self._mutex:
            return self._ages.age_s(digest, modified_s)

    def _size(self, parent: int, digest: str) -> int | None:
        """Return the size of a plain file; anything else in its place (a link) is missing."""
        try:
            status = self._disk.status(digest, parent)
        except FileNotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None
