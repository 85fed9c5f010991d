"""StorageService over a back end."""

from collections.abc import AsyncIterator
from contextlib import aclosing

from phalanx.keys.caller import Service, current_caller
from phalanx.keys.policy import TASKS, check_append
from phalanx.rpc.types import ServicerContext
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1 import storage_service_pb2_grpc as pb_grpc
from storage.interfaces import Backend
from storage.links.chunks import LinkedChunks
from storage.service.blob_calls import BlobCalls
from storage.service.code_limits import CodeLimits
from storage.service.collection import Collector
from storage.service.holds import Holds
from storage.service.open_streams import OpenStreams
from storage.service.operations import Operations
from storage.service.scrubbing import Scrubber
from storage.service.snapshot_calls import SnapshotCalls

PIN_HOLDERS_MAX = 1000


class StorageServicer(pb_grpc.StorageServiceServicer):
    """Decodes, has the back end work in a thread, encodes."""

    def __init__(
        self,
        backend: Backend,
        operations: Operations,
        collector: Collector,
        links: LinkedChunks,
        holds: Holds,
        scrubber: Scrubber,
        person_bytes_max: int = 0,
        code_bytes_max: int = 0,
    ) -> None:
        self._backend = backend
        self._operations = operations
        self._collector = collector
        self._blob_calls = BlobCalls(backend.blobs, operations, links, person_bytes_max)
        self._code = CodeLimits(backend, code_bytes_max)
        self._snapshot_calls = SnapshotCalls(backend.snapshots, operations, holds)
        self._scrubber = scrubber
        self._appending: OpenStreams[pb.AppendJournalsRequest] = OpenStreams()

    def end_streams(self) -> None:
        """The server stops: who has a stream open finds that it ended, and opens another one."""
        self._appending.end()

    async def PutBlob(
        self, request_iterator: AsyncIterator[pb.PutBlobRequest], context: ServicerContext
    ) -> pb.PutBlobResponse:
        """Store an upload."""
        stored = await self._blob_calls.put(request_iterator)
        return pb.PutBlobResponse(digest=stored.digest, size_bytes=stored.size_bytes)

    async def GetBlob(
        self, request: pb.GetBlobRequest, context: ServicerContext
    ) -> AsyncIterator[pb.GetBlobResponse]:
        """Stream a blob."""
        async with aclosing(self._blob_calls.get(request)) as responses:
            async for response in responses:
                yield response

    async def CheckBlobs(
        self, request: pb.CheckBlobsRequest, context: ServicerContext
    ) -> pb.CheckBlobsResponse:
        """Say which digests are missing."""
        return await self._blob_calls.check(request)

    async def ComposeBlob(
        self, request: pb.ComposeBlobRequest, context: ServicerContext
    ) -> pb.ComposeBlobResponse:
        """Make a blob of pieces."""
        stored = await self._blob_calls.compose(request)
        return pb.ComposeBlobResponse(digest=stored.digest, size_bytes=stored.size_bytes)

    async def AppendJournal(
        self, request: pb.AppendJournalRequest, context: ServicerContext
    ) -> pb.AppendJournalResponse:
        """Append records."""
        return await self._append(request)

    async def AppendJournals(
        self, request_iterator: AsyncIterator[pb.AppendJournalsRequest], context: ServicerContext
    ) -> AsyncIterator[pb.AppendJournalsResponse]:
        """Append records again and again."""
        requests = aiter(request_iterator)
        while (request := await self._appending.next(requests)) is not None:
            yield pb.AppendJournalsResponse(appended=await self._append(request.append))

    async def _append(self, request: pb.AppendJournalRequest) -> pb.AppendJournalResponse:
        check_append(current_caller(), request)
        await self._check_root_of(request.stream, "stream")
        next_sequence = await self._operations.state(
            "append_journal", lambda: self._append_news(request)
        )
        return pb.AppendJournalResponse(next_sequence=next_sequence)

    def _append_news(self, request: pb.AppendJournalRequest) -> int:
        if self._code.news(request):
            return self._backend.journals.append(request)
        return self._code.next_sequence()

    async def ReadJournal(
        self, request: pb.ReadJournalRequest, context: ServicerContext
    ) -> AsyncIterator[pb.ReadJournalResponse]:
        """Stream records."""
        await self._check_root_of(request.stream, "stream")
        responses = self._backend.journals.read(request)
        pool = self._operations.state_pool
        stream = self._operations.stream("read_journal", responses, pool)
        async with aclosing(stream) as read:
            async for response in read:
                yield response

    async def _check_root_of(self, stream: str, field: str) -> None:
        """Of results of tasks, whose journals these are, let aggregators have those of their own
        job. The same is said of what keeps them, as JOB/ATTEMPT."""
        caller = current_caller()
        is_aggregator = Service.AGGREGATOR in caller.services
        if is_aggregator and Service.CONTROL not in caller.services and stream.startswith(TASKS):
            job_id = stream.removeprefix(TASKS).partition("/")[0]
            await self._operations.state(
                "check_root", lambda: self._backend.jobs.check_root(job_id, caller, field)
            )

    async def TruncateJournal(
        self, request: pb.TruncateJournalRequest, context: ServicerContext
    ) -> pb.TruncateJournalResponse:
        """Drop records."""
        await self._operations.state(
            "truncate_journal", lambda: self._backend.journals.truncate(request)
        )
        return pb.TruncateJournalResponse()

    async def DeleteJournal(
        self, request: pb.DeleteJournalRequest, context: ServicerContext
    ) -> pb.DeleteJournalResponse:
        """Remove a stream."""
        await self._operations.state(
            "delete_journal", lambda: self._backend.journals.delete(request)
        )
        return pb.DeleteJournalResponse()

    async def AcquireLease(
        self, request: pb.AcquireLeaseRequest, context: ServicerContext
    ) -> pb.AcquireLeaseResponse:
        """Take a lease if the rules allow it."""
        return await self._operations.state(
            "acquire_lease", lambda: self._backend.leases.acquire(request)
        )

    async def RenewLease(
        self, request: pb.RenewLeaseRequest, context: ServicerContext
    ) -> pb.RenewLeaseResponse:
        """Raise the counter of a lease."""
        row = await self._operations.state(
            "renew_lease", lambda: self._backend.leases.renew(request)
        )
        return pb.RenewLeaseResponse(lease=row.message(request.name))

    async def ReleaseLease(
        self, request: pb.ReleaseLeaseRequest, context: ServicerContext
    ) -> pb.ReleaseLeaseResponse:
        """Free a lease."""
        await self._operations.state("release_lease", lambda: self._backend.leases.release(request))
        return pb.ReleaseLeaseResponse()

    async def GetLease(
        self, request: pb.GetLeaseRequest, context: ServicerContext
    ) -> pb.GetLeaseResponse:
        """Show a lease."""
        row = await self._operations.state(
            "get_lease", lambda: self._backend.leases.get(request.name)
        )
        return pb.GetLeaseResponse(lease=row.message(request.name) if row else None)

    async def RaiseTerm(
        self, request: pb.RaiseTermRequest, context: ServicerContext
    ) -> pb.RaiseTermResponse:
        """Raise a job's term."""
        term = await self._operations.state(
            "raise_term", lambda: self._backend.jobs.raise_term(request)
        )
        return pb.RaiseTermResponse(term=term)

    async def GetJobRow(
        self, request: pb.GetJobRowRequest, context: ServicerContext
    ) -> pb.GetJobRowResponse:
        """Show a job's row."""
        return await self._operations.state(
            "get_job_row", lambda: self._backend.jobs.get_row(request.job_id)
        )

    async def CommitCheckpoint(
        self, request: pb.CommitCheckpointRequest, context: ServicerContext
    ) -> pb.CommitCheckpointResponse:
        """Register a part of a checkpoint."""
        caller = current_caller()
        return await self._operations.state(
            "commit_checkpoint", lambda: self._backend.jobs.commit(request, caller)
        )

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: ServicerContext
    ) -> pb.ListCheckpointsResponse:
        """List whole checkpoints."""
        manifests = await self._operations.state(
            "list_checkpoints", lambda: self._backend.jobs.list_checkpoints(request.job_id)
        )
        return pb.ListCheckpointsResponse(checkpoints=manifests)

    async def DeleteJobRow(
        self, request: pb.DeleteJobRowRequest, context: ServicerContext
    ) -> pb.DeleteJobRowResponse:
        """Remove what is kept of a job."""
        await self._operations.state(
            "delete_job_row", lambda: self._backend.jobs.delete_row(request)
        )
        return pb.DeleteJobRowResponse()

    async def SetPins(
        self, request: pb.SetPinsRequest, context: ServicerContext
    ) -> pb.SetPinsResponse:
        """Replace the pins of a holder."""
        await self._check_root_of(f"{TASKS}{request.holder}", "holder")
        await self._operations.state("set_pins", lambda: self._set_pins(request))
        return pb.SetPinsResponse()

    def _set_pins(self, request: pb.SetPinsRequest) -> None:
        self._code.check_pins(request)
        self._backend.catalog.set_pins(request)

    async def ListPins(
        self, request: pb.ListPinsRequest, context: ServicerContext
    ) -> pb.ListPinsResponse:
        """Say who holds pins."""
        holders = await self._operations.state(
            "list_pins",
            lambda: self._backend.catalog.pin_holders(request.after_holder, PIN_HOLDERS_MAX),
        )
        return pb.ListPinsResponse(holders=holders)

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: ServicerContext
    ) -> pb.CollectGarbageResponse:
        """Remove blobs that nothing refers to."""
        return await self._collector.collect(request)

    async def ReadSnapshot(
        self, request: pb.ReadSnapshotRequest, context: ServicerContext
    ) -> AsyncIterator[pb.ReadSnapshotResponse]:
        """Stream all rows, and hold what they name."""
        async with aclosing(self._snapshot_calls.read()) as messages:
            async for message in messages:
                yield message

    async def Scrub(
        self, request: pb.ScrubRequest, context: ServicerContext
    ) -> AsyncIterator[pb.ScrubResponse]:
        """Read everything that is stored."""
        async with aclosing(self._scrubber.scrub()) as messages:
            async for message in messages:
                yield message
