"""Uploads that end badly leave nothing, however often they are cancelled meanwhile."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from phalanx.errors import PhalanxError
from phalanx.telemetry.metrics import StorageMetrics
from phalanx.v1 import storage_service_pb2 as pb
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
