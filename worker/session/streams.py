"""What all streams of the session process do alike: run both directions, tell why one ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from phalanx.errors import PhalanxError, Unavailable
from phalanx.rpc.status import error_of, from_rpc_error


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
