"""Chunks of linked data sets, as GetBlob gives them: made when asked for, and checked.

A chunk goes out only after its bytes have the digest that it was asked for by. So whatever became
of the user's files meanwhile, nobody ever gets other rows than those that were linked.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from phalanx.data.manifest import DatasetManifest
from phalanx.errors import PhalanxError
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.keys import invalid
from storage.interfaces import Backend
from storage.links.maker import Makers
from storage.links.making import Making
from storage.links.slots import Slots
from storage.service.manifests import read_manifest
from storage.service.operations import Operations

MESSAGE_BYTES = 1024 * 1024
MADE_BYTES = 128 * 1024 * 1024
"""Made chunks are kept up to this, for whoever asks next and for those who take them slowly."""

_SIGN_OF_LIFE_S = 2.0


class LinkedChunks:
    """Use it in one event loop; ``roots`` are the folders from which files may be linked.

    ``processes`` chunks are made at a time. Memory holds MADE_BYTES of chunks and one for each
    process: who takes a chunk slowly has it made again rather than kept.
    """

    def __init__(
        self, backend: Backend, operations: Operations, roots: Sequence[str], processes: int
    ) -> None:
        self._backend = backend
        self._operations = operations
        self._pool = ThreadPoolExecutor(processes, "storage-links")
        makers = Makers(roots, processes)
        self.making = Making(roots, makers, self._pool, Slots(processes), self._load)
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._made_bytes = 0
        self._under_way: dict[str, asyncio.Task[bytes]] = {}

    @property
    def makers(self) -> Makers:
        """The processes that make chunks."""
        return self.making.makers

    async def check(self, manifest: DatasetManifest) -> None:
        """Look whether the chunks of a manifest can be made: the first of each split is.

        Raises FailedPrecondition naming a file that cannot be read, InvalidArgument.
        """
        await self.making.check(manifest)

    async def get(self, request: pb.GetBlobRequest) -> AsyncGenerator[pb.GetBlobResponse]:
        """Yield a chunk or a part of it; nothing at all where no data set links it.

        While it is being made there are empty messages, by which the caller knows that it comes.
        Raises DataLoss (LINKED_DATA_LOST) where its file is not any more what it was.
        """
        digest = request.digest
        catalog = self._backend.catalog
        sources = await self._operations.blobs(
            "find_linked", lambda: catalog.datasets_linking(digest)
        )
        if not sources:
            return
        if request.offset < 0 or request.length < 0:
            raise invalid("offset", f"bytes {request.offset} on are not all inside any blob")
        position, end = request.offset, None
        while position != end:
            content = await self._wait(digest, sources)
            if content is None:
                yield pb.GetBlobResponse()
                continue
            size_bytes = 0
            if end is None:
                # Of what the digest is of: a manifest may tell any size.
                size_bytes = len(content)
                end = request.offset + request.length if request.length else size_bytes
                _demand_inside(request, end, size_bytes)
            # Not held while the caller takes it: it may take its time.
            piece = content[position : min(end, position + MESSAGE_BYTES)]
            del content
            yield pb.GetBlobResponse(chunk=piece, size_bytes=size_bytes)
            position += len(piece)

    def close(self) -> None:
        """End the processes and whatever waits for them."""
        self.makers.end()
        self._pool.shutdown(cancel_futures=True)
        self.makers.close()

    async def _wait(self, digest: str, sources: Sequence[dataset_pb.Dataset]) -> bytes | None:
        """Return the chunk, or None if it takes longer than the caller may be left alone."""
        made = self._made.get(digest)
        if made is not None:
            self._made.move_to_end(digest)
            return made
        work = self._under_way.get(digest)
        if work is None:
            work = asyncio.create_task(self._make(digest, sources))
            self._under_way[digest] = work
            work.add_done_callback(lambda done: self._ended(digest, done))
        done, _ = await asyncio.wait([work], timeout=_SIGN_OF_LIFE_S)
        return work.result() if done else None

    def _ended(self, digest: str, work: "asyncio.Task[bytes]") -> None:
        self._under_way.pop(digest, None)
        # Also where nobody waits any more.
        if work.cancelled() or work.exception() is not None:
            return
        content = work.result()
        self._made[digest] = content
        self._made_bytes += len(content)
        while self._made_bytes > MADE_BYTES:
            _, oldest = self._made.popitem(last=False)
            self._made_bytes -= len(oldest)

    async def _make(self, digest: str, datasets: Sequence[dataset_pb.Dataset]) -> bytes:
        started_s = time.perf_counter()
        try:
            content = await self.making.make(digest, datasets)
        except BaseException as error:
            self._operations.observe("make_chunk", started_s, error)
            raise
        self._operations.observe("make_chunk", started_s, None)
        return content

    def _load(self, manifest_digest: str) -> DatasetManifest:
        """Read a manifest that was registered; damage to its blob is counted."""
        started_s = time.perf_counter()
        try:
            manifest = read_manifest(self._backend.blobs, manifest_digest)
        except PhalanxError as error:
            self._operations.observe("read_manifest", started_s, error)
            raise
        self._operations.observe("read_manifest", started_s, None)
        return manifest


def _demand_inside(request: pb.GetBlobRequest, end: int, size_bytes: int) -> None:
    if not 0 <= request.offset <= end <= size_bytes:
        raise invalid(
            "offset",
            f"bytes {request.offset} to {end} are not all inside blob {request.digest} of "
            f"{size_bytes} bytes",
        )
