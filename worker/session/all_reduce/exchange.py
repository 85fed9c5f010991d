"""The streams that other members of an all-reduce job open to this worker.

Nothing is queued: the reader takes the next message once the last one is in its tree, the sender
looks into the log of what is reduced whenever the stream has room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from phalanx.errors import Internal, InvalidArgument, PhalanxError, Unavailable
from phalanx.frames import decode_request, encode_response
from phalanx.keys.caller import current_caller
from phalanx.v1 import aggregation_service_pb2 as pb
from worker.core.all_reduce.owner import stale_term

SERVICE = "phalanx.v1.AggregationService"
HELLO_TIMEOUT_S = 10.0


class Served(Protocol):
    """A job as the streams of its other members see it."""

    @property
    def term(self) -> int:
        """The term in which this worker is a member."""
        ...

    @property
    def joined(self) -> bool:
        """Members may open streams."""
        ...

    def open_member(self, key: object, hello: pb.ExchangeHello) -> asyncio.Event:
        """A member's stream is open; the event is set whenever there may be something to send."""
        ...

    def close_member(self, key: object) -> None:
        """It has ended."""
        ...

    def member_said(
        self, key: object, header: pb.ExchangeRequestHeader, payload: memoryview
    ) -> None:
        """Take one message."""
        ...

    def next_served(self, key: object) -> bytes | None:
        """What to send next."""
        ...

    async def term_over(self) -> None:
        """Wait for the end of the term, then raise what ends its streams."""
        ...


Find = Callable[[str], Served | None]


class MemberExchange:
    """Serves `Exchange`; `find` looks a job up by its id."""

    def __init__(self, find: Find) -> None:
        self._find = find

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the method with handlers of raw bytes."""
        method: Any = grpc.stream_stream_rpc_method_handler(self.exchange)
        handler = grpc.method_handlers_generic_handler(SERVICE, {"Exchange": method})
        server.add_generic_rpc_handlers((handler,))

    async def exchange(self, _: Any, context: Any) -> None:
        """Run one stream from hello to end."""
        hello = await _hello(context)
        job = self._joined(hello)
        welcome = pb.ExchangeWelcome(term=job.term)
        over = asyncio.create_task(job.term_over())
        key = object()
        tasks = [over]
        try:
            await context.write(encode_response(pb.ExchangeResponseHeader(welcome=welcome)))
            waker = job.open_member(key, hello)
            tasks += [
                asyncio.create_task(_send(context, job, key, waker)),
                asyncio.create_task(_receive(context, job, key)),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            # First, without waiting: gRPC cancels this call for the same broken connection at which
            # its reading may have ended, and then nothing after the wait is done any more.
            job.close_member(key)
            await asyncio.gather(*tasks, return_exceptions=True)

    def _joined(self, hello: pb.ExchangeHello) -> Served:
        job = self._find(hello.job_id)
        if job is None or not job.joined or job.term < hello.term:
            raise Unavailable(
                f"job {hello.job_id} is not here in term {hello.term} yet; try again",
                reason="RANGES_NOT_READY",
                retry_after_s=0.05,
            )
        if job.term > hello.term:
            raise stale_term(hello.job_id, hello.term, job.term)
        return job


async def _hello(context: Any) -> pb.ExchangeHello:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            data = await context.read()
    except TimeoutError:
        raise InvalidArgument(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
    if data is grpc.aio.EOF:
        raise InvalidArgument("the stream ended before its hello")
    header, _ = decode_request(data)
    if header.WhichOneof("message") != "hello":
        raise InvalidArgument("the first message of an exchange stream must be a hello")
    current_caller().check_member(header.hello.worker_id, "hello.worker_id")
    return header.hello


async def _receive(context: Any, job: Served, key: object) -> None:
    while (data := await context.read()) is not grpc.aio.EOF:
        header, payload = decode_request(data)
        try:
            job.member_said(key, header, payload)
        except (PhalanxError, MemoryError):
            raise
        except Exception as error:
            raise Internal(f"{type(error).__name__}: {error}") from error
        # Let the frame go before the next one is waited for.
        del data, payload


async def _send(context: Any, job: Served, key: object, waker: asyncio.Event) -> None:
    while True:
        message = job.next_served(key)
        if message is None:
            waker.clear()
            await waker.wait()
            continue
        try:
            await context.write(message)
        except asyncio.InvalidStateError as error:
            raise PhalanxError("the stream is closed") from error
        del message
