"""A TCP proxy that makes the network between two real processes bad on demand.

    with TcpProxy(control.address) as proxy:
        start_worker(control=proxy.address)
        proxy.disturb(to_server=Link(latency_s=0.2, bytes_per_s=125_000))
        proxy.disturb(to_client=Link(black_hole=True))   # one direction only
        proxy.reset()                                    # as a crashed router does
        proxy.heal()

It runs in a thread of its own, so that blocking tests and coroutines can use it alike, and listens
on a free port of 127.0.0.1. Bytes are never lost, doubled or reordered within a connection: TCP
would not allow it. What a black hole swallows is what TCP would send again, so it arrives after the
healing. Every connection has at most a few mebibytes on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeVar

from phalanx.addresses import split_address
from phalanx.errors import Unavailable

GUARD_S = 20.0
"""Longest wait for the proxy's own thread; a guard against a hang, not a measure."""
READ_BYTES = 64 * 1024
_CHUNKS_UNDER_WAY = 64
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

ResultT = TypeVar("ResultT")


class Direction(StrEnum):
    """Which way bytes go: the client is who dialled the proxy."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


@dataclass(frozen=True)
class Link:
    """What one direction does to the bytes of each connection; by default nothing."""

    latency_s: float = 0.0
    """Every byte arrives so much later; others may be under way meanwhile."""
    jitter_s: float = 0.0
    """Up to so much more latency, drawn for each piece; the order stays."""
    bytes_per_s: float = 0.0
    """Bandwidth; 0 for all there is."""
    slice_bytes: int = 0
    """Bytes arrive in pieces of this size, each sent by itself; 0 leaves them as they come."""
    slice_pause_s: float = 0.0
    """Pause between two such pieces."""
    black_hole: bool = False
    """Nothing arrives until this ends; connections stay open."""
    reset_after_bytes: int = 0
    """A connection is reset once so many of its bytes have passed; 0 for never."""


CLEAR = Link()


class TcpProxy:
    """Passes connections on to `target` (HOST:PORT), which may be changed while it runs."""

    def __init__(self, target: str, *, listen: str = "127.0.0.1:0", seed: int = 0) -> None:
        self.target = target
        self.address = ""
        self._listen = listen
        self._random = random.Random(seed)
        self._links = dict.fromkeys(Direction, CLEAR)
        self._refuses = False
        self._connections: set[_Connection] = set()
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(GUARD_S) or not self.address:
            raise Unavailable("the proxy did not start") from self._failure
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset what is open and free the port; harmless when repeated."""
        if self._thread.is_alive() and self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(GUARD_S)

    # What tests do; all of it has happened when the call returns.

    def disturb(
        self,
        *,
        to_server: Link | None = None,
        to_client: Link | None = None,
        both: Link | None = None,
        client_ports: Collection[int] | None = None,
    ) -> None:
        """Set what a direction does from now on, to connections that are open too.

        With `client_ports` only to those that are open now and come from these ports, so that one
        of several clients is cut off.
        """

        def change() -> None:
            links = {
                direction: link
                for direction, link in (
                    (Direction.TO_SERVER, to_server or both),
                    (Direction.TO_CLIENT, to_client or both),
                )
                if link is not None
            }
            if client_ports is None:
                self._links |= links
            for connection in self._connections:
                if client_ports is not None and connection.client_port in client_ports:
                    connection.links |= links
            self._wake()

        self._do(change)

    def heal(self) -> None:
        """End every disturbance; bytes that waited arrive now."""

        def change() -> None:
            self._links = dict.fromkeys(Direction, CLEAR)
            for connection in self._connections:
                connection.links.clear()
            self._refuses = False
            self._wake()

        self._do(change)

    def refuse(self) -> None:
        """Reset every new connection at once, until `heal`; those that are open stay."""

        def change() -> None:
            self._refuses = True

        self._do(change)

    def reset(self) -> int:
        """Reset all connections that are open, on both sides; return how many."""

        def change() -> int:
            open_now = list(self._connections)
            for connection in open_now:
                connection.reset()
            return len(open_now)

        return self._do(change)

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return self._do(lambda: len(self._connections))

    @property
    def accepted(self) -> int:
        """Connections so far, refused ones too."""
        return self._do(lambda: self._counts["accepted"])

    @property
    def resets(self) -> int:
        """Connections that this proxy has reset so far."""
        return self._do(lambda: self._counts["resets"])

    def passed_bytes(self, direction: Direction) -> int:
        """Return how many bytes have been handed on in a direction."""
        return self._do(lambda: self._counts[direction])

    # Inside: everything below runs in the proxy's thread.

    def _do(self, change: Callable[[], ResultT]) -> ResultT:
        if self._loop is None:
            return change()

        async def call() -> ResultT:
            return change()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(GUARD_S)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for the start
            self._failure = error
        finally:
            self._loop = None
            self._started.set()

    async def _serve(self) -> None:
        host, port = split_address(self._listen)
        server = await asyncio.start_server(self._accept, host, port, limit=READ_BYTES)
        self._loop = asyncio.get_running_loop()
        self.address = f"{host}:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._stop.wait()
        server.close()
        for connection in list(self._connections):
            connection.reset()
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._counts["accepted"] += 1
        if self._refuses:
            self._counts["resets"] += 1
            _reset(writer)
            return
        host, port = split_address(self.target)
        try:
            target_reader, target_writer = await asyncio.open_connection(
                host, port, limit=READ_BYTES
            )
        except OSError:
            _reset(writer)
            return
        connection = _Connection((writer, target_writer), self._count_reset)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._pass_on(connection, Direction.TO_SERVER, reader, target_writer),
                self._pass_on(connection, Direction.TO_CLIENT, target_reader, writer),
            )
        except OSError:
            connection.reset(by_proxy=False)
        except asyncio.CancelledError:
            # The proxy ends; asyncio would print it as a failure of its own.
            connection.reset(by_proxy=False)
        finally:
            self._connections.discard(connection)
            connection.close()

    def _count_reset(self) -> None:
        self._counts["resets"] += 1

    async def _pass_on(
        self,
        connection: _Connection,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Hand on one direction until its end; bytes wait in a bounded queue for their time."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_UNDER_WAY)
        sender = asyncio.create_task(self._send(connection, direction, under_way, writer))
        try:
            due_s = 0.0
            while True:
                data = await reader.read(READ_BYTES)
                link = connection.links.get(direction, self._links[direction])
                delay_s = link.latency_s + self._random.uniform(0.0, link.jitter_s)
                due_s = max(due_s, asyncio.get_running_loop().time() + delay_s)
                put = asyncio.ensure_future(under_way.put((due_s, data)))
                await asyncio.wait((put, sender), return_when=asyncio.FIRST_COMPLETED)
                if sender.done():
                    put.cancel()
                    break
                if not data:
                    break
            await sender
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender

    async def _send(
        self,
        connection: _Connection,
        direction: Direction,
        under_way: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
    ) -> None:
        loop = asyncio.get_running_loop()
        passed = 0
        while True:
            due_s, data = await under_way.get()
            await asyncio.sleep(due_s - loop.time())
            if not data:
                await self._link(connection, direction)
                writer.write_eof()
                return
            rest = memoryview(data)
            while rest:
                link = await self._link(connection, direction)
                size = min(len(rest), link.slice_bytes or len(rest), _paced_bytes(link))
                if link.reset_after_bytes:
                    size = min(size, max(0, link.reset_after_bytes - passed))
                    if size == 0:
                        connection.reset()
                        return
                if link.bytes_per_s:
                    await asyncio.sleep(size / link.bytes_per_s)
                writer.write(rest[:size])
                await writer.drain()
                passed += size
                self._counts[direction] += size
                rest = rest[size:]
                if link.slice_pause_s and rest:
                    await asyncio.sleep(link.slice_pause_s)

    async def _link(self, connection: _Connection, direction: Direction) -> Link:
        """Return the link of a connection once it lets bytes through."""
        while True:
            link = connection.links.get(direction, self._links[direction])
            if not link.black_hole:
                return link
            await self._changed.wait()


class _Connection:
    """Both sockets of one connection."""

    def __init__(
        self, writers: tuple[asyncio.StreamWriter, ...], on_reset: Callable[[], None]
    ) -> None:
        self.client_port: int = writers[0].get_extra_info("peername")[1]
        self.links: dict[Direction, Link] = {}
        self._writers = writers
        self._on_reset = on_reset
        self._is_reset = False

    def reset(self, *, by_proxy: bool = True) -> None:
        """End both sides as a crash does, at once and without delivering what is under way."""
        if not self._is_reset:
            self._is_reset = True
            if by_proxy:
                self._on_reset()
            for writer in self._writers:
                _reset(writer)

    def close(self) -> None:
        """Close what is not closed."""
        for writer in self._writers:
            writer.close()


def _paced_bytes(link: Link) -> int:
    """Bytes to send at once: with a bandwidth, what takes about 10 ms, so that it flows."""
    return max(1, int(link.bytes_per_s / 100)) if link.bytes_per_s else READ_BYTES


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
        )
    writer.transport.abort()
