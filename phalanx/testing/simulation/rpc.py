"""`grpc.aio` on the simulated network: what our services use of it, with its errors and its ends.

A call is two pipes. What gRPC promises holds: messages arrive in order, a status ends a call, a
deadline ends it at the caller's side only, a dead peer breaks it. What it does not promise does
not: a call whose answer was lost may have been carried out, and a blocked link keeps a request
until long after its caller has given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any

import grpc
import grpc.aio

from phalanx.testing.simulation.loop import Process, World
from phalanx.testing.simulation.network import Network, Pipe

CONNECT_TIMEOUT_S = 5.0
WINDOW_MESSAGES = 64
"""Messages under way or unread on one direction of a call before its writer waits."""

Code = grpc.StatusCode
Status = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]
Serialize = Callable[[Any], bytes]


def _same(data: Any) -> Any:
    return data


class _Half:
    """What one side of a call sends, with gRPC's flow control, and what it has received."""

    __slots__ = ("_room", "_waiter", "arrived", "done_writing", "eof", "pipe", "unread")

    def __init__(self) -> None:
        self.pipe: Pipe | None = None
        self.arrived: deque[bytes] = deque()
        self.eof = False
        self.done_writing = False
        self.unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def received(self, data: bytes) -> None:
        self.arrived.append(data)
        self.wake()

    def ended(self) -> None:
        self.eof = True
        self.wake()

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def next(self, other: _Half) -> bytes | None:
        """The next message; None at the end."""
        while not self.arrived:
            if self.eof:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        other.consumed()
        return self.arrived.popleft()

    def consumed(self) -> None:
        self.unread -= 1
        if self._room is not None and self.unread < WINDOW_MESSAGES and self.pipe is not None:
            room, self._room = self._room, None
            self.pipe.network.world.loop.call_soon_for(self.pipe.sender, _release, room)

    def open_room(self) -> None:
        """Let a waiting writer go on, to find that the call is over."""
        room, self._room = self._room, None
        if room is not None:
            _release(room)

    async def send(self, data: bytes) -> None:
        assert self.pipe is not None
        self.unread += 1
        self.pipe.send("message", data)
        if self.unread >= WINDOW_MESSAGES:
            self._room = asyncio.get_running_loop().create_future()
            await self._room


class Call:
    """One call: the client's half, the server's half, the pipes between them."""

    def __init__(
        self,
        network: Network,
        client: Process,
        server: Process,
        path: str,
        client_half: _Half,
        on_client: Callable[[str, Any], None],
        handler_of: SimulatedServer,
        *,
        exact: bool,
    ) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.path = path
        network.calls_made += 1
        self.number = network.calls_made
        self.client_half = client_half
        self.server_half = _Half()
        self._on_client = on_client
        self._server_of = handler_of
        self.context: ServerContext | None = None
        self.up = network.pipe(client, server, self._server_hears)
        self.down = network.pipe(server, client, self._client_hears)
        client_half.pipe = self.up
        self.server_half.pipe = self.down
        self.client_over = False
        self.up.exact = self.down.exact = exact
        network.calls[self.number] = self

    def _server_hears(self, kind: str, content: Any) -> None:
        if kind == "message":
            self.server_half.received(content)
        elif kind in {"start", "request"}:
            self.context = ServerContext(self)
            if kind == "request":
                self.server_half.arrived.append(content)
                self.server_half.eof = True
            self._server_of.accept(self.context)
        elif kind == "half-close":
            self.server_half.ended()
        elif self.context is not None:
            self.context.broken()

    def _client_hears(self, kind: str, content: Any) -> None:
        if self.client_over:
            return
        if kind == "message":
            self.client_half.received(content)
            return
        if content is not None and content[1] is not None:
            self.client_half.arrived.append(content[1])
        self.over()
        self._on_client(kind, content)

    def over(self) -> None:
        """The client needs the call no more."""
        self.client_over = True
        self.down.close()
        if self.context is None or self.context.finished:
            self.forget()

    def forget(self) -> None:
        """Both sides are through."""
        self.network.calls.pop(self.number, None)

    def break_off(self) -> None:
        """The connection breaks: both ends learn of it, in no order."""
        loop = self.network.world.loop
        if self.client.alive and not self.client_over:
            loop.call_soon_for(self.client, self._client_hears, "reset", None)
        if self.context is not None and self.server.alive and not self.context.finished:
            loop.call_soon_for(self.server, self.context.broken)
        self.up.close()
        self.forget()

    def peer_died(self, process: Process) -> None:
        """The kernel of a dead process tells the other end, if it can be reached."""
        pipe = self.down if process is self.server else self.up
        pipe.push("reset", None)


