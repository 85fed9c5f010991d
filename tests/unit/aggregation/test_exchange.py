"""The end of an exchange stream, in whichever order gRPC tells of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from coordinator.aggregation.exchange import ExchangeServicer
from phalanx.frames import encode_request
from phalanx.v1 import aggregation_service_pb2 as pb
from worker.session.all_reduce.exchange import MemberExchange


class BrokenConnection:
    """A call whose reading ends, and which gRPC cancels while its handler clears up for that."""

    def __init__(self) -> None:
        hello = pb.ExchangeHello(job_id="job-1", term=1, worker_id="worker-1")
        self._data = [encode_request(pb.ExchangeRequestHeader(hello=hello))]
        self.handler: asyncio.Task[None] | None = None
        self.cancelled = False

    async def read(self) -> Any:
        return self._data.pop() if self._data else grpc.aio.EOF

    async def write(self, data: bytes) -> None:
        pass

    def cancel(self) -> None:
        assert self.handler is not None
        self.cancelled = self.handler.cancel()


class Hosted:
    """A job that nobody sends anything of; both services find in it what they ask of one."""

    joined = True
    term = 1
    elapsed_s = 0.0

    def __init__(self, context: BrokenConnection) -> None:
        cursor = SimpleNamespace(take=lambda elapsed_s: None)
        self.ranges = SimpleNamespace(term=1, range_indexes=[0], cursor=lambda key, joins: cursor)
        self.given = SimpleNamespace(show=lambda worker_id, given, field: None)
        self.copying = SimpleNamespace(next_order=self.next_served)
        self.open: set[object] = set()
        self._context = context

    def open_stream(self, key: object, hello: pb.ExchangeHello) -> asyncio.Event:
        self.open.add(key)
        return asyncio.Event()

    def close_stream(self, key: object) -> None:
        self.open.remove(key)

    def next_served(self, key: object) -> None:
        return None

    async def closed(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self._context.cancel()

    open_member, close_member, term_over = open_stream, close_stream, closed


@pytest.mark.parametrize("service", [ExchangeServicer, MemberExchange])
async def test_a_stream_that_breaks_is_closed_even_if_its_call_is_cancelled_meanwhile(
    service: Any,
) -> None:
    context = BrokenConnection()
    job = Hosted(context)
    context.handler = asyncio.create_task(service(lambda _: job).exchange(None, context))
    with pytest.raises(asyncio.CancelledError):
        await context.handler
    assert context.cancelled
    assert not job.open
