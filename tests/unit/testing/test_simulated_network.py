"""The network of the simulator: calls whose answers are lost, and requests late and again."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import grpc
import grpc.aio
import pytest

from phalanx.testing.simulation import Network, World
from phalanx.testing.simulation.network import Misdelivery
from phalanx.testing.simulation.rpc import SimulatedServer
from phalanx.testing.simulation.rpc_client import SimulatedChannel

CALLS = (b"1", b"2", b"3")


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, heard: list[bytes]) -> None:
        self._heard = heard

    def service(self, details: Any) -> Any:
        async def behaviour(request: bytes, _: Any) -> bytes:
            self._heard.append(request)
            return b"answer to " + request

        return grpc.unary_unary_rpc_method_handler(behaviour)


def run(kind: str, share: float) -> tuple[list[bytes], list[bytes], Counter[str]]:
    """Make calls one after another; return what the server heard, and what it answered."""
    world = World(3)
    network = Network(world)
    network.misdelivery = made = Misdelivery(random.Random(5), share)
    made.KINDS = (kind,)  # type: ignore[misc]
    heard: list[bytes] = []
    told: list[bytes] = []

    async def serve() -> None:
        server = SimulatedServer(world, network)
        server.add_generic_rpc_handlers([_Handler(heard)])
        server.add_insecure_port("server:1")
        await server.start()
        await asyncio.Event().wait()

    async def ask() -> None:
        call = SimulatedChannel(world, network, "server:1").unary_unary("/service/Method")
        for request in CALLS:
            try:
                told.append(await call(request, timeout=5.0))
            except grpc.aio.AioRpcError as error:
                told.append(error.code().name.encode())

    world.start("server", serve)
    world.at(1.0, lambda: world.start("client", ask))
    world.run(until_s=20.0)
    world.close()
    assert world.failure is None
    assert not network.calls
    return heard, told, network.misdelivered


def test_without_a_share_calls_go_as_they_should():
    heard, told, met = run("lost", 0.0)
    assert heard == [b"1", b"2", b"3"]
    assert told == [b"answer to 1", b"answer to 2", b"answer to 3"]
    assert not met


@pytest.mark.parametrize("kind", ["lost", "late"])
def test_what_was_carried_out_is_not_answered(kind: str):
    heard, told, met = run(kind, 1.0)
    assert sorted(heard) == [b"1", b"2", b"3"]
    assert told == [b"UNAVAILABLE"] * 3
    assert met == {kind: 3}


def test_a_late_request_arrives_after_later_ones():
    assert run("late", 1.0)[0] != [b"1", b"2", b"3"]


def test_a_request_that_is_repeated_is_answered_once():
    heard, told, met = run("twice", 1.0)
    assert sorted(heard) == [b"1", b"1", b"2", b"2", b"3", b"3"]
    assert told == [b"answer to 1", b"answer to 2", b"answer to 3"]
    assert met == {"twice": 3}
