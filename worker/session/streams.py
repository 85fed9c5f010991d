"""What all streams of the session process do alike.

They are opened again when they break, begin with a hello that is answered, run both directions and
tell why they ended.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, Protocol

import grpc
import grpc.aio

from phalanx.errors import Aborted, Internal, PhalanxError, Unavailable
from phalanx.keys.caller import Service
from phalanx.rpc.channel import open_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.status import error_of, from_rpc_error
from phalanx.telemetry.logs import get_logger

STREAM_TIMEOUT_S = 24 * 3600.0
"""A stream is renewed after that time; every call has a deadline."""

WELCOME_TIMEOUT_S = 10.0
_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 2.0
_NOT_READY_WAIT_MAX_S = 0.1

_log = get_logger(__name__)


class OwnerStream(Protocol):
    """What is said on a stream to the owner of a range, or of tasks."""

    job_id: str
    owner_id: str

    def open(self, channel: grpc.aio.Channel) -> Any:
        """Open the call, which ends after `STREAM_TIMEOUT_S`."""

    async def greet(self, call: Any) -> None:
        """Say hello and wait for the welcome."""

    async def talk(self, call: Any) -> None:
        """The stream was accepted: send and receive until either ends."""

    def closed(self) -> None:
        """A stream that was accepted has ended."""


async def keep_open(
    stream: OwnerStream,
    address: str,
    keys: ClientKeys | None = None,
    service: Service = Service.AGGREGATOR,
) -> None:
    """Open a stream, and again whenever it ends, until this is cancelled.

    With `keys` the owner must prove that it is such a `service`.
    """
    channel = open_channel(address, keys=keys, service=service, own_connection=True)
    wait_s = _FIRST_WAIT_S
    try:
        while True:
            try:
                was_open, error = await run_once(stream, channel)
            except Exception as failure:  # noqa: BLE001 - without it the job would stand still
                # Also what opening and cancelling the call raise.
                _log.exception("stream_failed", job_id=stream.job_id)
                was_open, error = False, Internal(f"{type(failure).__name__}: {failure}")
            if was_open:
                wait_s = _FIRST_WAIT_S
            limit_s = _LONGEST_WAIT_S
            if isinstance(error, Unavailable) and error.reason == "RANGES_NOT_READY":
                limit_s = _NOT_READY_WAIT_MAX_S
            elif isinstance(error, Aborted):
                # Another term is in force; control's next assignment closes this stream.
                wait_s = limit_s / 2
            _log.info(
                "stream_ended",
                job_id=stream.job_id,
                aggregator_id=stream.owner_id,
                reason=error.reason,
                message=error.message,
            )
            await asyncio.sleep(min(wait_s, limit_s) * random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
    finally:
        await channel.close()


async def run_once(stream: OwnerStream, channel: grpc.aio.Channel) -> tuple[bool, PhalanxError]:
    """Run one stream to its end: whether it was accepted, and why it ended."""
    call = stream.open(channel)
    opened = False
    try:
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            await stream.greet(call)
        opened = True
        await stream.talk(call)
    except grpc.aio.AioRpcError as error:
        return opened, from_rpc_error(error)
    except TimeoutError:
        return opened, Unavailable("the aggregator accepts no stream", reason="NO_WELCOME")
    except asyncio.InvalidStateError:
        return opened, await end_of(call)
    except PhalanxError as error:
        return opened, error
    finally:
        if opened:
            stream.closed()
        call.cancel()
    return opened, Unavailable("the aggregator ended the stream", reason="STREAM_ENDED")


async def both_ways(
    sending: Coroutine[Any, Any, None], receiving: Coroutine[Any, Any, None]
) -> None:
    """Send and receive until either ends; raise what it ended with."""
    sender = asyncio.create_task(sending)
    receiver = asyncio.create_task(receiving)
    try:
        done, _ = await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
        # The receiver knows why a stream ended; a failed write only says that it did.
        if sender in done and receiver not in done:
            await asyncio.wait((receiver,), timeout=1.0)
        ended = receiver if receiver.done() else sender
        if ended.cancelled():
            # Not this task: the call was, and that must not end the stream for good.
            raise Unavailable("the call was cancelled", reason="STREAM_ENDED")
        ended.result()
    finally:
        for task in (sender, receiver):
            task.cancel()
        await asyncio.gather(sender, receiver, return_exceptions=True)


async def end_of(call: Any) -> PhalanxError:
    """Why a stream ended, as its status says."""
    error = await error_of(call)
    if error is None:
        return Unavailable("the aggregator ended the stream", reason="STREAM_ENDED")
    return from_rpc_error(error)
