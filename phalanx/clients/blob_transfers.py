"""Uploads and downloads of blobs: verified at both ends, retried, downloads resumed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from phalanx.clients.blob_sinks import FileSink, MemorySink, Sink
from phalanx.clients.blob_sources import BlobSource, Repeatable, Stream, open_source
from phalanx.errors import DataLoss, DeadlineExceeded
from phalanx.rpc.channel import call_with_retry
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1 import storage_service_pb2_grpc as pb_grpc

DIGESTS_PER_CALL = 10_000
STREAM_TIMEOUT_S = 3600.0
"""Deadline of a transfer whose size is not known beforehand."""

_ANSWER_S = 0.2
"""An upload that is refused while it is written may end without the reason; the next one leaves so
much time for it after its first message."""
_SLOWEST_BYTES_PER_S = 4e6


class BlobTransfers:
    """Moves blobs over one stub.

    ``timeout_s`` bounds a call without its content, and how long a download may stand still;
    ``on_silence`` is told the call of one that does.
    """

    def __init__(
        self,
        stub: pb_grpc.StorageServiceStub,
        timeout_s: float,
        attempts: int,
        on_silence: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._stub = stub
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._on_silence = on_silence

    async def put(
        self, source: BlobSource, *, digest: str, check_first: bool, timeout_s: float | None
    ) -> str:
        """Upload unless it is stored; return the digest."""
        content = open_source(source)
        if isinstance(content, Stream):
            return await self._put_stream(content, digest, timeout_s or STREAM_TIMEOUT_S)
        limit_s = timeout_s or self._timeout_s + content.size_bytes / _SLOWEST_BYTES_PER_S
        if not check_first and not digest:
            digest, stored = await asyncio.gather(
                content.digest(), self._upload(content, "", limit_s)
            )
            return _same(digest, stored)
        digest = digest or await content.digest()
        if check_first and not content.is_small and not await self.missing([digest]):
            return digest
        return await self._upload(content, digest, limit_s)

    async def missing(self, digests: list[str]) -> list[str]:
        """Return the digests that are not stored; the others become young."""
        missing: list[str] = []
        for start in range(0, len(digests), DIGESTS_PER_CALL):
            request = pb.CheckBlobsRequest(digests=digests[start : start + DIGESTS_PER_CALL])
            response = await call_with_retry(
                self._stub.CheckBlobs,
                request,
                timeout_s=self._timeout_s,
                attempts=self._attempts,
            )
            missing.extend(response.missing)
        return missing

    async def get(self, request: pb.GetBlobRequest, timeout_s: float | None) -> bytes:
        """Return the bytes asked for."""
        sink = MemorySink()
        try:
            await self._download(request, sink, timeout_s)
            digest = await sink.digest()
        finally:
            await sink.close()
        if not request.offset and not request.length:
            _same(request.digest, digest)
        return await asyncio.to_thread(sink.content)

    async def get_to(self, digest: str, path: Path, timeout_s: float | None) -> int:
        """Write a blob to a file, which appears whole or not at all; return its size."""
        sink = FileSink(path)
        try:
            await self._download(pb.GetBlobRequest(digest=digest), sink, timeout_s)
            _same(digest, await sink.digest())
            return await asyncio.to_thread(sink.publish)
        finally:
            await sink.close()

    async def _download(
        self, request: pb.GetBlobRequest, sink: Sink, timeout_s: float | None
    ) -> None:
        """Hand the bytes asked for to ``sink``; go on where it was when the connection breaks."""
        received = 0
        wanted = request.length or None

        async def attempt(request: pb.GetBlobRequest, *, timeout: float) -> None:
            nonlocal received, wanted
            if wanted is not None and received >= wanted > 0:
                return
            rest = pb.GetBlobRequest(
                digest=request.digest,
                offset=request.offset + received,
                length=0 if wanted is None else wanted - received,
            )
            call = self._stub.GetBlob(rest, timeout=timeout)
            try:
                async for response in self._moving(call):
                    if wanted is None and response.size_bytes:
                        # Before it there may be signs of life: it is being made.
                        wanted = response.size_bytes - request.offset
                    await sink.write(response.chunk)
                    received += len(response.chunk)
            finally:
                call.cancel()

        limit_s = timeout_s or STREAM_TIMEOUT_S
        await call_with_retry(attempt, request, timeout_s=limit_s, attempts=self._attempts)

    async def _moving(self, call: Any) -> AsyncIterator[pb.GetBlobResponse]:
        responses = aiter(call)
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    response = await anext(responses, None)
            except TimeoutError:
                self._on_silence(call)
                raise DeadlineExceeded(
                    f"no part of the blob came for {self._timeout_s:g} s", reason="DOWNLOAD_IDLE"
                ) from None
            if response is None:
                return
            yield response

    async def _upload(self, content: Repeatable, digest: str, timeout_s: float) -> str:
        tried = False

        async def attempt(first: pb.PutBlobRequest, *, timeout: float) -> pb.PutBlobResponse:
            nonlocal tried
            pause_s, tried = _ANSWER_S if tried else 0.0, True
            return await self._stub.PutBlob(_messages(first, content, pause_s), timeout=timeout)

        first = pb.PutBlobRequest(expected_digest=digest, expected_bytes=content.size_bytes or -1)
        response: pb.PutBlobResponse = await call_with_retry(
            attempt, first, timeout_s=timeout_s, attempts=self._attempts
        )
        return response.digest

    async def _put_stream(self, content: Stream, digest: str, timeout_s: float) -> str:
        async def attempt(first: pb.PutBlobRequest, *, timeout: float) -> pb.PutBlobResponse:
            return await self._stub.PutBlob(_messages(first, content), timeout=timeout)

        first = pb.PutBlobRequest(expected_digest=digest, expected_bytes=-1)
        response = await call_with_retry(attempt, first, timeout_s=timeout_s, attempts=1)
        return _same(content.digest(), response.digest)


async def _messages(
    first: pb.PutBlobRequest, content: Repeatable | Stream, pause_s: float = 0.0
) -> AsyncIterator[pb.PutBlobRequest]:
    """Yield the messages of an upload; the first one carries the expectations, and may be refused:
    a pause after it leaves time for that."""
    yield first
    if pause_s:
        await asyncio.sleep(pause_s)
    async for piece in content.pieces():
        yield pb.PutBlobRequest(chunk=bytes(piece))


def _same(expected: str, digest: str) -> str:
    if expected != digest:
        raise DataLoss(
            f"blob {expected} was changed on its way: it came as {digest}; try again",
            reason="TRANSFER_CORRUPT",
        )
    return digest
