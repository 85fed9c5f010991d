"""`grpc.aio` on the simulated network: calls and the server's end of them, with their errors.

A call is two pipes. What gRPC promises holds: messages arrive in order, a status ends a call, a
deadline ends it at the caller's side only, a dead peer breaks it. What it does not promise does
not: a call whose answer was lost may have been carried out, and a blocked link keeps a request
until long after its caller has given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from phalanx.rpc import protocol
from phalanx.testing.simulation.loop import Process, World
from phalanx.testing.simulation.network import Network, Pipe

WINDOW_MESSAGES = 64
"""Messages under way or unread on one direction of a call before its writer waits."""

Code = grpc.StatusCode
Status = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]
Serialize = Callable[[Any], bytes]


def same(data: Any) -> Any:
    """Leave raw bytes as they are: what stands for a missing serializer."""
    return data


class Half:
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

    async def next(self, other: Half) -> bytes | None:
        """The next message; None at the end."""
        arrived = self.arrived
        while not arrived:
            if self.eof:
                return None
            self._waiter = waiter = asyncio.get_running_loop().create_future()
            await waiter
        # What `other` has under way or unread is one less.
        other.unread -= 1
        if other._room is not None:
            other.consumed()
        return arrived.popleft()

    def consumed(self) -> None:
        """The other side took a message, and this one's writer waits for room."""
        if self._room is not None and self.unread < WINDOW_MESSAGES and self.pipe is not None:
            room, self._room = self._room, None
            self.pipe.network.world.loop.call_soon_for(self.pipe.sender, _release, room)

    def open_room(self) -> None:
        """Let a waiting writer go on, to find that the call is over."""
        room, self._room = self._room, None
        if room is not None:
            _release(room)

    def send(self, data: bytes) -> asyncio.Future[None] | None:
        """Send a message; returns what to wait for where the window is full now."""
        assert self.pipe is not None
        self.unread += 1
        self.pipe.send("message", data)
        if self.unread < WINDOW_MESSAGES:
            return None
        self._room = asyncio.get_running_loop().create_future()
        return self._room


class Call:
    """One call: the client's half, the server's half, the pipes between them."""

    def __init__(
        self,
        network: Network,
        client: Process,
        server: Process,
        path: str,
        client_half: Half,
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
        self.server_half = Half()
        self._on_client = on_client
        self._server_of = handler_of
        self.context: ServerContext | None = None
        self.up = network.pipe(client, server, self._server_hears)
        self.down = network.pipe(server, client, self._client_hears)
        client_half.pipe = self.up
        self.server_half.pipe = self.down
        self.client_over = False
        self.loses_answer = False
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

    def push_later(self, request: bytes, after_s: float) -> None:
        """Have the request arrive later, whatever became of its client, who hears no answer."""
        world = self.network.world
        self.client_half.done_writing = True
        self.client_half.unread += 1
        world.at(world.now_s + after_s, lambda: self.up.push("request", request))
        self.over()

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

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """All processes of a simulation run this code."""
        return (("user-agent", protocol.user_agent()),)

    async def read(self) -> Any:
        data = await self.call.server_half.next(self.call.client_half)
        return grpc.aio.EOF if data is None else self.deserialize(data)

    async def write(self, message: Any) -> None:
        if self.finished:
            raise asyncio.InvalidStateError("the call is over")
        room = self.call.server_half.send(self.serialize(message))
        if room is not None:
            await room

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

    serialize: Serialize = staticmethod(same)
    deserialize: Callable[[bytes], Any] = staticmethod(same)

    async def run(self, handler: Any) -> None:
        """Run the handler to its end and send what it returns, and the status."""
        self.serialize = handler.response_serializer or same
        self.deserialize = handler.request_deserializer or same
        status: Status = (Code.OK, "", ())
        answer: bytes | None = None
        try:
            behaviour, request = self._prepared(handler)
            if not handler.request_streaming:
                data = await self.call.server_half.next(self.call.client_half)
                request = handler.request_deserializer or same
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
            if self.call.loses_answer:
                self.call.down.send("reset", None)
            else:
                self.call.down.send(f"status {status[0].name}", (status, answer))
        self._end()

    def _prepared(self, handler: Any) -> tuple[Any, Any]:
        behaviour = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        decode = handler.request_deserializer or same
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


def process_died(network: Network, process: Process) -> None:
    """Have the peers of a dead process see their connections end."""
    for call in list(network.calls.values()):
        if call.server is process or call.client is process:
            call.peer_died(process)


def _release(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
