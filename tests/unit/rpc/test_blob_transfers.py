"""Uploads that storage refuses while they are written."""

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from phalanx.clients import blob_transfers
from phalanx.clients.blob_transfers import BlobTransfers
from phalanx.errors import ResourceExhausted
from phalanx.rpc.status import to_rpc_status

BYTES = bytes(3 * 2**20)


class FullStorage:
    """Refuses the first message. Who has written on by then hears of no reason, as with gRPC."""

    def __init__(self) -> None:
        self.calls = 0

    async def put_blob(self, messages: Any, timeout: float) -> None:
        self.calls += 1
        await anext(messages)
        writes_on = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if writes_on.done():
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.INTERNAL,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                "Internal error from Core",
            )
        writes_on.cancel()
        refusal = to_rpc_status(ResourceExhausted("no room", reason="DISK_FULL"))
        trailer = grpc.aio.Metadata(*refusal.trailing_metadata)
        raise grpc.aio.AioRpcError(refusal.code, grpc.aio.Metadata(), trailer, refusal.details)


async def test_an_upload_that_ended_without_a_reason_waits_for_it_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blob_transfers, "_ANSWER_S", 60.0)
    storage = FullStorage()
    stub: Any = SimpleNamespace(PutBlob=storage.put_blob)
    transfers = BlobTransfers(stub, timeout_s=30.0, attempts=4)
    with pytest.raises(ResourceExhausted, match="no room"):
        await transfers.put(BYTES, digest="", check_first=False, timeout_s=None)
    assert storage.calls == 2
