"""Uploads, downloads and compositions of blobs."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

from phalanx.errors import (
    DeadlineExceeded,
    NotFound,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.keys.caller import current_caller
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.keys import check_digest, invalid
from storage.interfaces import BlobReader, BlobStore, BlobWriter, StoredBlob
from storage.links.chunks import LinkedChunks
from storage.service.operations import Operations, made, settled, to_the_end

CHUNK_BYTES = 1024 * 1024
"""Size of the messages of a download."""

DIGESTS_PER_CALL = 50_000
_PIECES_PER_CALL = 10_000
_UPLOADS = 64
_IDLE_S = 60.0
_PATIENCE_S = 2.0
"""An upload that said nothing for so long makes room for another where all places are taken."""

LONGEST_S = 24 * 3600.0
"""An upload that takes longer is ended, however much of it still comes: it holds a place and room
that nobody else can have."""


class BlobCalls:
    """The calls of StorageService that move blobs."""

    def __init__(
        self,
        blobs: BlobStore,
        operations: Operations,
        links: LinkedChunks,
        person_bytes_max: int = 0,
    ) -> None:
        """``person_bytes_max`` is what one upload of a person may have; 0: as much as it will."""
        self._blobs = blobs
        self._person_bytes_max = person_bytes_max
        self._links = links
        self._operations = operations
        self._uploads = 0
        # Uploads whose next message is waited for, and since when; the longest wait is first.
        self._silent: dict[asyncio.Timeout, float] = {}

    async def put(self, requests: AsyncIterator[pb.PutBlobRequest]) -> StoredBlob:
        """Take an upload; what came of a broken one is forgotten."""
        # Whoever has sent nothing yet takes nobody's place.
        first = await self._next(requests, has_begun=False)
        if self._uploads >= _UPLOADS and not self._make_room():
            raise Unavailable(
                f"{_UPLOADS} uploads are running; try again when some have ended",
                reason="TOO_MANY_UPLOADS",
                retry_after_s=1.0,
            )
        self._uploads += 1
        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(LONGEST_S) as longest:
                stored = await self._put(first, requests)
        except TimeoutError as error:
            self._operations.observe("put_blob", started_s, error)
            if not longest.expired():
                raise  # files and connections have times of their own
            raise DeadlineExceeded(
                f"the upload did not end within {LONGEST_S / 3600:g} h", reason="UPLOAD_TOO_LONG"
            ) from None
        except BaseException as error:
            self._operations.observe("put_blob", started_s, error)
            raise
        finally:
            self._uploads -= 1
        self._operations.observe("put_blob", started_s, None)
        return stored

    async def _put(
        self, first: pb.PutBlobRequest | None, requests: AsyncIterator[pb.PutBlobRequest]
    ) -> StoredBlob:
        if first is None:
            raise invalid("chunk", "an upload has at least one message, empty for an empty blob")
        if first.expected_digest:
            check_digest(first.expected_digest, "expected_digest")
        room = _Room(self._person_bytes_max if current_caller().role is not None else 0)
        room.check(first.expected_bytes)
        room.take(first.chunk)
        loop = asyncio.get_running_loop()
        pool = self._operations.blob_pool
        # 0 is what a client sends that does not set the field: nobody announces an empty blob.
        expected_bytes = first.expected_bytes if first.expected_bytes > 0 else -1
        writer = await made(
            pool, lambda: self._blobs.writer(expected_bytes), lambda new: new.abort()
        )
        work: asyncio.Future[Any] = loop.run_in_executor(pool, writer.write, first.chunk)
        try:
            # Reads the next message while a thread hashes and writes the one before.
            while (request := await self._next(requests)) is not None:
                room.take(request.chunk)
                await asyncio.shield(work)
                work = loop.run_in_executor(pool, writer.write, request.chunk)
            await asyncio.shield(work)
            work = loop.run_in_executor(pool, writer.commit, first.expected_digest, expected_bytes)
            stored: StoredBlob = await asyncio.shield(work)
            return stored
        except BaseException:
            await self._abandon(writer, work)
            raise

    async def _next(
        self, requests: AsyncIterator[pb.PutBlobRequest], *, has_begun: bool = True
    ) -> pb.PutBlobRequest | None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(_IDLE_S) as silence:
                if has_begun:
                    self._silent[silence] = began_s
                try:
                    return await anext(requests, None)
                finally:
                    self._silent.pop(silence, None)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no part of the upload came for {loop.time() - began_s:.0f} s; begin it again",
                reason="UPLOAD_IDLE",
            ) from None

    def _make_room(self) -> bool:
        """End the upload that has been silent for longest, if it is for long enough."""
        now_s = asyncio.get_running_loop().time()
        for silence, since_s in self._silent.items():
            if now_s - since_s >= _PATIENCE_S:
                del self._silent[silence]
                silence.reschedule(now_s)
                return True
            break
        return False

    async def _abandon(self, writer: BlobWriter, work: asyncio.Future[Any]) -> None:
        """Remove what was written, once no thread is at it any more, whatever is cancelled."""

        async def remove() -> None:
            await settled(work)
            pool = self._operations.blob_pool
            await asyncio.get_running_loop().run_in_executor(pool, writer.abort)

        await to_the_end(remove())

    async def get(self, request: pb.GetBlobRequest) -> AsyncGenerator[pb.GetBlobResponse]:
        """Yield a blob, or a part of it."""
        try:
            reader = await self._open(request.digest)
        except NotFound:
            is_linked = False
            async with aclosing(self._links.get(request)) as made:
                async for response in made:
                    is_linked = True
                    yield response
            if not is_linked:
                raise
            return
        try:
            length = request.length or reader.size_bytes - request.offset
            chunks = reader.chunks(request.offset, length, CHUNK_BYTES)
            is_first = True
            stream = self._operations.stream("get_blob", chunks, self._operations.blob_pool)
            async with aclosing(stream) as read:
                async for chunk in read:
                    size_bytes = reader.size_bytes if is_first else 0
                    is_first = False
                    yield pb.GetBlobResponse(chunk=chunk, size_bytes=size_bytes)
            if is_first:
                yield pb.GetBlobResponse(size_bytes=reader.size_bytes)
        finally:
            reader.close()

    async def _open(self, digest: str) -> BlobReader:
        started_s = time.perf_counter()
        pool = self._operations.blob_pool
        try:
            return await made(pool, lambda: self._blobs.open(digest), lambda new: new.close())
        except PhalanxError as error:
            self._operations.observe("get_blob", started_s, error)
            raise

    async def check(self, request: pb.CheckBlobsRequest) -> pb.CheckBlobsResponse:
        """Say which digests are missing; the others are young from now on."""
        digests = request.digests
        if len(digests) > DIGESTS_PER_CALL:
            raise invalid("digests", f"{len(digests)}; ask for at most {DIGESTS_PER_CALL} at once")
        found = await self._operations.state("check_blobs", lambda: self._blobs.touch(digests))
        missing = dict.fromkeys(digest for digest in digests if digest not in found)
        return pb.CheckBlobsResponse(missing=missing)

    async def compose(self, request: pb.ComposeBlobRequest) -> StoredBlob:
        """Make a blob of pieces; every blob that it is cut from is verified first."""
        if len(request.pieces) > _PIECES_PER_CALL:
            raise invalid("pieces", f"{len(request.pieces)}; at most {_PIECES_PER_CALL}")
        for index, piece in enumerate(request.pieces):
            if piece.WhichOneof("source") is None:
                raise invalid(f"pieces[{index}]", "is empty; give inline bytes or a slice")
        return await self._operations.blobs(
            "compose_blob", lambda: compose(self._blobs, request.pieces)
        )


class _Room:
    """Counts what an upload brings."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0

    def take(self, chunk: bytes) -> None:
        """Raise ResourceExhausted where the upload gets too large with this."""
        self._taken_bytes += len(chunk)
        self.check(self._taken_bytes)

    def check(self, size_bytes: int) -> None:
        """Raise ResourceExhausted where this is too much."""
        if 0 < self._limit_bytes < size_bytes:
            raise ResourceExhausted(
                f"one upload may have {self._limit_bytes} bytes; an administrator may allow more "
                "(--upload-bytes of storage)",
                reason="UPLOAD_TOO_LARGE",
                details={"limit": str(self._limit_bytes)},
            )


def compose(blobs: BlobStore, pieces: Iterable[pb.BlobPiece]) -> StoredBlob:
    """Store the pieces one after another as one blob, never holding more than a chunk."""
    readers: dict[str, BlobReader] = {}
    writer = blobs.writer()
    try:
        for piece in pieces:
            if piece.HasField("inline"):
                writer.write(piece.inline)
                continue
            cut = piece.slice
            reader = readers.get(cut.digest)
            if reader is None:
                reader = readers[cut.digest] = blobs.open(cut.digest)
                # A slice alone cannot be checked, and damage would get a digest of its own.
                reader.verify()
            length = cut.length or reader.size_bytes - cut.offset
            for chunk in reader.chunks(cut.offset, length, CHUNK_BYTES):
                writer.write(chunk)
        return writer.commit()
    finally:
        writer.abort()
        for reader in readers.values():
            reader.close()
