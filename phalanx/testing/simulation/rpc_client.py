"""`grpc.aio` on the simulated network: the client's end of calls; see `rpc`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import grpc
import grpc.aio

from phalanx.testing.simulation.loop import World
from phalanx.testing.simulation.network import Network
from phalanx.testing.simulation.rpc import (
    Call,
    Code,
    Half,
    Serialize,
    SimulatedServer,
    Status,
    same,
)

CONNECT_TIMEOUT_S = 5.0


class ClientCall:
    """The client's end of a call, of any kind."""

    def __init__(
        self,
        channel: SimulatedChannel,
        path: str,
        serialize: Serialize,
        deserialize: Callable[[bytes], Any],
        timeout: float | None,
        request: bytes | None,
        wrong: str = "",
    ) -> None:
        """`wrong` is one of `Misdelivery.KINDS`; empty: all goes well."""
        self._channel = channel
        self._serialize = serialize
        self._deserialize = deserialize
        self._half = Half()
        self._status: Status | None = None
        self._cancelled = False
        self._waiting: list[asyncio.Future[None]] = []
        self._call: Call | None = None
        self._feeder: asyncio.Task[None] | None = None
        loop = channel.world.loop
        self._timer = loop.call_later(timeout, self._too_late) if timeout is not None else None
        channel.open_calls[id(self)] = self
        self._connect(path, request, wrong)

    def _connect(self, path: str, request: bytes | None, wrong: str) -> None:
        channel = self._channel
        network, loop = channel.network, channel.world.loop
        server = network.servers.get(channel.address)
        if server is None or not server.process.alive:
            wait_s = 2 * network.latency_s((channel.client.name, channel.address))
            loop.call_later(wait_s, self._refused, "connection refused")
            return
        blocked = network.is_blocked(channel.client.name, server.process.name)
        if blocked and channel.connected is not server:
            loop.call_later(CONNECT_TIMEOUT_S, self._refused, "no answer to the connection")
            return
        channel.connected = server
        if request is None:
            self._call = self._call_to(server, path, self._half)
            self._call.up.send("start", path.encode())
            return
        if wrong:
            network.misdelivered[wrong] += 1
        if network.misdelivery is not None and wrong in ("late", "twice"):
            again = self._call_to(server, path, Half())
            again.push_later(request, network.misdelivery.delay_s())
        if wrong == "late":
            loop.call_later(0.0, self._refused, "the connection was reset")
            return
        self._call = self._call_to(server, path, self._half)
        self._call.loses_answer = wrong == "lost"
        self._half.done_writing = True
        self._half.unread += 1
        self._call.up.send("request", request)

    def _call_to(self, server: SimulatedServer, path: str, half: Half) -> Call:
        channel = self._channel
        return Call(
            channel.network,
            channel.client,
            server.process,
            path,
            half,
            self._hears,
            server,
            exact=self._serialize is same,
        )

    # What ends a call

    def _hears(self, kind: str, content: Any) -> None:
        if kind == "reset":
            self._finish((Code.UNAVAILABLE, "the connection was reset", ()))
        else:
            self._finish(content[0])

    def _refused(self, why: str) -> None:
        self._finish((Code.UNAVAILABLE, why, ()))

    def _too_late(self) -> None:
        self._leave((Code.DEADLINE_EXCEEDED, "Deadline Exceeded", ()))

    def _leave(self, status: Status) -> None:
        """End the call from this side; the server hears of it later."""
        if self._status is None:
            if self._call is not None:
                self._call.up.send("cancel")
                self._call.over()
            self._finish(status)

    def _finish(self, status: Status) -> None:
        if self._status is not None:
            return
        self._status = status
        self._channel.open_calls.pop(id(self), None)
        if self._timer is not None:
            self._timer.cancel()
        if self._feeder is not None:
            self._feeder.cancel()
        self._half.ended()
        self._half.open_room()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self) -> Status:
        if self._status is None:
            waiter = self._channel.world.loop.create_future()
            self._waiting.append(waiter)
            await waiter
        assert self._status is not None
        return self._status

    # What callers use

    def cancel(self) -> bool:
        if self._status is not None:
            return False
        self._cancelled = True
        self._leave((Code.CANCELLED, "Locally cancelled by application!", ()))
        return True

    def cancelled(self) -> bool:
        return self._cancelled

    def done(self) -> bool:
        return self._status is not None

    async def code(self) -> grpc.StatusCode:
        return (await self._wait())[0]

    async def details(self) -> str:
        return (await self._wait())[1]

    async def initial_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ()

    async def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return (await self._wait())[2]

    async def raise_for_status(self) -> None:
        status = await self._wait()
        if self._cancelled:
            raise asyncio.CancelledError
        if status[0] is not Code.OK:
            metadata: Any = ()
            trailing: Any = status[2]
            raise grpc.aio.AioRpcError(status[0], metadata, trailing, details=status[1])

    async def write(self, message: Any) -> None:
        if self._status is not None or self._half.done_writing:
            raise asyncio.InvalidStateError("RPC already finished.")
        if self._call is None:
            await self.raise_for_status()
            return
        room = self._half.send(self._serialize(message))
        if room is not None:
            await room
        if self.done():
            await self.raise_for_status()

    async def done_writing(self) -> None:
        self.half_close()

    def half_close(self) -> None:
        self._half.done_writing = True
        if self._call is not None:
            self._call.up.send("half-close")

    def feed(self, messages: AsyncIterator[Any]) -> None:
        """Send the requests of an iterator."""
        self._feeder = asyncio.get_running_loop().create_task(self._feed(messages))

    async def _feed(self, messages: AsyncIterator[Any]) -> None:
        try:
            async for message in messages:
                await self.write(message)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            return
        self._feeder = None
        self.half_close()

    async def read(self) -> Any:
        try:
            if self._call is not None:
                data = await self._half.next(self._call.server_half)
            else:
                data = None
                await self._wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if data is None:
            await self.raise_for_status()
            return grpc.aio.EOF
        return self._deserialize(data)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._unary().__await__()

    async def _unary(self) -> Any:
        try:
            await self._wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        await self.raise_for_status()
        return self._deserialize(self._half.arrived.popleft())

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._responses()

    async def _responses(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class SimulatedChannel:
    """Stands in for `grpc.aio.insecure_channel(...)`."""

    def __init__(self, world: World, network: Network, target: str) -> None:
        self.world = world
        self.network = network
        self.address = target
        self.client = world.loop.current
        self.connected: SimulatedServer | None = None
        self.open_calls: dict[int, ClientCall] = {}

    async def close(self, grace: float | None = None) -> None:
        for call in list(self.open_calls.values()):
            call.cancel()

    def unary_unary(self, path: str, *serializers: Any, **more: Any) -> Any:
        make = self._maker(path, serializers, more)

        def call(request: Any, *, timeout: float | None = None, **_: Any) -> ClientCall:
            misdelivery = self.network.misdelivery
            return make(timeout, request, "" if misdelivery is None else misdelivery.draw(path))

        return call

    def unary_stream(self, path: str, *serializers: Any, **more: Any) -> Any:
        make = self._maker(path, serializers, more)

        def call(request: Any, *, timeout: float | None = None, **_: Any) -> ClientCall:
            return make(timeout, request)

        return call

    def stream_unary(self, path: str, *serializers: Any, **more: Any) -> Any:
        make = self._maker(path, serializers, more)

        def call(
            requests: AsyncIterator[Any] | None = None, *, timeout: float | None = None, **_: Any
        ) -> ClientCall:
            made = make(timeout, None)
            if requests is not None:
                made.feed(requests)
            return made

        return call

    stream_stream = stream_unary

    def _maker(
        self, path: str, serializers: tuple[Any, ...], more: dict[str, Any]
    ) -> Callable[..., ClientCall]:
        given = dict(
            zip(("request_serializer", "response_deserializer"), serializers, strict=False)
        )
        given.update(more)
        serialize = given.get("request_serializer") or same
        deserialize = given.get("response_deserializer") or same

        def make(timeout: float | None, request: Any, wrong: str = "") -> ClientCall:
            data = None if request is None else serialize(request)
            return ClientCall(self, path, serialize, deserialize, timeout, data, wrong)

        return make
