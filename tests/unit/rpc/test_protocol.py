"""Versions of the protocol: which are spoken side by side, and what the others are told."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.errors import FailedPrecondition
from phalanx.rpc import protocol
from phalanx.rpc.channel import channel_options, open_channel
from phalanx.rpc.server import Server
from phalanx.rpc.status import from_rpc_error
from phalanx.rpc.types import ServicerContext
from phalanx.sdk.methods import GET_CLUSTER
from phalanx.sdk.transport import Transport
from phalanx.v1 import cluster_service_pb2 as pb
from phalanx.v1 import cluster_service_pb2_grpc as stubs

GUARD_S = 30.0


class Servicer(stubs.ClusterServiceServicer):
    """Counts the calls that get as far as a handler."""

    served = 0

    async def GetCluster(
        self, request: pb.GetClusterRequest, context: ServicerContext
    ) -> pb.GetClusterResponse:
        self.served += 1
        return pb.GetClusterResponse(leader="control-1")


@asynccontextmanager
async def serving(servicer: Servicer) -> AsyncIterator[str]:
    server = Server(
        listen="127.0.0.1:0", metrics_listen=None, service_names=["phalanx.v1.ClusterService"]
    )
    stubs.add_ClusterServiceServicer_to_server(servicer, server.raw)
    await server.start()
    server.set_serving(True)
    try:
        yield server.address
    finally:
        await server.stop(0)


@contextmanager
def speaking(oldest: int, newest: int) -> Iterator[None]:
    """What is opened within is opened by a process that speaks these versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "OLDEST", oldest)
        patch.setattr(protocol, "NEWEST", newest)
        yield


async def call(channel: grpc.aio.Channel) -> str:
    async with channel:
        answer = await stubs.ClusterServiceStub(channel).GetCluster(
            pb.GetClusterRequest(), timeout=GUARD_S
        )
    return str(answer.leader)


@pytest.mark.parametrize(
    ("oldest", "newest"),
    [
        (protocol.NEWEST, protocol.NEWEST + 1),
        (protocol.OLDEST, protocol.OLDEST),
        (protocol.NEWEST, protocol.NEWEST),
        (0, protocol.NEWEST + 7),
    ],
)
async def test_who_shares_a_version_is_served(oldest: int, newest: int) -> None:
    async with serving(Servicer()) as address:
        with speaking(oldest, newest):
            channel = open_channel(address, own_connection=True)
        assert await call(channel) == "control-1"


@pytest.mark.parametrize(
    ("versions", "too_old"),
    [
        ((protocol.NEWEST + 1, protocol.NEWEST + 2), "this process"),
        ((protocol.OLDEST - 1, protocol.OLDEST - 1), "the caller"),
    ],
)
async def test_who_shares_none_is_told_who_is_too_old(
    versions: tuple[int, int], too_old: str
) -> None:
    servicer = Servicer()
    async with serving(servicer) as address:
        with speaking(*versions):
            channel = open_channel(address, own_connection=True)
        async with channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stubs.ClusterServiceStub(channel).GetCluster(
                    pb.GetClusterRequest(), timeout=GUARD_S
                )
            # Whether a process is well, anybody may ask.
            well = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=GUARD_S
            )
    error = from_rpc_error(refused.value)
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "PROTOCOL_VERSION"
    assert f"{too_old} is too old. Upgrade {too_old}" in error.message
    assert error.details["caller_newest"] == str(versions[1])
    assert error.details["newest"] == str(protocol.NEWEST)
    assert servicer.served == 0
    assert well.status == health_pb2.HealthCheckResponse.SERVING


async def test_who_says_nothing_is_served() -> None:
    """As grpcurl, and clients in other languages."""
    options = [each for each in channel_options() if each[0] != "grpc.primary_user_agent"]
    async with serving(Servicer()) as address:
        channel = grpc.aio.insecure_channel(
            address, options=[*options, ("grpc.use_local_subchannel_pool", 1)]
        )
        assert await call(channel) == "control-1"


async def test_blocking_callers_say_it_too() -> None:
    import asyncio

    def ask(address: str) -> str:
        transport = Transport([address])
        try:
            return transport.call(GET_CLUSTER, pb.GetClusterRequest()).leader
        finally:
            transport.close()

    async with serving(Servicer()) as address:
        with speaking(protocol.NEWEST + 1, protocol.NEWEST + 1):
            # The range of the server is asked for at each call: it is that of this process.
            assert await asyncio.to_thread(ask, address) == "control-1"
        assert await asyncio.to_thread(ask, address) == "control-1"


@pytest.mark.parametrize(
    "agent",
    [
        "",
        "grpcurl/1.9",
        f"{protocol.PRODUCT}/x-y",
        f"{protocol.PRODUCT}/1",
        f"{protocol.PRODUCT}/9999999-9999999",
    ],
)
def test_what_is_no_range_of_versions_says_nothing(agent: str) -> None:
    protocol.check_caller([("user-agent", agent), ("authorization", "phalanx-protocol/7-7")])


def test_bytes_are_read_as_text() -> None:
    with pytest.raises(FailedPrecondition):
        protocol.check_caller([("user-agent", f"{protocol.PRODUCT}/77-78 grpc-c/1".encode())])
