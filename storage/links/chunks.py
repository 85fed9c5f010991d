"""Chunks of linked data sets, as GetBlob gives them: made when asked for, and checked.

A chunk goes out only after its bytes have the digest that it was asked for by. So whatever became
of the user's files meanwhile, nobody ever gets other rows than those that were linked.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from phalanx.data.manifest import DatasetManifest
from phalanx.errors import DataLoss, FailedPrecondition, PhalanxError, Unavailable
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.catalog import VersionName
from storage.core.keys import invalid
from storage.interfaces import Backend
from storage.links.maker import Makers, is_transient
from storage.links.manifests import LinkedManifest, ManifestCache, demand_allowed, parsed
from storage.service.manifests import read_manifest
from storage.service.operations import LINKED_DATA_LOST, Operations

MESSAGE_BYTES = 1024 * 1024
MADE_BYTES = 128 * 1024 * 1024
"""Made chunks are kept up to this, for whoever asks next and for those who take them slowly."""

_SIGN_OF_LIFE_S = 2.0


@dataclass(frozen=True)
class _Problem:
    """Why one data set did not give a chunk; ``where`` says which rows it is, if that is known."""

    dataset: dataset_pb.Dataset
    where: str
    error: PhalanxError


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
        self._roots = tuple(roots)
        self.makers = Makers(self._roots, processes)
        self._pool = ThreadPoolExecutor(processes, "storage-links")
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._made_bytes = 0
        self._making: dict[str, asyncio.Task[bytes]] = {}
        self._manifests = ManifestCache(self._load)

    async def check(self, manifest: DatasetManifest) -> None:
        """Look whether the chunks of a manifest can be made: the first of each split is.

        Raises FailedPrecondition naming a file that cannot be read, InvalidArgument.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._pool, lambda: self._check(manifest))

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
        work = self._making.get(digest)
        if work is None:
            work = asyncio.create_task(self._make(digest, sources))
            self._making[digest] = work
            work.add_done_callback(lambda done: self._ended(digest, done))
        done, _ = await asyncio.wait([work], timeout=_SIGN_OF_LIFE_S)
        return work.result() if done else None

    def _ended(self, digest: str, work: "asyncio.Task[bytes]") -> None:
        self._making.pop(digest, None)
        # Also where nobody waits any more.
        if work.cancelled() or work.exception() is not None:
            return
        content = work.result()
        self._made[digest] = content
        self._made_bytes += len(content)
        while self._made_bytes > MADE_BYTES:
            _, oldest = self._made.popitem(last=False)
            self._made_bytes -= len(oldest)

    async def _make(self, digest: str, sources: Sequence[dataset_pb.Dataset]) -> bytes:
        started_s = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            content = await loop.run_in_executor(
                self._pool, lambda: self._from_any(digest, sources)
            )
        except BaseException as error:
            self._operations.observe("make_chunk", started_s, error)
            raise
        self._operations.observe("make_chunk", started_s, None)
        return content

    def _from_any(self, digest: str, sources: Sequence[dataset_pb.Dataset]) -> bytes:
        """Make a chunk from the first data set that still gives it."""
        problems = []
        for dataset in sources:
            where = ""
            try:
                linked = self._manifests.get(dataset.manifest_digest)
                place = linked.places[digest]
                where = (
                    f" (rows {place.first} to {place.stop - 1} of its {place.split} split's files)"
                )
                linked.demand_allowed(self._roots)
                return self._from_one(digest, linked)
            except PhalanxError as error:
                problems.append(_Problem(dataset, where, error))
        raise _explained(digest, problems) from problems[0].error

    def _from_one(self, digest: str, linked: LinkedManifest) -> bytes:
        place = linked.places[digest]
        content = self.makers.make(linked.plan, place.split, place.first, place.stop)
        size_bytes = linked.sizes[digest]
        if len(content) != size_bytes or hashlib.sha256(content).hexdigest() != digest:
            raise FailedPrecondition(
                f"the rows in {linked.plan.files} are not what they were when it was linked",
                reason="LINKED_FILE_CHANGED",
            )
        return content

    def _check(self, manifest: DatasetManifest) -> None:
        demand_allowed(manifest, self._roots)
        linked = parsed(manifest, self._roots)
        self.makers.check(linked.plan)
        for chunks in manifest.splits.values():
            self._from_one(chunks[0].digest, linked)

    def _load(self, manifest_digest: str) -> LinkedManifest:
        """Read a manifest that was registered; damage to its blob is counted."""
        started_s = time.perf_counter()
        try:
            manifest = read_manifest(self._backend.blobs, manifest_digest)
        except PhalanxError as error:
            self._operations.observe("read_manifest", started_s, error)
            raise
        self._operations.observe("read_manifest", started_s, None)
        return parsed(manifest, self._roots)


def _demand_inside(request: pb.GetBlobRequest, end: int, size_bytes: int) -> None:
    if not 0 <= request.offset <= end <= size_bytes:
        raise invalid(
            "offset",
            f"bytes {request.offset} to {end} are not all inside blob {request.digest} of "
            f"{size_bytes} bytes",
        )


def _explained(digest: str, problems: Sequence[_Problem]) -> PhalanxError:
    """What to tell whoever asked for a chunk that no data set gives."""
    transient = next((problem for problem in problems if is_transient(problem.error)), None)
    problem = transient or problems[0]
    dataset, cause = problem.dataset, problem.error
    name = VersionName(dataset.namespace, dataset.name, dataset.version)
    text = f"chunk {digest[:12]} of data set {name}{problem.where} cannot be made: {cause.message}"
    if transient:
        return Unavailable(text, reason=cause.reason)
    return DataLoss(
        f"{text}. Bring the file back as it was, or add the data set again, then "
        "`phalanx retry` the jobs that failed",
        reason=LINKED_DATA_LOST,
        details={"dataset": str(name), "cause": cause.reason},
    )
