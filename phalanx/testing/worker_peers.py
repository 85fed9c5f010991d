"""Scripted peers of a worker over real gRPC: a control and an aggregator that tests speak for.

    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        session = await control.next_session()
        await session.send(assign_job=...)
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, values)
        header, payload = await stream.receive_frame()

Every wait has a deadline, which a healthy test never comes near.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from phalanx.errors import PhalanxError
from phalanx.frames import decode_request, encode_response, frame_grid
from phalanx.rpc.credentials import ServerKeys
from phalanx.rpc.ports import open_port, server_options
from phalanx.rpc.status import to_rpc_status
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import coordination_service_pb2_grpc as coordination_grpc
from phalanx.v1 import training_pb2

DEADLINE_S = 30.0


class _ScriptedServer(ABC):
    """With `keys` it speaks TLS only, and to those that have a certificate."""

    def __init__(self, keys: ServerKeys | None = None) -> None:
        self._server = grpc.aio.server(options=server_options())
        self._credentials = keys.credentials(mutual=True) if keys is not None else None
        self.address = ""

    async def __aenter__(self) -> Self:
        self._register(self._server)
        self.address = open_port(self._server, self.address or "127.0.0.1:0", self._credentials)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    @abstractmethod
    def _register(self, server: grpc.aio.Server) -> None:
        """Add the service that is spoken for."""


class ScriptedSession:
    """One session of a worker: what it says is kept until asked for."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._inbox: asyncio.Queue[coordination.SessionRequest] = asyncio.Queue()
        self._set_aside: list[coordination.SessionRequest] = []
        self.hello = coordination.WorkerHello()
        self.heartbeats = 0
        self.logs: list[coordination.JobLogLine] = []
        self.ended = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    async def send(self, generation: int = 1, **message: Any) -> None:
        """Send one message, named as in SessionResponse."""
        await self._context.write(coordination.SessionResponse(generation=generation, **message))

    async def receive(self, kind: str) -> Any:
        """The next message of this kind; others are kept for later."""
        for index, message in enumerate(self._set_aside):
            if message.WhichOneof("message") == kind:
                return getattr(self._set_aside.pop(index), kind)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                message = await self._inbox.get()
                if message.WhichOneof("message") == kind:
                    return getattr(message, kind)
                self._set_aside.append(message)

    def has_received(self, kind: str) -> bool:
        """Whether a message of this kind is waiting."""
        while not self._inbox.empty():
            self._set_aside.append(self._inbox.get_nowait())
        return any(message.WhichOneof("message") == kind for message in self._set_aside)

    async def log_line(self, text: str) -> coordination.JobLogLine:
        """The first log line that contains `text`."""
        while True:
            for line in self.logs:
                if text in line.text:
                    return line
            self.logs += (await self.receive("job_log_lines")).lines

    def break_off(self) -> None:
        """End the session as a dying control would."""
        self.ended.set()

    async def serve(self) -> None:
        """Take messages until the session ends."""
        reader = asyncio.create_task(self._read())
        ender = asyncio.create_task(self.ended.wait())
        await asyncio.wait((reader, ender), return_when=asyncio.FIRST_COMPLETED)
        for task in (reader, ender):
            task.cancel()
        await asyncio.gather(reader, ender, return_exceptions=True)
        self.ended.set()

    async def _read(self) -> None:
        while (message := await self._context.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("message")
            if kind == "heartbeat":
                self.heartbeats += 1
            self._inbox.put_nowait(message)
            await self.reading.wait()


class ScriptedControl(_ScriptedServer, coordination_grpc.CoordinationServiceServicer):
    """Answers hellos with a welcome; everything else is the test's to say."""

    def __init__(
        self, generation: int = 1, address: str = "", keys: ServerKeys | None = None
    ) -> None:
        super().__init__(keys)
        self.address = address
        self.generation = generation
        self.welcome = coordination.Welcome(heartbeat_interval_s=0.05, lease_ttl_s=2.0)
        self._sessions: asyncio.Queue[ScriptedSession] = asyncio.Queue()
        self._open: list[ScriptedSession] = []

    async def next_session(self) -> ScriptedSession:
        """The next session that a worker opens."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._sessions.get()

    async def Session(  # type: ignore[override]
        self, request_iterator: Any, context: Any
    ) -> None:
        """Serve one worker."""
        session = ScriptedSession(context)
        session.hello = (await context.read()).worker_hello
        await session.send(self.generation, welcome=self.welcome)
        self._open.append(session)
        self._sessions.put_nowait(session)
        await session.serve()

    async def __aexit__(self, *details: object) -> None:
        for session in self._open:
            session.break_off()
        await super().__aexit__(*details)

    def _register(self, server: grpc.aio.Server) -> None:
        coordination_grpc.add_CoordinationServiceServicer_to_server(self, server)


class ScriptedStream:
    """One exchange stream of a worker."""

    def __init__(self, hello: exchange.ExchangeHello, context: Any) -> None:
        self.hello = hello
        self._context = context
        self._inbox: asyncio.Queue[tuple[exchange.ExchangeRequestHeader, bytes]] = asyncio.Queue()
        self._ended: asyncio.Future[PhalanxError | None] = (
            asyncio.get_running_loop().create_future()
        )
        self.reading = asyncio.Event()
        self.reading.set()

    async def send_go(self, go: training_pb2.GoRecord) -> None:
        """Send a go record."""
        await self._context.write(encode_response(exchange.ExchangeResponseHeader(go_record=go)))

    async def send_version(
        self,
        version: int,
        range_index: int,
        values: NDArray[Any],
        frames: slice = slice(None),
        term: int | None = None,
    ) -> None:
        """Send a range's part of a version, or some of its frames."""
        for first, count in frame_grid(len(values), values.itemsize)[frames]:
            frame = exchange.VersionFrame(
                term=self.hello.term if term is None else term,
                version=version,
                range=range_index,
                first_element=first,
                element_count=count,
            )
            header = exchange.ExchangeResponseHeader(frame=frame)
            payload = values[first : first + count].tobytes()
            await self._context.write(encode_response(header, payload))

    async def receive(self) -> tuple[exchange.ExchangeRequestHeader, bytes]:
        """The next message from the worker."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._inbox.get()

    async def receive_frame(self) -> tuple[exchange.ContributionFrame, bytes]:
        """The next contribution; fails on anything else."""
        header, payload = await self.receive()
        assert header.WhichOneof("message") == "frame", header
        return header.frame, payload

    async def receive_vector(self, dtype: Any) -> tuple[exchange.ContributionFrame, NDArray[Any]]:
        """All frames of one node of a range in a row: the first header and the whole vector."""
        first, payload = await self.receive_frame()
        parts = [payload]
        while len(b"".join(parts)) < self.range_elements * np.dtype(dtype).itemsize:
            parts.append((await self.receive_frame())[1])
        return first, np.frombuffer(b"".join(parts), dtype)

    range_elements = 0

    def is_silent(self) -> bool:
        """Whether nothing waits to be received."""
        return self._inbox.empty()

    def break_off(self, error: PhalanxError | None = None) -> None:
        """End the stream."""
        if not self._ended.done():
            self._ended.set_result(error)

    async def serve(self) -> None:
        """Take messages until the stream ends."""
        reader = asyncio.create_task(self._read())
        await asyncio.wait((reader, self._ended), return_when=asyncio.FIRST_COMPLETED)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        if self._ended.done():
            error = self._ended.result()
            if error is not None:
                await self._context.abort(*to_rpc_status(error))

    async def _read(self) -> None:
        while True:
            await self.reading.wait()
            data = await self._context.read()
            if data is grpc.aio.EOF:
                return
            header, payload = decode_request(data)
            self._inbox.put_nowait((header, bytes(payload)))


class ScriptedAggregator(_ScriptedServer):
    """Welcomes streams, or refuses them while `refusal` is set."""

    def __init__(self, ranges: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.ranges = ranges
        self.refusal: PhalanxError | None = None
        self.refused = 0
        self._streams: asyncio.Queue[ScriptedStream] = asyncio.Queue()
        self._open: list[ScriptedStream] = []

    async def next_stream(self) -> ScriptedStream:
        """The next stream that a worker opens."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._streams.get()

    async def __aexit__(self, *details: object) -> None:
        for stream in self._open:
            stream.break_off()
        await super().__aexit__(*details)

    def _register(self, server: grpc.aio.Server) -> None:
        handler: Any = grpc.stream_stream_rpc_method_handler(self._exchange)
        service = grpc.method_handlers_generic_handler(
            "phalanx.v1.AggregationService", {"Exchange": handler}
        )
        server.add_generic_rpc_handlers((service,))

    async def _exchange(self, request_iterator: Any, context: Any) -> None:
        header, _ = decode_request(await context.read())
        if self.refusal is not None:
            self.refused += 1
            await context.abort(*to_rpc_status(self.refusal))
        welcome = exchange.ExchangeWelcome(term=header.hello.term, ranges=self.ranges)
        await context.write(encode_response(exchange.ExchangeResponseHeader(welcome=welcome)))
        stream = ScriptedStream(header.hello, context)
        self._open.append(stream)
        self._streams.put_nowait(stream)
        with contextlib.suppress(asyncio.CancelledError):
            await stream.serve()