class ServerContext:
    """The server's end of a call, as handlers see it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.finished = False
        self.task: asyncio.Task[None] | None = None
        self._code: grpc.StatusCode | None = None
        self._status: Status | None = None

    async def read(self) -> Any:
        data = await self.call.server_half.next(self.call.client_half)
        return grpc.aio.EOF if data is None else data

    async def write(self, message: Any) -> None:
        if self.finished:
            raise asyncio.InvalidStateError("the call is over")
        data = self.serialize(message)
        await self.call.server_half.send(data)

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: tuple[tuple[str, bytes], ...] = (),
    ) -> None:
        self._status = (code, details, trailing_metadata)
        self._code = code
        raise grpc.aio.AbortError("aborted by the handler")

    def code(self) -> grpc.StatusCode | int:
        return self._code or 0

    def peer(self) -> str:
        return f"ipv4:{self.call.client.name}:1"

    def cancelled(self) -> bool:
        return self.finished

    serialize: Serialize = staticmethod(_same)

    async def run(self, handler: Any) -> None:
        """Run the handler to its end and send what it returns, and the status."""
        self.serialize = handler.response_serializer or _same
        status: Status = (Code.OK, "", ())
        answer: bytes | None = None
        try:
            behaviour, request = self._prepared(handler)
            if not handler.request_streaming:
                data = await self.call.server_half.next(self.call.client_half)
                request = handler.request_deserializer or _same
                request = request(data or b"")
            response = await behaviour(request, self)
            if not handler.response_streaming and not self.finished:
                answer = self.serialize(response)
        except grpc.aio.AbortError:
            status = self._status or status
        except asyncio.CancelledError:
            status = (Code.CANCELLED, "cancelled", ())
        if not self.finished:
            self.finished = True
            self.call.down.send(f"status {status[0].name}", (status, answer))
        self._end()

    def _prepared(self, handler: Any) -> tuple[Any, Any]:
        behaviour = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        decode = handler.request_deserializer or _same
        return behaviour, self._requests(decode) if handler.request_streaming else None

    async def _requests(self, decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while (data := await self.call.server_half.next(self.call.client_half)) is not None:
            yield decode(data)

    def broken(self) -> None:
        """The client is gone or has cancelled: the handler is cancelled."""
        if not self.finished:
            self.finished = True
            self.call.server_half.ended()
            if self.task is not None:
                self.task.cancel()

    def _end(self) -> None:
        self.call.up.close()
        if self.call.client_over:
            self.call.forget()


class SimulatedServer:
    """Stands in for `grpc.aio.server(...)`."""

    def __init__(
        self, world: World, network: Network, interceptors: Sequence[Any] | None = None, **_: Any
    ) -> None:
        self.world = world
        self.network = network
        self.process = world.loop.current
        self._interceptors = list(interceptors or ())
        self._generic: list[Any] = []
        self._handlers: dict[str, Any] = {}
        self._address = ""
        self._running: dict[int, ServerContext] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._generic.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Registered methods are found through the generic handlers."""

    def add_insecure_port(self, address: str) -> int:
        self._address = address
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        self.network.servers[self._address] = self

    async def stop(self, grace: float | None) -> None:
        if not self.process.alive:
            return
        if self.network.servers.get(self._address) is self:
            del self.network.servers[self._address]
        for context in list(self._running.values()):
            context.call.break_off()
        await asyncio.sleep(0)

    def accept(self, context: ServerContext) -> None:
        """A call has come in."""
        self._running[context.call.number] = context
        context.task = asyncio.get_running_loop().create_task(self._serve(context))

    async def _serve(self, context: ServerContext) -> None:
        try:
            path = context.call.path
            handler = self._handlers.get(path)
            if handler is None:
                handler = self._handlers[path] = await self._find(path)
            await context.run(handler)
        finally:
            self._running.pop(context.call.number, None)

    async def _find(self, path: str) -> Any:
        details = _Details(path)

        async def continuation(details: _Details) -> Any:
            for generic in self._generic:
                handler = generic.service(details)
                if handler is not None:
                    return handler
            raise LookupError(f"no method {path}")

        if not self._interceptors:
            return await continuation(details)
        return await self._interceptors[0].intercept_service(continuation, details)


class _Details:
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


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
    ) -> None:
        self._channel = channel
        self._serialize = serialize
        self._deserialize = deserialize
        self._half = _Half()
        self._status: Status | None = None
        self._cancelled = False
        self._over: asyncio.Future[None] | None = None
        self._call: Call | None = None
        self._feeder: asyncio.Task[None] | None = None
        loop = channel.world.loop
        self._timer = loop.call_later(timeout, self._too_late) if timeout is not None else None
        channel.open_calls[id(self)] = self
        self._connect(path, request)

    def _connect(self, path: str, request: bytes | None) -> None:
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
        self._call = Call(
            network,
            channel.client,
            server.process,
            path,
            self._half,
            self._hears,
            server,
            exact=self._serialize is _same,
        )
        if request is None:
            self._call.up.send("start", path.encode())
        else:
            self._half.done_writing = True
            self._half.unread += 1
            self._call.up.send("request", request)

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
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    async def _wait(self) -> Status:
        while self._status is None:
            if self._over is None:
                self._over = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._over)
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
        await self._half.send(self._serialize(message))
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
            data = await self._next()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if data is None:
            await self.raise_for_status()
            return grpc.aio.EOF
        return self._deserialize(data)

    async def _next(self) -> bytes | None:
        if self._call is None:
            await self._wait()
            return None
        return await self._half.next(self._call.server_half)

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
            return make(timeout, request)

        return call

    unary_stream = unary_unary

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
    ) -> Callable[[float | None, Any], ClientCall]:
        given = dict(
            zip(("request_serializer", "response_deserializer"), serializers, strict=False)
        )
        given.update(more)
        serialize = given.get("request_serializer") or _same
        deserialize = given.get("response_deserializer") or _same

        def make(timeout: float | None, request: Any) -> ClientCall:
            data = None if request is None else serialize(request)
            return ClientCall(self, path, serialize, deserialize, timeout, data)

        return make


def process_died(network: Network, process: Process) -> None:
    """Have the peers of a dead process see their connections end."""
    for call in list(network.calls.values()):
        if call.server is process or call.client is process:
            call.peer_died(process)


def _release(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
