"""The data plane's stream as gRPC sees it: raw bytes in and out, one reader and one sender each.

Nothing is queued. The reader takes the next message once the last one is in its tree; the sender
looks where its cursor stands whenever the stream has room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from coordinator.aggregation.core.machine import stale_term
from coordinator.aggregation.hosting import HostedJob
from phalanx.errors import Internal, InvalidArgument, PhalanxError, Unavailable
from phalanx.frames import decode_request, encode_response
from phalanx.keys.caller import current_caller
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import aggregation_service_pb2 as pb

SERVICE = "phalanx.v1.AggregationService"
HELLO_TIMEOUT_S = 10.0

_log = get_logger(__name__)

Find = Callable[[str], HostedJob | None]


class ExchangeServicer:
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
        job = self._hosted(hello)
        job.given.show(hello.worker_id, hello.given, "hello.given")
        welcome = pb.ExchangeWelcome(term=job.ranges.term, ranges=job.ranges.range_indexes)
        await context.write(encode_response(pb.ExchangeResponseHeader(welcome=welcome)))
        key = object()
        waker = job.open_stream(key, hello)
        tasks = [
            asyncio.create_task(_send(context, job, key, waker, hello.takes_joined_go_records)),
            asyncio.create_task(_receive(context, job, key, hello.worker_id)),
            asyncio.create_task(job.closed()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            # First, without waiting: gRPC cancels this call for the same broken connection at which
            # its reading may have ended, and then nothing after the wait is done any more.
            job.close_stream(key)
            await asyncio.gather(*tasks, return_exceptions=True)

    def _hosted(self, hello: pb.ExchangeHello) -> HostedJob:
        job = self._find(hello.job_id)
        if job is None or job.ranges.term < hello.term:
            raise Unavailable(
                f"job {hello.job_id} is not held here in term {hello.term} yet; try again",
                reason="RANGES_NOT_READY",
                retry_after_s=0.05,
            )
        if job.ranges.term > hello.term:
            raise stale_term(hello.job_id, hello.term, job.ranges.term)
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


async def _receive(context: Any, job: HostedJob, key: object, worker_id: str) -> None:
    while (data := await context.read()) is not grpc.aio.EOF:
        header, payload = decode_request(data)
        if header.WhichOneof("message") == "frame":
            job.gauges.received(header.frame, len(data), len(payload))
        try:
            _take(job, key, worker_id, header, payload)
        except (Internal, MemoryError) as error:
            # Half of a decision may be taken: the round could never complete any more.
            _log.exception("aggregation_failed", job_id=job.ranges.plan.job_id)
            job.fail("AGGREGATION_FAILED", f"{type(error).__name__}: {error}")
            raise
        # Let the frame go before the next one is waited for.
        del data, payload


def _take(
    job: HostedJob,
    key: object,
    worker_id: str,
    header: pb.ExchangeRequestHeader,
    payload: memoryview,
) -> None:
    """Hand one message to the ranges. Whatever is no error of the sender is raised as Internal."""
    kind = header.WhichOneof("message")
    try:
        if kind == "frame":
            job.given.check_frame(worker_id, header.frame)
            job.contribute(key, header.frame, payload)
        elif kind == "go_record":
            job.go_record(header.go_record)
        elif kind == "starts_wanted":
            wanted = header.starts_wanted
            job.given.check_shards(worker_id, wanted.shards, "starts_wanted.shards")
            job.perform(job.ranges.starts_wanted(key, wanted))
        elif kind == "recall":
            job.perform(job.ranges.recall(key, header.recall))
        elif kind == "given":
            job.given.show(worker_id, header.given, "given")
        else:
            raise InvalidArgument(f"an exchange stream takes frames and go records, not {kind!r}")
    except (PhalanxError, MemoryError):
        raise
    except Exception as error:
        raise Internal(f"{type(error).__name__}: {error}") from error


async def _send(
    context: Any, job: HostedJob, key: object, waker: asyncio.Event, joins: bool
) -> None:
    cursor = job.ranges.cursor(key, joins=joins)
    while True:
        message = job.copying.next_order(key) or cursor.take(job.elapsed_s)
        if message is None:
            waker.clear()
            await waker.wait()
            continue
        job.gauges.sent(message)
        try:
            await context.write(message)
        except asyncio.InvalidStateError as error:
            raise PhalanxError("the stream is closed") from error
        del message
