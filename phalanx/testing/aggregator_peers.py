"""Scripted peers of an aggregator over real gRPC: a control that tests speak for, and workers.

async with AggregatorControl() as control:
    session = await control.next_session()
    await session.send(assign_ranges=...)
    await session.receive("ranges_ready")
    async with streams(leaves, addresses, term=1) as clients:
        go = await work(leaves, clients, hosts_all)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import grpc.aio
import numpy as np

from phalanx.reduction import Node
from phalanx.testing.exchange import ExchangeClient
from phalanx.testing.ranges import Array, Leaves
from phalanx.testing.worker_peers import ScriptedControl, ScriptedSession
from phalanx.v1.training_pb2 import Given, GoRecord

TERMINAL = (GoRecord.ACTION_STOP, GoRecord.ACTION_PAUSE, GoRecord.ACTION_FAIL)


class AggregatorControl(ScriptedControl):
    """Answers the hellos of aggregators; everything else is the test's to say."""

    async def Session(  # type: ignore[override]
        self, request_iterator: Any, context: Any
    ) -> None:
        """Serve one aggregator."""
        session = ScriptedSession(context)
        message = await context.read()
        if message is grpc.aio.EOF:
            return
        session.hello = message.aggregator_hello
        await session.send(self.generation, welcome=self.welcome)
        self._open.append(session)
        self._sessions.put_nowait(session)
        await session.serve()


class Streams:
    """One worker's streams to all owners of a job's ranges."""

    def __init__(self, leaves: Leaves, clients: Mapping[int, ExchangeClient]) -> None:
        self._leaves = leaves
        self._by_range = dict(clients)

    @property
    def root(self) -> ExchangeClient:
        """The stream to the owner of range 0."""
        return self._by_range[0]

    @property
    def others(self) -> list[ExchangeClient]:
        """The streams to all other owners."""
        clients = {id(client): client for client in self._by_range.values()}
        return [client for client in clients.values() if client is not self.root]

    @property
    def all(self) -> list[ExchangeClient]:
        """One stream to each owner."""
        return [self.root, *self.others]

    async def vector(self, version: int) -> Array:
        """A whole version."""
        parts = [await self._by_range[i].whole(version, i) for i in sorted(self._by_range)]
        return np.concatenate(parts)

    async def carry(self, go: GoRecord) -> None:
        """Carry a go record to all owners but the root."""
        for client in self.others:
            await client.send_go(go)

    async def contribute(
        self, go: GoRecord, nodes: Sequence[Node], *, frames: slice = slice(None), **options: Any
    ) -> None:
        """Compute these nodes for the round of a go record and send their frames."""
        train = go.action == GoRecord.ACTION_TRAIN
        parameters = await self.vector(go.version) if train else None
        for header, payload in self._leaves.frames(nodes, go, parameters, **options)[frames]:
            await self._by_range[header.range].send(header, payload)

    async def work(
        self,
        nodes_of: Callable[[GoRecord], Sequence[Node]],
        until: Callable[[GoRecord], bool] = lambda go: go.action in TERMINAL,
    ) -> GoRecord:
        """Carry each go record and send what `nodes_of` says; return the first that ends it."""
        while True:
            go = await self.root.next_go()
            await self.carry(go)
            if until(go) or go.action in TERMINAL:
                return go
            await self.contribute(go, nodes_of(go))


@contextlib.asynccontextmanager
async def streams(
    leaves: Leaves,
    addresses: Sequence[str],
    term: int,
    worker_id: str = "worker",
    *,
    takes_copies: bool = False,
    given: Given | None = None,
) -> AsyncIterator[Streams]:
    """Open one worker's streams; `addresses` name the owner of each range, and `given` is what it
    shows to them."""
    async with contextlib.AsyncExitStack() as stack:
        clients: dict[str, ExchangeClient] = {}
        by_range: dict[int, ExchangeClient] = {}
        for address in dict.fromkeys(addresses):
            owned = {
                piece.index: piece.element_count
                for piece in leaves.pieces
                if addresses[piece.index] == address
            }
            client = ExchangeClient(
                address,
                leaves.plan.job_id,
                term,
                owned,
                worker_id=worker_id,
                dtype=leaves.plan.layout.dtype,
                takes_copies=takes_copies,
                given=given,
            )
            clients[address] = await stack.enter_async_context(client)
            by_range |= dict.fromkeys(owned, client)
        yield Streams(leaves, by_range)


def share(leaves: Leaves, index: int, workers: int) -> Callable[[GoRecord], Sequence[Node]]:
    """What worker `index` of so many hosts in each round."""
    return lambda go: leaves.division(workers, go)[index]
