"""Channels to replicas: which one the next call goes to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from phalanx.errors import InvalidArgument, NotFound, Unavailable
from phalanx.rpc import channel as channel_module
from phalanx.rpc.channel import call_with_retry, open_channel
from phalanx.rpc.replicas import ReplicasChannel, blame

GUARD_S = 30.0


class Replica:
    """A server whose method answers with its name, or does what it is told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = "127.0.0.1:0"
        self.answer: grpc.StatusCode | None = None
        self.silent = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        server = self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        methods: dict[str, Any] = {
            "Ask": grpc.unary_unary_rpc_method_handler(self._ask),
            "Talk": grpc.stream_stream_rpc_method_handler(self._talk),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", methods),))
        self.address = f"127.0.0.1:{server.add_insecure_port(self.address)}"
        await server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0.0)
            self._server = None

    async def _ask(self, request: bytes, context: Any) -> bytes:
        if self.answer is not None:
            await context.abort(self.answer, "as told")
        return self.name.encode()

    async def _talk(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        yield self.name.encode()
        await self.silent.wait()


@contextlib.asynccontextmanager
async def two() -> AsyncIterator[tuple[Replica, Replica, ReplicasChannel]]:
    one, other = Replica("one"), Replica("other")
    for each in (one, other):
        await each.start()

    def make(address: str) -> grpc.aio.Channel:
        return open_channel(address, own_connection=True)

    channel = ReplicasChannel([one.address, other.address], make, first=0)
    try:
        yield one, other, channel
    finally:
        await channel.close()
        for each in (one, other):
            await each.stop()


async def ask(channel: grpc.aio.Channel) -> str:
    method = channel.unary_unary("/Test/Ask")
    answer: bytes = await call_with_retry(method, b"", timeout_s=GUARD_S)
    return answer.decode()


async def test_a_retry_reaches_the_other_replica_and_stays_there() -> None:
    async with two() as (one, other, channel):
        assert [await ask(channel) for _ in range(3)] == ["one"] * 3
        await one.stop()
        assert await ask(channel) == "other"
        await one.start()
        assert await ask(channel) == "other"
        await other.stop()
        assert await ask(channel) == "one", "it is dialled anew at once"


@pytest.mark.parametrize("gone", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_what_a_replica_says_itself_is_no_reason_but_that_it_cannot(
    gone: grpc.StatusCode,
) -> None:
    async with two() as (one, _, channel):
        one.answer = grpc.StatusCode.NOT_FOUND
        for _ in range(2):
            with pytest.raises(NotFound):
                await ask(channel)
        one.answer = gone
        assert await ask(channel) == "other"


async def test_calls_that_are_open_end_where_they_are() -> None:
    async with two() as (one, _, channel):
        call = channel.stream_stream("/Test/Talk")()
        assert await call.read() == b"one"
        one.answer = grpc.StatusCode.UNAVAILABLE
        assert await ask(channel) == "other"
        one.silent.set()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_a_stream_that_stands_still_is_blamed_once() -> None:
    async with two() as (_one, _other, channel):
        stuck = [channel.stream_stream("/Test/Talk")() for _ in range(2)]
        assert [await each.read() for each in stuck] == [b"one", b"one"]
        for each in stuck:
            blame(channel, each)
            each.cancel()
        assert await ask(channel) == "other"


async def test_without_any_replica_the_error_is_that_of_one() -> None:
    async with two() as (one, other, channel):
        await one.stop()
        await other.stop()
        with pytest.raises(Unavailable):
            await ask(channel)


async def test_addresses_are_names_as_well_and_all_are_checked() -> None:
    channel = open_channel("storage-1:7420, storage-2:7420")
    assert isinstance(channel, ReplicasChannel)
    assert channel.address in ("storage-1:7420", "storage-2:7420")
    await channel.close()
    with pytest.raises(InvalidArgument):
        open_channel("storage-1:7420,storage-2")


async def test_clients_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    opened: Callable[..., Any] = channel_module.grpc.aio.insecure_channel

    def note(target: str, **options: Any) -> Any:
        made.append(target)
        return opened(target, **options)

    monkeypatch.setattr(channel_module.grpc.aio, "insecure_channel", note)
    for _ in range(64):
        await open_channel("one:1,two:2").close()
    assert set(made) == {"one:1", "two:2"}
