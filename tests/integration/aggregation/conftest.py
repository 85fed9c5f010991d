"""A real aggregator and a real storage service in the test's event loop, over gRPC on port 0."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from coordinator.aggregation.config import AggregatorConfig
from coordinator.aggregation.exchange import SERVICE, ExchangeServicer
from coordinator.aggregation.process import Aggregator
from phalanx.clients.storage import StorageClient
from phalanx.config import build
from phalanx.rpc.server import Server
from phalanx.telemetry.metrics import AggregatorMetrics
from phalanx.testing.aggregator_peers import AggregatorControl
from phalanx.testing.ranges import parameter_ranges
from phalanx.testing.worker_peers import ScriptedSession
from phalanx.v1.coordination_service_pb2 import AssignRanges
from storage.config import StorageConfig
from storage.runtime import StorageProcess


@dataclass
class Member:
    """An aggregator in this process, and its session as control sees it."""

    id: str
    aggregator: Aggregator
    server: Server
    session: ScriptedSession
    address: str = field(default="")

    async def stop(self) -> None:
        await self.aggregator.close()
        await self.server.stop(0)


class Bench:
    """One scripted control and the aggregators that speak to it."""

    def __init__(self, control: AggregatorControl, storage_address: str) -> None:
        self.control = control
        self.storage_address = storage_address
        self.members: list[Member] = []

    async def aggregator(self, member_id: str = "a") -> Member:
        flags = {
            "id": member_id,
            "listen": "127.0.0.1:0",
            "control": self.control.address,
            "storage": self.storage_address,
        }
        server = Server(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", service_names=[SERVICE])
        config = build(AggregatorConfig, flags, {})
        aggregator = Aggregator(config, AggregatorMetrics(server.registry), "fingerprint")
        ExchangeServicer(aggregator.find).add_to(server.raw)
        await server.start()
        aggregator.start(server.address)
        session = await self.control.next_session()
        member = Member(member_id, aggregator, server, session, server.address)
        self.members.append(member)
        return member

    def assignment(
        self,
        plan: Any,
        owners: Sequence[str] = ("a",),
        term: int = 1,
        restore: Any = None,
        reached_step: int = 0,
        seal_key: bytes = b"",
    ) -> AssignRanges:
        pieces = parameter_ranges(plan, lambda index: owners[index])
        return AssignRanges(
            plan=plan,
            term=term,
            ranges=pieces,
            restore=restore,
            reached_step=reached_step,
            seal_key=seal_key,
        )

    async def assign(
        self,
        plan: Any,
        owners: Sequence[str] = ("a",),
        term: int = 1,
        restore: Any = None,
        reached_step: int = 0,
        seal_key: bytes = b"",
    ) -> None:
        """Assign the ranges to the live members that own them and wait until they are ready."""
        message = self.assignment(plan, owners, term, restore, reached_step, seal_key)
        for member in self.members:
            if member.id in owners:
                await member.session.send(assign_ranges=message)
        for member in self.members:
            if member.id in owners:
                ready = await member.session.receive("ranges_ready")
                assert not ready.HasField("failure"), ready


@pytest.fixture
async def start_storage(tmp_path):
    """Starts the storage service, at a given address if that matters."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(listen: str = "127.0.0.1:0", state: str = "state") -> StorageProcess:
            flags = {"state": str(tmp_path / state), "listen": listen, "gc_interval_s": "0"}
            service = StorageProcess(build(StorageConfig, flags, {}))
            await service.start()
            stack.push_async_callback(service.stop, 0.1)
            return service

        yield start


@pytest.fixture
async def storage(start_storage):
    """A client of a storage service in which the job has term 1."""
    service = await start_storage()
    async with StorageClient(service.server.address) as client:
        await client.raise_term("job-test", 0)
        yield client


@pytest.fixture
async def control():
    async with AggregatorControl() as scripted:
        yield scripted


@pytest.fixture
async def bench(control, storage):
    made = Bench(control, storage.address)
    yield made
    for member in made.members:
        await member.stop()
