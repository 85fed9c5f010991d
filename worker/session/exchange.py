"""One exchange stream: to one aggregator, for one job, in one term; opened again when it breaks.

The sender asks for the next message whenever the stream has room, and holds no queue. A stopped
aggregator blocks this stream and nothing else.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, Protocol

import grpc
import grpc.aio

from phalanx.errors import Aborted, Internal, PhalanxError, Unavailable
from phalanx.frames import decode_response, encode_request
from phalanx.rpc.channel import open_channel
from phalanx.rpc.status import from_rpc_error
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import training_pb2
from worker.session.streams import both_ways, end_of

METHOD = "/phalanx.v1.AggregationService/Exchange"

STREAM_TIMEOUT_S = 24 * 3600.0
"""A stream is renewed after that time; every call has a deadline."""

WELCOME_TIMEOUT_S = 10.0
_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 2.0
_NOT_READY_WAIT_MAX_S = 0.1

_log = get_logger(__name__)


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
    ) -> None:
        self.aggregator_id = aggregator_id
        self._address = address
        self._hello = hello
        self._events = events
        self._something = asyncio.Event()
        self._task = asyncio.create_task(self._keep_open())

    def wake(self) -> None:
        """There may be something to send."""
        self._something.set()

    async def close(self) -> None:
        """End the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # Inside

    async def _keep_open(self) -> None:
        channel = open_channel(self._address, own_connection=True)
        wait_s = _FIRST_WAIT_S
        try:
            while True:
                was_open, error = await self._once(channel)
                if was_open:
                    wait_s = _FIRST_WAIT_S
                limit_s = _LONGEST_WAIT_S
                if isinstance(error, Unavailable) and error.reason == "RANGES_NOT_READY":
                    limit_s = _NOT_READY_WAIT_MAX_S
                elif isinstance(error, Aborted):
                    # Another term is in force; control's next assignment closes this stream.
                    wait_s = limit_s / 2
                _log.info(
                    "exchange_stream_ended",
                    job_id=self._hello.job_id,
                    aggregator_id=self.aggregator_id,
                    reason=error.reason,
                    message=error.message,
                )
                await asyncio.sleep(min(wait_s, limit_s) * random.uniform(0.5, 1.0))
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        finally:
            await channel.close()

    async def _once(self, channel: grpc.aio.Channel) -> tuple[bool, PhalanxError]:
        """Run one stream to its end: whether it was accepted, and why it ended."""
        call: Any = channel.stream_stream(METHOD)(timeout=STREAM_TIMEOUT_S)
        opened = False
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(encode_request(exchange.ExchangeRequestHeader(hello=self._hello)))
                await self._welcomed(call)
            opened = True
            self._events.opened(self.aggregator_id)
            await self._both_ways(call)
        except grpc.aio.AioRpcError as error:
            return opened, from_rpc_error(error)
        except TimeoutError:
            return opened, Unavailable("the aggregator accepts no stream", reason="NO_WELCOME")
        except asyncio.InvalidStateError:
            return opened, await end_of(call)
        except PhalanxError as error:
            return opened, error
        except Exception as error:  # noqa: BLE001 - without this stream the job would stand still
            _log.exception("exchange_stream_failed", job_id=self._hello.job_id)
            return False, Internal(f"{type(error).__name__}: {error}")
        finally:
            call.cancel()
            if opened:
                self._events.closed(self.aggregator_id)
        return opened, Unavailable("the aggregator ended the stream", reason="STREAM_ENDED")

    async def _welcomed(self, call: Any) -> None:
        data = await call.read()
        if data is grpc.aio.EOF:
            raise await end_of(call)
        header, _ = decode_response(data)
        if header.WhichOneof("message") != "welcome":
            raise Unavailable("the aggregator did not answer the hello", reason="NO_WELCOME")

    async def _both_ways(self, call: Any) -> None:
        """Send and receive until either ends."""
        await both_ways(self._send(call), self._receive(call))

    async def _send(self, call: Any) -> None:
        while True:
            message = self._events.next_message(self.aggregator_id)
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
