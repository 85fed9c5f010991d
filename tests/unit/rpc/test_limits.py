"""How much of a server its peers may take up."""

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.config import ServerConfig, build
from phalanx.errors import DeadlineExceeded, ResourceExhausted
from phalanx.rpc.channel import open_channel
from phalanx.rpc.limits import Admission, ServerLimits, make_room_for_connections, peer_of
from phalanx.rpc.server import Server
from phalanx.rpc.status import from_rpc_error
from phalanx.rpc.types import ServicerContext

GUARD_S = 30.0

ResultT = TypeVar("ResultT")


# -- counting


def test_each_limit_is_told_by_its_own_sentence_and_counts_nothing() -> None:
    limits = ServerLimits(calls_max=4, peer_calls_max=3, peer_connections_max=2)
    admission = Admission(limits)
    for connection in ("ipv4:10.0.0.1:1", "ipv4:10.0.0.1:1", "ipv4:10.0.0.1:2"):
        admission.enter(connection)
    with pytest.raises(ResourceExhausted, match=r"10\.0\.0\.1 has 3 calls open") as caught:
        admission.enter("ipv4:10.0.0.1:2")
    assert caught.value.reason == "TOO_MANY_CALLS_OF_PEER"
    assert caught.value.retry_after_s == 1.0
    admission.leave("ipv4:10.0.0.1:1")
    with pytest.raises(ResourceExhausted, match=r"10\.0\.0\.1 has 2 connections") as caught:
        admission.enter("ipv4:10.0.0.1:3")
    assert caught.value.reason == "TOO_MANY_CONNECTIONS_OF_PEER"
    admission.enter("ipv4:10.0.0.2:1")
    admission.enter("ipv6:[::1]:7")
    with pytest.raises(ResourceExhausted, match="the server has 4 calls open") as caught:
        admission.enter("ipv4:10.0.0.3:1")
    assert caught.value.reason == "TOO_MANY_CALLS"
    assert (admission.calls, admission.peers) == (4, 3)


def test_who_leaves_makes_room_and_leaves_no_trace() -> None:
    admission = Admission(ServerLimits(peer_connections_max=1))
    for port in range(100):
        admission.enter(f"ipv4:10.0.0.1:{port}")
        admission.enter(f"ipv4:10.0.0.1:{port}")
        admission.leave(f"ipv4:10.0.0.1:{port}")
        admission.leave(f"ipv4:10.0.0.1:{port}")
    assert (admission.calls, admission.peers) == (0, 0)
    assert not any(vars(admission)[name] for name in vars(admission) if name != "_limits")


@pytest.mark.parametrize(
    ("connection", "peer"),
    [
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:%5B::1%5D:4711", "%5B::1%5D"),
        ("unix:/run/socket", "unix:/run/socket"),
        ("unknown", "unknown"),
    ],
)
def test_the_peer_of_a_connection_is_its_host(connection: str, peer: str) -> None:
    assert peer_of(connection) == peer


def test_limits_are_what_the_service_was_started_with() -> None:
    config = build(ServerConfig, {"peer_calls_max": "7"}, {"PHALANX_SERVICE_CALLS_MAX": "99"})
    assert ServerLimits.of(config) == ServerLimits(calls_max=99, peer_calls_max=7)
    assert ServerLimits.of(build(ServerConfig, {}, {})) == ServerLimits()


# -- open files


@contextmanager
def _files(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_room_for_connections_is_made_within_the_hard_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with _files(600):
        assert make_room_for_connections(ServerLimits(connections_max=300)) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300 + 512
        if hard != resource.RLIM_INFINITY:
            assert make_room_for_connections(ServerLimits(connections_max=2 * hard)) == hard - 512


# -- a real server


@asynccontextmanager
async def _served(limits: ServerLimits) -> AsyncIterator[Server]:
    server = Server(listen="127.0.0.1:0", metrics_listen=None, service_names=[], limits=limits)

    async def echo(request: bytes, context: ServicerContext) -> bytes:
        return request

    async def join(requests: AsyncIterator[bytes], context: ServicerContext) -> bytes:
        return b"".join([request async for request in requests])

    async def relay(
        requests: AsyncIterator[bytes], context: ServicerContext
    ) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Join": grpc.stream_unary_rpc_method_handler(join),
        "Relay": grpc.stream_stream_rpc_method_handler(relay),
    }
    server.raw.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Raw", handlers),)
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop(grace_s=0)


