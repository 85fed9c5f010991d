"""Control's way to storage: one channel, deadlines, patience while storage is away or full.

`call` tries a few times and raises. `insist` tries until storage answers: for what must happen and
may wait. The first failure and the return of storage are told to `on_change`.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc.aio

from phalanx.errors import Aborted, DataLoss, DeadlineExceeded, PhalanxError, Unavailable
from phalanx.keys.caller import Service
from phalanx.rpc.channel import ATTEMPTS, call_with_retry, open_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.patience import Patience, insist
from phalanx.rpc.status import from_rpc_error
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import dataset_service_pb2_grpc, model_service_pb2_grpc, storage_service_pb2_grpc
from phalanx.v1 import storage_service_pb2 as pb

CALL_TIMEOUT_S = 5.0
COMPOSE_TIMEOUT_S = 600.0
LEASE = "leader"
_CHUNK_BYTES = 1024 * 1024
_PATIENCE = Patience(first_s=0.05, longest_s=1.0)

ResultT = TypeVar("ResultT")
_log = get_logger(__name__)


class Store:
    """Storage as control uses it. `fence` is set while this process leads."""

    def __init__(self, address: str, keys: ClientKeys | None = None) -> None:
        self.has_keys = keys is not None
        """Whether callers of this cluster prove who they are."""
        self._channel = open_channel(address, keys=keys, service=Service.STORAGE)
        self.storage = storage_service_pb2_grpc.StorageServiceStub(self._channel)
        self.datasets = dataset_service_pb2_grpc.DatasetServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self.fence: pb.Fence | None = None
        self.available = True
        #: When this process asked for the lease, or to keep it, the last time that it was given.
        self.lease_confirmed_s = math.inf
        #: When storage answered last.
        self.answered_s = time.monotonic()
        self.on_change: Callable[[bool], None] = lambda _: None

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    async def call(
        self,
        method: Any,
        request: Any,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        attempts: int = ATTEMPTS,
    ) -> Any:
        """Make one call. Raises PhalanxError; Unavailable after some attempts."""
        try:
            response = await call_with_retry(
                method, request, timeout_s=timeout_s, attempts=attempts
            )
        except (Unavailable, DeadlineExceeded):
            self._note(available=False)
            raise
        except PhalanxError:
            self._note(available=True)
            raise
        self._note(available=True)
        return response

    async def insist(self, attempt: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Repeat `attempt` until storage answers it, with growing jittered waits.

        Also where its disk is full or it has too many calls open. Raises what does not pass by
        itself; ends by cancellation.
        """
        return await insist(attempt, _PATIENCE, on_failure=_waits)

    async def insist_call(
        self, method: Any, request: Any, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """Make one call and repeat it until storage answers. The call must be idempotent."""

        async def attempt() -> Any:
            return await self.call(method, request, timeout_s=timeout_s, attempts=1)

        return await self.insist(attempt)

    async def append_exactly(
        self,
        stream: str,
        expected: int,
        payloads: Sequence[bytes],
        owners: Sequence[pb.TermOwners] = (),
    ) -> int:
        """Append records at a known place, fenced; wait while storage is away.

        Storage takes note of the owners of terms together with the records that name them. If an
        answer got lost and the records are there already, that is success. Returns the next
        sequence. Raises Aborted when somebody else wrote, or leads.
        """
        request = pb.AppendJournalRequest(
            stream=stream,
            expected_sequence=expected,
            records=payloads,
            fence=self.fence,
            owners=owners,
        )
        try:
            response = await self.insist_call(self.storage.AppendJournal, request)
        except Aborted as error:
            if error.reason != "SEQUENCE_MISMATCH":
                raise

            async def reread() -> list[bytes]:
                found = self.read(stream, expected, len(payloads))
                return [each.payload async for each in found]

            if await self.insist(reread) != list(payloads):
                raise
            return expected + len(payloads)
        return int(response.next_sequence)

    async def read(
        self, stream: str, from_sequence: int, max_records: int = 0
    ) -> AsyncIterator[pb.JournalRecord]:
        """Yield the records of a stream in order. Raises PhalanxError."""
        async for response in self._read(stream, from_sequence, max_records):
            for record in response.records:
                yield record

    async def next_sequence(self, stream: str) -> int:
        """Return the sequence that the next record of a stream will get."""
        last = 0
        # A read far past the end brings no records, only where the end is.
        async for response in self._read(stream, 2**62, 1):
            last = response.next_sequence
        return last

    async def put_blob(self, content: bytes) -> tuple[str, int]:
        """Store a small blob; return its digest and size."""

        async def chunks() -> AsyncIterator[pb.PutBlobRequest]:
            yield pb.PutBlobRequest(expected_bytes=len(content), chunk=content[:_CHUNK_BYTES])
            for first in range(_CHUNK_BYTES, len(content), _CHUNK_BYTES):
                yield pb.PutBlobRequest(chunk=content[first : first + _CHUNK_BYTES])

        try:
            answer = await self.storage.PutBlob(chunks(), timeout=CALL_TIMEOUT_S * 4)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer.digest, answer.size_bytes

    async def get_blob(
        self, digest: str, offset: int = 0, length: int = 0, *, bytes_max: int | None = None
    ) -> bytes:
        """Return a small blob or, with a length, a small part of one.

        Raises DataLoss where there are more than `bytes_max`; None: whoever wrote it is trusted.
        """
        request = pb.GetBlobRequest(digest=digest, offset=offset, length=length)
        chunks: list[bytes] = []
        received = 0
        try:
            call = self.storage.GetBlob(request, timeout=CALL_TIMEOUT_S * 4)
            async for response in call:
                received += len(response.chunk)
                if bytes_max is not None and received > bytes_max:
                    call.cancel()
                    text = f"blob {digest} has more than the {bytes_max} bytes that are read of it"
                    raise DataLoss(text, reason="BLOB_TOO_LARGE")
                chunks.append(response.chunk)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return b"".join(chunks)

    async def _read(
        self, stream: str, from_sequence: int, max_records: int
    ) -> AsyncIterator[pb.ReadJournalResponse]:
        request = pb.ReadJournalRequest(
            stream=stream, from_sequence=from_sequence, max_records=max_records
        )
        try:
            async for response in self.storage.ReadJournal(request, timeout=CALL_TIMEOUT_S * 12):
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def _note(self, *, available: bool) -> None:
        if available:
            self.answered_s = time.monotonic()
        if available != self.available:
            self.available = available
            _log.warning("storage_returned" if available else "storage_away")
            self.on_change(available)


def _waits(error: PhalanxError, number: int) -> None:
    say = _log.warning if number == 1 else _log.debug
    say("storage_waited_for", reason=error.reason, message=error.message)
