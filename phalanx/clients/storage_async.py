"""The asyncio client of storage."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import grpc.aio

from phalanx.clients.blob_sources import BlobSource
from phalanx.clients.blob_transfers import STREAM_TIMEOUT_S, BlobTransfers
from phalanx.clients.journal_appender import JournalAppender
from phalanx.errors import Aborted, InvalidArgument, NotFound
from phalanx.ids import new_request_id
from phalanx.keys.caller import Service
from phalanx.rpc.channel import ATTEMPTS, MESSAGE_LIMIT_BYTES, call_with_retry, open_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.replicas import blame
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import dataset_service_pb2_grpc as dataset_grpc
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import model_service_pb2_grpc as model_grpc
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1 import storage_service_pb2_grpc as pb_grpc

CALL_TIMEOUT_S = 10.0
APPEND_LIMIT_BYTES = MESSAGE_LIMIT_BYTES - 64 * 1024
"""How much one append can carry; it cannot be split, since all of it is appended or nothing."""

# Garbage collection and composing read or list much before they answer.
_LONG_CALL_TIMEOUT_S = 600.0
_END = 2**62
_PAGE_RECORDS = 10_000


class BlobSize(NamedTuple):
    """A stored blob."""

    digest: str
    size_bytes: int


class Acquired(NamedTuple):
    """The outcome of trying to take a lease, and the lease as it is afterwards."""

    acquired: bool
    lease: pb.Lease


class StorageClient:
    """Speaks to storage at ``address`` (HOST:PORT); use it in one event loop and close it.

    Several addresses, separated by commas, are those of replicas: when one dies or is silent, what
    is retried goes on with the next, uploads from their beginning and downloads where they were.

    With ``keys`` it is encrypted; the certificate must be that of ``service``, or of the host.

    Every call has a deadline: its ``timeout_s``, or that of the client. UNAVAILABLE is retried
    within it, at most ``attempts`` times, where doing a thing twice is harmless; that is all but
    appending "whatever is next" and uploading a one-way stream. Raises PhalanxError.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        attempts: int = ATTEMPTS,
        own_connection: bool = False,
        keys: ClientKeys | None = None,
        service: Service | None = Service.STORAGE,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._channel: grpc.aio.Channel = open_channel(
            address, keys=keys, service=service, own_connection=own_connection
        )
        self._storage = pb_grpc.StorageServiceStub(self._channel)
        self._datasets = dataset_grpc.DatasetServiceStub(self._channel)
        self._models = model_grpc.ModelServiceStub(self._channel)
        self._blobs = BlobTransfers(
            self._storage, timeout_s, attempts, partial(blame, self._channel)
        )

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connection."""
        await self.close()

    async def close(self) -> None:
        """Close the connection; open calls are cancelled."""
        await self._channel.close()

    # Blobs

    async def put_blob(
        self,
        source: BlobSource,
        *,
        digest: str = "",
        check_first: bool = True,
        timeout_s: float | None = None,
    ) -> str:
        """Store ``source`` and return its digest; nothing is sent if it is stored already.

        ``digest`` is the SHA-256 if it is known: it need not be computed, and storage refuses
        anything else. ``check_first=False`` saves a question for content that is surely new.
        """
        return await self._blobs.put(
            source, digest=digest, check_first=check_first, timeout_s=timeout_s
        )

    async def get_blob(
        self, digest: str, offset: int = 0, length: int = 0, *, timeout_s: float | None = None
    ) -> bytes:
        """Return a blob (verified), or ``length`` bytes of it from ``offset``; 0: to its end."""
        request = pb.GetBlobRequest(digest=digest, offset=offset, length=length)
        return await self._blobs.get(request, timeout_s)

    async def get_blob_to(self, digest: str, path: Path, *, timeout_s: float | None = None) -> int:
        """Write a blob to ``path``, which appears whole or not at all; return its size."""
        return await self._blobs.get_to(digest, path, timeout_s)

    async def missing_blobs(self, digests: Iterable[str]) -> list[str]:
        """Return the digests that are not stored; the rest is no garbage for a while."""
        return await self._blobs.missing(list(digests))

    async def compose_blob(
        self, pieces: Sequence[pb.BlobPiece], *, timeout_s: float = _LONG_CALL_TIMEOUT_S
    ) -> BlobSize:
        """Make one blob of inline bytes and slices of stored blobs."""
        response = await self._call(
            self._storage.ComposeBlob, pb.ComposeBlobRequest(pieces=pieces), timeout_s
        )
        return BlobSize(response.digest, response.size_bytes)

    # Journals

    async def append_journal(
        self,
        stream: str,
        records: Sequence[bytes],
        *,
        expected_sequence: int = -1,
        fence: pb.Fence | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Append all records or none; return the sequence after the last, once they are durable.

        With ``expected_sequence`` (that of the first record) the call can be retried: if the answer
        to an attempt was lost, the records that it left are recognized. Raises Aborted
        (SEQUENCE_MISMATCH, STALE_GENERATION).
        """
        request = pb.AppendJournalRequest(
            stream=stream, expected_sequence=expected_sequence, records=records, fence=fence
        )
        if request.ByteSize() > APPEND_LIMIT_BYTES:
            raise InvalidArgument(
                f"{request.ByteSize()} bytes for journal {stream!r}; one append takes at most "
                f"{APPEND_LIMIT_BYTES}",
                reason="APPEND_TOO_LARGE",
            )
        counted = _Counted(self._storage.AppendJournal)
        attempts = self._attempts if expected_sequence >= 0 else 1
        try:
            response = await self._call(counted, request, timeout_s, attempts)
        except Aborted as error:
            lost_answer = counted.attempts > 1 and error.reason == "SEQUENCE_MISMATCH"
            if lost_answer and await self._holds(request):
                return expected_sequence + len(records)
            raise
        return int(response.next_sequence)

    def journal_appender(self) -> JournalAppender:
        """Return what appends to a journal again and again, one append at a time."""
        return JournalAppender(
            self._storage.AppendJournals, self._timeout_s, partial(blame, self._channel)
        )

    async def read_journal(
        self,
        stream: str,
        from_sequence: int = 0,
        max_records: int = 0,
        *,
        timeout_s: float = STREAM_TIMEOUT_S,
    ) -> AsyncIterator[pb.JournalRecord]:
        """Yield the records from a sequence on (0 records: all), without a gap.

        Where truncation dropped the first ones, it begins with the first that is left. Goes on
        where it was when the connection breaks.
        """
        position = from_sequence
        left = max_records or _END
        while True:
            request = pb.ReadJournalRequest(
                stream=stream,
                from_sequence=position,
                max_records=min(left, _PAGE_RECORDS),
            )
            records, end = await self._read_page(request, timeout_s)
            if records and position > from_sequence and records[0].sequence != position:
                raise Aborted(
                    f"journal {stream!r} was truncated while it was read; read again",
                    reason="JOURNAL_TRUNCATED",
                )
            for record in records:
                yield record
            if records:
                position = records[-1].sequence + 1
            left -= len(records)
            if not records or position >= end or left <= 0:
                return

    async def journal_end(self, stream: str) -> int:
        """Return the sequence that the next record of a stream gets; 0 if there is no stream."""
        request = pb.ReadJournalRequest(stream=stream, from_sequence=_END)
        _, end = await self._read_page(request, self._timeout_s)
        return end

    async def truncate_journal(
        self, stream: str, before_sequence: int, *, fence: pb.Fence | None = None
    ) -> None:
        """Drop the records before a sequence."""
        request = pb.TruncateJournalRequest(
            stream=stream, before_sequence=before_sequence, fence=fence
        )
        await self._call(self._storage.TruncateJournal, request)

    async def delete_journal(self, stream: str, *, fence: pb.Fence | None = None) -> None:
        """Remove a stream if it exists."""
        request = pb.DeleteJournalRequest(stream=stream, fence=fence)
        await self._call(self._storage.DeleteJournal, request)

    # Leases

    async def acquire_lease(
        self, name: str, holder: str, *, seen: pb.Lease | None = None
    ) -> Acquired:
        """Try to take a lease.

        ``seen`` is the lease of another holder that stayed the same for a TTL on the caller's own
        monotonic clock. Without it only a free lease, or one of the same holder, is taken.
        """
        request = pb.AcquireLeaseRequest(name=name, holder=holder)
        if seen is not None:
            request.seen_token, request.seen_counter = seen.token, seen.counter
        response = await self._call(self._storage.AcquireLease, request)
        return Acquired(response.acquired, response.lease)

    async def renew_lease(self, lease: pb.Lease, *, timeout_s: float | None = None) -> pb.Lease:
        """Return the lease renewed; Aborted (STALE_GENERATION) if it was lost."""
        request = pb.RenewLeaseRequest(name=lease.name, holder=lease.holder, token=lease.token)
        response = await self._call(self._storage.RenewLease, request, timeout_s)
        renewed: pb.Lease = response.lease
        return renewed

    async def release_lease(self, lease: pb.Lease) -> None:
        """Free the lease if it is still held."""
        request = pb.ReleaseLeaseRequest(name=lease.name, holder=lease.holder, token=lease.token)
        await self._call(self._storage.ReleaseLease, request)

    async def get_lease(self, name: str) -> pb.Lease | None:
        """Return the lease, or None if nobody ever held it."""
        response = await self._call(self._storage.GetLease, pb.GetLeaseRequest(name=name))
        return response.lease if response.HasField("lease") else None

    # Jobs

    async def raise_term(
        self, job_id: str, expected_term: int, *, fence: pb.Fence | None = None
    ) -> int:
        """Raise a job's term by compare-and-set (0: make its row); return the new term.

        Raises Aborted (STALE_TERM, STALE_GENERATION) and FailedPrecondition (FINAL_CHECKPOINT).
        """
        request = pb.RaiseTermRequest(job_id=job_id, expected_term=expected_term, fence=fence)
        counted = _Counted(self._storage.RaiseTerm)
        try:
            response = await self._call(counted, request)
        except Aborted as error:
            # Only the holder of the fence raises terms: an attempt whose answer was lost did it.
            lost_answer = counted.attempts > 1 and error.reason == "STALE_TERM" and fence
            if lost_answer and error.details.get("term") == str(expected_term + 1):
                return expected_term + 1
            raise
        return int(response.term)

    async def get_job_row(self, job_id: str) -> pb.GetJobRowResponse | None:
        """Return a job's term and final checkpoint, or None if it has no row."""
        try:
            row: pb.GetJobRowResponse = await self._call(
                self._storage.GetJobRow, pb.GetJobRowRequest(job_id=job_id)
            )
        except NotFound:
            return None
        return row

    async def commit_checkpoint(
        self, request: pb.CommitCheckpointRequest, *, timeout_s: float | None = None
    ) -> pb.CommitCheckpointResponse:
        """Register one range's part; the last part completes the checkpoint."""
        response: pb.CommitCheckpointResponse = await self._call(
            self._storage.CommitCheckpoint, request, timeout_s
        )
        return response

    async def list_checkpoints(self, job_id: str) -> list[pb.CheckpointManifest]:
        """Return a job's whole and undamaged checkpoints, newest first."""
        response = await self._call(
            self._storage.ListCheckpoints, pb.ListCheckpointsRequest(job_id=job_id)
        )
        return list(response.checkpoints)

    async def delete_job_row(self, job_id: str, *, fence: pb.Fence | None = None) -> None:
        """Remove a job's row, checkpoints and pins."""
        request = pb.DeleteJobRowRequest(job_id=job_id, fence=fence)
        await self._call(self._storage.DeleteJobRow, request)

    async def set_pins(
        self, holder: str, pins: Sequence[pb.Pin], *, fence: pb.Fence | None = None
    ) -> None:
        """Say what a holder (a job) needs, in place of what it said before."""
        request = pb.SetPinsRequest(holder=holder, pins=pins, fence=fence)
        await self._call(self._storage.SetPins, request)

    async def collect_garbage(
        self, *, dry_run: bool = False, grace_s: int = -1, timeout_s: float = _LONG_CALL_TIMEOUT_S
    ) -> pb.CollectGarbageResponse:
        """Remove blobs that nothing refers to, older than ``grace_s`` (-1: storage's setting)."""
        request = pb.CollectGarbageRequest(dry_run=dry_run, grace_s=grace_s)
        response: pb.CollectGarbageResponse = await self._call(
            self._storage.CollectGarbage, request, timeout_s
        )
        return response

    # Data sets

    async def create_dataset(
        self, name: str, manifest_digest: str, *, namespace: str = "", request_id: str = ""
    ) -> dataset_pb.Dataset:
        """Register the next version of a data set whose manifest and chunks are stored."""
        request = dataset_pb.CreateDatasetRequest(
            namespace=namespace,
            name=name,
            manifest_digest=manifest_digest,
            request_id=request_id or new_request_id(),
        )
        response = await self._call(self._datasets.CreateDataset, request, _LONG_CALL_TIMEOUT_S)
        dataset: dataset_pb.Dataset = response.dataset
        return dataset

    async def get_dataset(self, name: str, *, namespace: str = "") -> dataset_pb.Dataset:
        """Return NAME@VERSION, or the newest version of NAME; NotFound."""
        request = dataset_pb.GetDatasetRequest(namespace=namespace, name=name)
        response = await self._call(self._datasets.GetDataset, request)
        dataset: dataset_pb.Dataset = response.dataset
        return dataset

    async def list_datasets(self, *, namespace: str = "") -> list[dataset_pb.Dataset]:
        """Return all versions of all data sets of a namespace, by name, newest version first."""
        request = dataset_pb.ListDatasetsRequest(namespace=namespace)
        found: list[dataset_pb.Dataset] = []
        while True:
            response = await self._call(self._datasets.ListDatasets, request)
            found.extend(response.datasets)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def delete_dataset(self, name: str, *, namespace: str = "", request_id: str = "") -> None:
        """Delete NAME@VERSION, or all versions of NAME; FailedPrecondition (IN_USE), NotFound."""
        request = dataset_pb.DeleteDatasetRequest(
            namespace=namespace, name=name, request_id=request_id or new_request_id()
        )
        await self._call(self._datasets.DeleteDataset, request)

    # Models

    async def create_model(
        self, model: model_pb.ModelVersion, *, request_id: str = ""
    ) -> model_pb.ModelVersion:
        """Register the next version of a model whose files are stored."""
        request = model_pb.CreateModelRequest(
            model=model, request_id=request_id or new_request_id()
        )
        response = await self._call(self._models.CreateModel, request)
        created: model_pb.ModelVersion = response.model
        return created

    async def get_model(self, name: str, *, namespace: str = "") -> model_pb.ModelVersion:
        """Return NAME@VERSION, or the newest version of NAME; NotFound."""
        request = model_pb.GetModelRequest(namespace=namespace, name=name)
        response = await self._call(self._models.GetModel, request)
        model: model_pb.ModelVersion = response.model
        return model

    async def list_models(self, *, namespace: str = "") -> list[model_pb.ModelVersion]:
        """Return all versions of all models of a namespace, by name, newest version first."""
        request = model_pb.ListModelsRequest(namespace=namespace)
        found: list[model_pb.ModelVersion] = []
        while True:
            response = await self._call(self._models.ListModels, request)
            found.extend(response.models)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def delete_model(self, name: str, *, namespace: str = "", request_id: str = "") -> None:
        """Delete NAME@VERSION, or all versions of NAME; FailedPrecondition (IN_USE), NotFound."""
        request = model_pb.DeleteModelRequest(
            namespace=namespace, name=name, request_id=request_id or new_request_id()
        )
        await self._call(self._models.DeleteModel, request)

    async def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        request: Any,
        timeout_s: float | None = None,
        attempts: int | None = None,
    ) -> Any:
        return await call_with_retry(
            method,
            request,
            timeout_s=timeout_s or self._timeout_s,
            attempts=attempts or self._attempts,
        )

    async def _holds(self, request: pb.AppendJournalRequest) -> bool:
        """Say whether the journal holds just these records at their place."""
        stored = self.read_journal(request.stream, request.expected_sequence, len(request.records))
        found = [(record.sequence, record.payload) async for record in stored]
        return found == list(enumerate(request.records, request.expected_sequence))

    async def _read_page(
        self, request: pb.ReadJournalRequest, timeout_s: float
    ) -> tuple[list[pb.JournalRecord], int]:
        """Return the records asked for and the end of the stream; all again if the call breaks."""

        async def attempt(
            request: pb.ReadJournalRequest, *, timeout: float
        ) -> tuple[list[pb.JournalRecord], int]:
            records: list[pb.JournalRecord] = []
            end = 0
            async for response in self._storage.ReadJournal(request, timeout=timeout):
                records.extend(response.records)
                end = response.next_sequence
            return records, end

        page: tuple[list[pb.JournalRecord], int] = await self._call(attempt, request, timeout_s)
        return page


class _Counted:
    """A method that counts how often it was tried."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self._method = method
        self.attempts = 0

    async def __call__(self, request: Any, *, timeout: float) -> Any:
        self.attempts += 1
        return await self._method(request, timeout=timeout)
