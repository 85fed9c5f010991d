"""One exchange stream: to one aggregator, for one job, in one term; opened again when it breaks.

The sender asks for the next message whenever the stream has room, and holds no queue. A stopped
aggregator blocks this stream and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import grpc
import grpc.aio

from phalanx.errors import Unavailable
from phalanx.frames import decode_response, encode_request
from phalanx.keys.caller import Service
from phalanx.rpc.credentials import ClientKeys
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import training_pb2
from worker.session.streams import STREAM_TIMEOUT_S, both_ways, end_of, keep_open

METHOD = "/phalanx.v1.AggregationService/Exchange"


class StreamEvents(Protocol):
    """What the job does with a stream."""

    def opened(self, aggregator_id: str) -> None:
        """The stream was accepted."""

    def closed(self, aggregator_id: str) -> None:
        """The stream broke."""

    def go_record(self, go: training_pb2.GoRecord) -> None:
        """A go record arrived."""

    def copy_nodes(self, wanted: exchange.CopyNodes) -> None:
        """Copies of late nodes are wanted."""

    def start_leaf(self, start: exchange.StartLeaf) -> None:
        """The root starts a leaf here."""

    def version_frame(self, frame: exchange.VersionFrame, payload: memoryview) -> None:
        """A part of a version arrived."""

    def owner_said(self, header: exchange.ExchangeResponseHeader, payload: memoryview) -> None:
        """Another message of the owner of a range arrived: with all-reduce."""

    def next_message(self, aggregator_id: str) -> bytes | None:
        """What to send next, encoded; None: nothing now."""


class ExchangeStream:
    """Keeps a stream open until `close`."""

    def __init__(
        self,
        aggregator_id: str,
        address: str,
        hello: exchange.ExchangeHello,
        events: StreamEvents,
        keys: ClientKeys | None = None,
        owner: Service = Service.AGGREGATOR,
    ) -> None:
        self.job_id = hello.job_id
        self.owner_id = aggregator_id
        self._hello = hello
        self._events = events
        self._something = asyncio.Event()
        self._task = asyncio.create_task(keep_open(self, address, keys, owner))

    def wake(self) -> None:
        """There may be something to send."""
        self._something.set()

    async def close(self) -> None:
        """End the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def open(self, channel: grpc.aio.Channel) -> Any:
        """See `OwnerStream`."""
        return channel.stream_stream(METHOD)(timeout=STREAM_TIMEOUT_S)

    async def greet(self, call: Any) -> None:
        """See `OwnerStream`."""
        await call.write(encode_request(exchange.ExchangeRequestHeader(hello=self._hello)))
        await self._welcomed(call)

    async def talk(self, call: Any) -> None:
        """See `OwnerStream`."""
        self._events.opened(self.owner_id)
        await both_ways(self._send(call), self._receive(call))

    def closed(self) -> None:
        """See `OwnerStream`."""
        self._events.closed(self.owner_id)

    # Inside

    async def _welcomed(self, call: Any) -> None:
        data = await call.read()
        if data is grpc.aio.EOF:
            raise await end_of(call)
        header, _ = decode_response(data)
        if header.WhichOneof("message") != "welcome":
            raise Unavailable("the aggregator did not answer the hello", reason="NO_WELCOME")

    async def _send(self, call: Any) -> None:
        while True:
            message = self._events.next_message(self.owner_id)
            if message is None:
                self._something.clear()
                await self._something.wait()
            else:
                await call.write(message)

    async def _receive(self, call: Any) -> None:
        while True:
            data = await call.read()
            if data is grpc.aio.EOF:
                raise await end_of(call)
            header, payload = decode_response(data)
            kind = header.WhichOneof("message")
            if kind == "frame":
                self._events.version_frame(header.frame, payload)
                if header.HasField("joined_go_record"):
                    self._events.go_record(header.joined_go_record)
            elif kind == "go_record":
                self._events.go_record(header.go_record)
            elif kind == "start_leaf":
                self._events.start_leaf(header.start_leaf)
            elif kind == "copy_nodes":
                self._events.copy_nodes(header.copy_nodes)
            elif kind in ("reduced", "state", "version_asked"):
                self._events.owner_said(header, payload)