async def _in_time(call: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """What a call brings whose first message is not late, as one may be on a busy machine."""
    async with asyncio.timeout(GUARD_S):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if from_rpc_error(error).reason != "NO_MESSAGE":
                    raise


async def _error_of(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(GUARD_S):
            await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("method", ["Echo", "Join", "Relay"])
async def test_a_call_without_its_first_message_is_ended(method: str) -> None:
    async with (
        _served(ServerLimits(first_message_timeout_s=0.05)) as server,
        open_channel(server.address) as channel,
    ):
        # Every method can be called as if it were a stream: only its headers are sent.
        call = channel.stream_stream(f"/test.Raw/{method}")(timeout=GUARD_S)
        error = await _error_of(call.read())
        assert isinstance(error, DeadlineExceeded)
        assert error.reason == "NO_MESSAGE"
        # The server's own counters have let it go, and others are served.
        echo = channel.unary_unary("/test.Raw/Echo")
        assert await _in_time(lambda: echo(b"x", timeout=GUARD_S)) == b"x"
        assert server.admission.calls == 0


async def test_a_stream_that_has_begun_may_be_silent() -> None:
    async with (
        _served(ServerLimits(first_message_timeout_s=0.05)) as server,
        open_channel(server.address) as channel,
    ):

        async def begun() -> Any:
            call = channel.stream_stream("/test.Raw/Relay")(timeout=GUARD_S)
            with contextlib.suppress(asyncio.InvalidStateError):  # it has ended: see what it says
                await call.write(b"one")
            assert await call.read() == b"one"
            return call

        call = await _in_time(begun)
        silent = channel.stream_stream("/test.Raw/Relay")(timeout=GUARD_S)
        await _error_of(silent.read())  # so long at least the first one was silent
        await call.write(b"two")
        assert await call.read() == b"two"
        call.cancel()


async def test_a_call_that_ends_before_its_request_is_refused() -> None:
    async with _served(ServerLimits()) as server, open_channel(server.address) as channel:
        call = channel.stream_stream("/test.Raw/Echo")(timeout=GUARD_S)
        await call.done_writing()
        assert (await _error_of(call.read())).reason == "NO_MESSAGE"


async def test_more_calls_than_a_peer_may_have_are_refused_until_others_end() -> None:
    async with (
        _served(ServerLimits(peer_calls_max=2)) as server,
        open_channel(server.address) as channel,
    ):
        held = []
        for _ in range(2):
            call = channel.stream_stream("/test.Raw/Relay")(timeout=GUARD_S)
            await call.write(b"here")
            assert await call.read() == b"here"
            held.append(call)
        echo = channel.unary_unary("/test.Raw/Echo")
        error = await _error_of(echo(b"x", timeout=GUARD_S))
        assert error.reason == "TOO_MANY_CALLS_OF_PEER"
        await held[0].done_writing()
        assert await held[0].read() is grpc.aio.EOF
        assert await echo(b"x", timeout=GUARD_S) == b"x"
        held[1].cancel()


async def test_calls_on_more_connections_than_a_peer_may_have_are_refused() -> None:
    async with (
        _served(ServerLimits(peer_connections_max=2)) as server,
        AsyncExitStack() as stack,
    ):
        for expected in (None, None, "TOO_MANY_CONNECTIONS_OF_PEER"):
            channel = await stack.enter_async_context(
                open_channel(server.address, own_connection=True)
            )
            call = channel.stream_stream("/test.Raw/Relay")(timeout=GUARD_S)
            if expected is None:
                await call.write(b"here")
                assert await call.read() == b"here"
            else:
                # Refused at its headers: what is written races with the answer.
                assert (await _error_of(call.read())).reason == expected


async def test_more_connections_than_there_is_room_for_are_closed_at_once() -> None:
    async with _served(ServerLimits(connections_max=3)) as server:
        host, port = server.address.split(":")
        writers = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection(host, int(port))
            async with asyncio.timeout(GUARD_S):
                assert await reader.readexactly(1)  # the server speaks first: its settings
            writers.append(writer)
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        async with asyncio.timeout(GUARD_S):
            assert await reader.read() == b""
        for writer in writers:
            writer.close()
        # Room is made by those that leave.
        async with open_channel(server.address, own_connection=True) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=GUARD_S, wait_for_ready=True)


async def test_a_connection_without_a_call_is_closed_and_opened_again_when_it_is_needed() -> None:
    async with (
        _served(ServerLimits(idle_connection_s=0.2)) as server,
        open_channel(server.address, own_connection=True) as channel,
    ):
        echo = channel.unary_unary("/test.Raw/Echo")
        assert await echo(b"x", timeout=GUARD_S) == b"x"
        async with asyncio.timeout(GUARD_S):
            while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
        assert await echo(b"y", timeout=GUARD_S) == b"y"
