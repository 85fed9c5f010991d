"""Servers that stop, one after another, under callers that never pause: each call is answered."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from coordinator.control.forwarding import Forwarding
from phalanx.errors import PhalanxError
from phalanx.rpc.server import Server
from phalanx.rpc.types import ServicerContext
from phalanx.sdk.methods import LIST_JOBS
from phalanx.sdk.transport import Transport
from phalanx.v1 import job_service_pb2 as pb
from phalanx.v1 import job_service_pb2_grpc as stubs

SERVICE = "phalanx.v1.JobService"
GUARD_S = 30.0
CALLERS = 12
ROUNDS = 6


class Servicer(stubs.JobServiceServicer):
    async def ListJobs(
        self, request: pb.ListJobsRequest, context: ServicerContext
    ) -> pb.ListJobsResponse:
        return pb.ListJobsResponse()


@asynccontextmanager
async def served(forwarding: Forwarding | None = None) -> AsyncIterator[Server]:
    server = Server(
        listen="127.0.0.1:0",
        metrics_listen=None,
        service_names=[SERVICE],
        interceptors=[forwarding] if forwarding is not None else [],
    )
    stubs.add_JobServiceServicer_to_server(Servicer(), server.raw)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0.0)


class Callers:
    """Threads that call one after another until they are told to end."""

    def __init__(self, transport: Transport) -> None:
        self.failures: Counter[str] = Counter()
        self._transport = transport
        self._ended = threading.Event()
        self._counts = [0] * CALLERS
        self._threads = [
            threading.Thread(target=self._repeat, args=(number,)) for number in range(CALLERS)
        ]

    async def __aenter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, GUARD_S)

    async def one_more_each(self) -> None:
        before = list(self._counts)
        async with asyncio.timeout(GUARD_S):
            while any(now <= then for now, then in zip(self._counts, before, strict=True)):
                await asyncio.sleep(0.001)

    def _repeat(self, number: int) -> None:
        while not self._ended.is_set():
            try:
                self._transport.call(LIST_JOBS, pb.ListJobsRequest())
            except PhalanxError as error:
                self.failures[f"{error.code} {error.reason}: {error}"] += 1
            self._counts[number] += 1


async def test_no_call_of_a_client_fails_as_the_server_that_it_reached_stops() -> None:
    """Those that had arrived, and that the server had not looked at yet, are let go by gRPC."""
    for _ in range(ROUNDS):
        async with served() as stopping, served() as other:
            transport = Transport([stopping.address, other.address])
            async with Callers(transport) as callers:
                await callers.one_more_each()
                await stopping.stop()
                await callers.one_more_each()
            transport.close()
            assert not callers.failures


async def test_no_call_that_is_handed_on_fails_as_the_leader_stops() -> None:
    for _ in range(ROUNDS):
        forwarding = Forwarding((SERVICE,), lambda: False)
        async with served(forwarding) as front, served() as leads, served() as follows:
            await forwarding.leader_is_at(leads.address)
            transport = Transport([front.address])
            async with Callers(transport) as callers:
                await callers.one_more_each()
                await leads.stop()
                await forwarding.leader_is_at(follows.address)
                await callers.one_more_each()
            transport.close()
            await forwarding.leader_is_at("")
            assert not callers.failures
