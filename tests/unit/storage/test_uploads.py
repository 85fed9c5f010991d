"""Uploads that end badly leave nothing, however often they are cancelled meanwhile."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from phalanx.errors import DeadlineExceeded, PhalanxError, ResourceExhausted
from phalanx.keys.caller import ANYBODY, Caller, Role, Service, set_caller
from phalanx.telemetry.metrics import StorageMetrics
from phalanx.v1 import storage_service_pb2 as pb
from storage.interfaces import StoredBlob
from storage.service import blob_calls
from storage.service.blob_calls import BlobCalls
from storage.service.operations import Operations

GUARD_S = 20.0


class SlowWriter:
    """Writes for as long as a test likes."""

    def __init__(self) -> None:
        self.writing = threading.Event()
        self.let_go = threading.Event()
        self.aborted = threading.Event()

    def write(self, chunk: bytes) -> None:
        self.writing.set()
        assert self.let_go.wait(GUARD_S)

    def abort(self) -> None:
        self.aborted.set()


class Store:
    def __init__(self, writer: SlowWriter) -> None:
        self._writer = writer

    def writer(self, expected_bytes: int = -1) -> SlowWriter:
        return self._writer


async def test_a_broken_upload_that_is_cancelled_while_it_is_cleaned_up_leaves_nothing() -> None:
    writer: Any = SlowWriter()
    operations = Operations("test", StorageMetrics(CollectorRegistry()))
    broken = asyncio.Event()

    async def messages() -> AsyncIterator[pb.PutBlobRequest]:
        yield pb.PutBlobRequest(chunk=b"x")
        await asyncio.to_thread(writer.writing.wait, GUARD_S)
        broken.set()
        raise PhalanxError("the connection broke")

    store: Any = Store(writer)
    no_links: Any = None
    upload = asyncio.create_task(BlobCalls(store, operations, no_links).put(messages()))
    async with asyncio.timeout(GUARD_S):
        await broken.wait()
        # The upload now waits for the thread; then it is cancelled, once and again.
        for _ in range(2):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert not writer.aborted.is_set()
        writer.let_go.set()
        assert await asyncio.to_thread(writer.aborted.wait, GUARD_S), "its file stays for ever"
    operations.close()


async def test_an_upload_that_is_cancelled_while_its_file_is_made_leaves_nothing() -> None:
    making, let_go = threading.Event(), threading.Event()
    writer: Any = SlowWriter()

    class SlowStore:
        def writer(self, expected_bytes: int = -1) -> SlowWriter:
            making.set()
            assert let_go.wait(GUARD_S)
            return writer

    async def messages() -> AsyncIterator[pb.PutBlobRequest]:
        yield pb.PutBlobRequest(chunk=b"x")

    operations = Operations("test", StorageMetrics(CollectorRegistry()))
    store: Any = SlowStore()
    no_links: Any = None
    upload = asyncio.create_task(BlobCalls(store, operations, no_links).put(messages()))
    async with asyncio.timeout(GUARD_S):
        assert await asyncio.to_thread(making.wait, GUARD_S)
        upload.cancel()
        await asyncio.sleep(0)
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert await asyncio.to_thread(writer.aborted.wait, GUARD_S), "its file stays for ever"
    operations.close()


ANN = Caller("ann", role=Role.SUBMITTER)


class KeptWriter(SlowWriter):
    """Keeps what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.content = b""

    def write(self, chunk: bytes) -> None:
        self.content += chunk

    def commit(self, *_: Any) -> StoredBlob:
        return StoredBlob(hashlib.sha256(self.content).hexdigest(), len(self.content))


async def uploaded(
    messages: AsyncIterator[pb.PutBlobRequest], writer: Any, caller: Caller = ANN
) -> StoredBlob:
    """Upload as somebody who may send 10 bytes at once if that is a person."""
    operations = Operations("test", StorageMetrics(CollectorRegistry()))
    store: Any = Store(writer)
    no_links: Any = None
    calls = BlobCalls(store, operations, no_links, person_bytes_max=10)
    set_caller(caller)
    try:
        async with asyncio.timeout(GUARD_S):
            return await calls.put(messages)
    finally:
        operations.close()


async def chunks(sizes: Iterable[int], **first: Any) -> AsyncIterator[pb.PutBlobRequest]:
    for number, size in enumerate(sizes):
        yield pb.PutBlobRequest(chunk=b"x" * size, **(first if number == 0 else {}))


@pytest.mark.parametrize(
    ("sizes", "first"), [((11,), {}), ((6, 4, 1), {}), ((1,), {"expected_bytes": 11})]
)
async def test_an_upload_of_a_person_that_gets_too_large_ends_and_leaves_nothing(
    sizes: tuple[int, ...], first: dict[str, int]
) -> None:
    writer = KeptWriter()
    with pytest.raises(ResourceExhausted, match="may have 10 bytes") as caught:
        await uploaded(chunks(sizes, **first), writer)
    assert caught.value.reason == "UPLOAD_TOO_LARGE"
    assert len(writer.content) <= 10
    assert writer.aborted.is_set() or not writer.content


async def test_as_much_as_is_allowed_passes_and_members_have_no_limit() -> None:
    assert (await uploaded(chunks((6, 4)), KeptWriter())).size_bytes == 10
    node = Caller("aggregator", services=frozenset({Service.AGGREGATOR}))
    for caller in (node, ANYBODY):
        assert (await uploaded(chunks((6, 6)), KeptWriter(), caller)).size_bytes == 12


async def test_a_disk_that_times_out_is_not_taken_for_a_long_upload() -> None:
    class TimesOut(KeptWriter):
        def write(self, chunk: bytes) -> None:
            raise TimeoutError("the file system is gone")

    writer = TimesOut()
    with pytest.raises(TimeoutError, match="the file system is gone"):
        await uploaded(chunks((6,)), writer)
    assert writer.aborted.is_set()


async def test_an_upload_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_calls, "LONGEST_S", 0.05)
    writer = KeptWriter()

    async def trickle() -> AsyncIterator[pb.PutBlobRequest]:
        while True:
            yield pb.PutBlobRequest()
            await asyncio.sleep(0.001)

    with pytest.raises(DeadlineExceeded) as caught:
        await uploaded(trickle(), writer)
    assert caught.value.reason == "UPLOAD_TOO_LONG"
    assert writer.aborted.is_set()
