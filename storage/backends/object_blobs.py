"""Blobs as objects of an object store, with an index in the database.

The index says which object holds which blob, how large and how young it is, and what else is there:
no answer depends on a listing of the store, and a question about fifty thousand blobs is one about
rows. An object's key is made up for each upload and never used again, so what is uploaded, read and
removed by several processes at the same time cannot meet in one object.

An object is in the index before its first byte is sent (*arriving*). When it is whole, one
transaction makes it the blob (*stored*), unless that is stored already. Whatever counts no more is
*doomed* in a transaction, and goes from the store, and then from the index, when whoever reads it
or still sends it has had the time to end. So a process may end at any point: what it leaves behind
counts for nothing and is found.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from uuid import uuid4

from phalanx.errors import NotFound, PhalanxError, Unavailable
from storage.backends.checked_reader import CheckedReader
from storage.backends.objects import ObjectStore, ObjectWriter
from storage.backends.sql import objects
from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.elapsed import SqlElapsed
from storage.backends.sql.objects import ARRIVING, CORRUPT, DOOMED, STORED, ObjectRow
from storage.core.garbage import is_old_enough
from storage.core.keys import check_digest
from storage.core.uploads import check_upload
from storage.interfaces import Buffer, StoredBlob

ARRIVING_S = 24 * 3600.0
"""An upload that takes longer is given up."""

DOOMED_S = 600.0
"""So long an object is left that counts no more: somebody may read it, or a request that was
thought to be lost may still arrive."""

_PAGE_BLOBS = 1000
_OBJECTS_AT_ONCE = 100
_READ_BYTES = 8 * 1024 * 1024


class ObjectBlobs:
    """A BlobStore; see ``storage.interfaces`` for what its methods promise."""

    def __init__(self, store: ObjectStore, database: Database, elapsed: SqlElapsed) -> None:
        self._store = store
        self._database = database
        self._elapsed = elapsed

    def writer(self, expected_bytes: int = -1) -> "ObjectBlobWriter":
        """Begin an upload."""
        token = uuid4().hex
        key = f"blobs/{token[:2]}/{token}"

        def arrive(connection: Connection) -> None:
            since_s = self._elapsed.stamp_s(connection)
            objects.save(connection, [ObjectRow(key, "", 0, ARRIVING, since_s)])

        self._database.write(arrive)
        return ObjectBlobWriter(key, self._store.writer(key), self._register, self._give_up)

    def open(self, digest: str) -> "ObjectBlobReader":
        """Open a blob for reading."""
        row = self._find(digest)
        if row is None:
            raise NotFound(f"blob {digest} is not stored", reason="BLOB_NOT_FOUND")

        def report(_: str, is_corrupt: bool) -> None:
            # Seldom a news, so seldom a write.
            if is_corrupt != (row.state == CORRUPT):
                self._found(row.key, is_corrupt)

        return ObjectBlobReader(row, self._store, report)

    def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        """Return the sizes of those that are stored."""
        wanted = [check_digest(digest, "digests") for digest in digests]
        rows = self._database.read(lambda connection: objects.load_stored(connection, wanted))
        return {row.digest: row.size_bytes for row in rows}

    def touch(self, digests: Iterable[str]) -> Mapping[str, int]:
        """Return the sizes of those that are stored, which are young from now on."""
        wanted = [check_digest(digest, "digests") for digest in digests]
        found: dict[str, int] = {}

        def act(connection: Connection, some: list[str]) -> list[ObjectRow]:
            rows = objects.load_stored(connection, some)
            self._make_young(connection, rows)
            return rows

        # Others write meanwhile.
        for first in range(0, len(wanted), _PAGE_BLOBS):
            some = wanted[first : first + _PAGE_BLOBS]
            rows = self._database.write(partial(act, some=some))
            found.update((row.digest, row.size_bytes) for row in rows)
        return found

    def scan(self, prefix: str = "") -> Iterator[StoredBlob]:
        """List all blobs, or those that begin with two digits."""
        self._elapsed.advance()
        after = prefix
        while page := self._database.read(partial(self._page, after=after)):
            for blob in page:
                if not blob.digest.startswith(prefix):
                    return
                yield blob
            after = page[-1].digest

    def remove_if_old(self, digest: str, grace_s: float) -> int | None:
        """Let the blob go unless it is young; its object goes later."""
        check_digest(digest, "digest")

        def act(connection: Connection) -> int | None:
            row = objects.load_blob(connection, digest)
            if row is None:
                return None
            if not is_old_enough(self._elapsed.now_s(connection) - row.since_s, grace_s):
                return None
            objects.doom(connection, row, self._elapsed.stamp_s(connection))
            return row.size_bytes

        return self._database.write(act)

    def usage_bytes(self) -> int:
        """Return the size of all blobs."""
        return self._database.read(objects.blob_bytes)

    def purge(self) -> None:
        """Give uploads up that nobody goes on with; remove objects that count no more."""
        self._elapsed.advance()
        while self._database.write(self._doom_abandoned):
            pass
        while rows := self._database.read(self._removable):
            self._store.delete([row.key for row in rows])
            self._database.write(partial(objects.forget, rows=rows))

    def _find(self, digest: str) -> ObjectRow | None:
        check_digest(digest, "digest")
        return self._database.read(lambda connection: objects.load_blob(connection, digest))

    def _page(self, connection: Connection, after: str) -> list[StoredBlob]:
        now_s = self._elapsed.now_s(connection)
        return [
            StoredBlob(row.digest, row.size_bytes, now_s - row.since_s)
            for row in objects.load_page(connection, after, _PAGE_BLOBS)
        ]

    def _make_young(self, connection: Connection, rows: list[ObjectRow]) -> None:
        since_s = self._elapsed.stamp_s(connection)
        older = [row._replace(since_s=since_s) for row in rows if row.since_s < since_s]
        objects.save(connection, older)

    def _register(self, key: str, digest: str, size_bytes: int) -> None:
        """Make an object that is whole the blob, unless that is stored already."""

        def act(connection: Connection) -> None:
            row = objects.load(connection, key)
            if row is None or row.state != ARRIVING:
                raise Unavailable("the upload took too long and was given up; begin it again")
            since_s = self._elapsed.stamp_s(connection)
            before = objects.load_blob(connection, digest)
            if before is not None and before.state == STORED:
                self._make_young(connection, [before])
                objects.doom(connection, row, since_s)
                return
            if before is not None:
                objects.doom(connection, before, since_s)
            objects.save(connection, [ObjectRow(key, digest, size_bytes, STORED, since_s)])

        self._database.write(act)

    def _give_up(self, key: str) -> None:
        """Doom the object of an upload that ended without becoming a blob."""

        def act(connection: Connection) -> None:
            row = objects.load(connection, key)
            if row is not None and row.state == ARRIVING:
                objects.doom(connection, row, self._elapsed.stamp_s(connection))

        # What fails here is found when it is old.
        with suppress(PhalanxError):
            self._database.write(act)

    def _found(self, key: str, is_corrupt: bool) -> None:
        """Note that a reader found a blob corrupt, or whole after all."""

        def act(connection: Connection) -> None:
            row = objects.load(connection, key)
            if row is not None and row.digest:
                state = CORRUPT if is_corrupt else STORED
                objects.save(connection, [row._replace(state=state)])

        self._database.write(act)

    def _doom_abandoned(self, connection: Connection) -> int:
        until_s = self._elapsed.now_s(connection) - ARRIVING_S
        rows = objects.load_older(connection, ARRIVING, until_s, _OBJECTS_AT_ONCE)
        for row in rows:
            objects.doom(connection, row, self._elapsed.stamp_s(connection))
        return len(rows)

    def _removable(self, connection: Connection) -> list[ObjectRow]:
        until_s = self._elapsed.now_s(connection) - DOOMED_S
        return objects.load_older(connection, DOOMED, until_s, _OBJECTS_AT_ONCE)


class ObjectBlobWriter:
    """A BlobWriter that hashes while it sends.

    ``register(key, digest, size)`` is called when the object is whole, ``give_up(key)`` when it
    will never be.
    """

    def __init__(
        self,
        key: str,
        writer: ObjectWriter,
        register: Callable[[str, str, int], None],
        give_up: Callable[[str], None],
    ) -> None:
        self._key = key
        self._writer = writer
        self._register = register
        self._give_up = give_up
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._is_over = False

    def write(self, chunk: Buffer) -> None:
        """Take the next bytes."""
        self._hash.update(chunk)
        self._size_bytes += len(chunk)
        self._writer.write(chunk)

    def commit(self, expected_digest: str = "", expected_bytes: int = -1) -> StoredBlob:
        """Make the blob durable and visible."""
        digest = self._hash.hexdigest()
        check_upload(digest, self._size_bytes, expected_digest, expected_bytes)
        self._writer.close()
        self._register(self._key, digest, self._size_bytes)
        self._is_over = True
        return StoredBlob(digest, self._size_bytes)

    def abort(self) -> None:
        """Let what was sent count for nothing."""
        if not self._is_over:
            self._is_over = True
            self._give_up(self._key)
            self._writer.abort()


class ObjectBlobReader(CheckedReader):
    """A BlobReader that reads ahead; ``report`` is that of ``CheckedReader``."""

    def __init__(
        self, row: ObjectRow, store: ObjectStore, report: Callable[[str, bool], None]
    ) -> None:
        super().__init__(row.digest, row.size_bytes, report)
        self._key = row.key
        self._store = store
        self._held = b""
        self._held_from = 0
        self._wanted_to = 0

    def _read(self, offset: int, length: int, chunk_bytes: int) -> Iterator[bytes]:
        self._wanted_to = offset + length
        return super()._read(offset, length, chunk_bytes)

    def fetch(self, offset: int, length: int) -> bytes:
        """Read from what was read ahead, or from the store."""
        at = offset - self._held_from
        if not 0 <= at < len(self._held):
            ahead = max(length, min(_READ_BYTES, self._wanted_to - offset))
            self._held = self._store.read(self._key, offset, ahead) or b""
            self._held_from, at = offset, 0
        return self._held[at : at + length]

    def close(self) -> None:
        """Let go of what was read ahead."""
        self._held = b""
