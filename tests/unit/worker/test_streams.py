"""A stream to the owner of a range is opened again, whatever ended the one before."""

from __future__ import annotations

import asyncio
from typing import Any

from worker.session.streams import keep_open

GUARD_S = 30.0


class Call:
    """A call that may not be cancelled."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def cancel(self) -> None:
        if self.error is not None:
            raise self.error


class Stream:
    """Breaks three times, each time somewhere else, and then stays open."""

    job_id, owner_id = "job-1", "aggregator-1"

    def __init__(self) -> None:
        self.opened = self.ended = 0
        self.stays = asyncio.Event()

    def open(self, channel: Any) -> Any:
        self.opened += 1
        if self.opened == 1:
            raise RuntimeError("no call")
        return Call(asyncio.InvalidStateError("over") if self.opened == 2 else None)

    async def greet(self, call: Any) -> None:
        if self.opened == 3:
            raise ValueError("a defect")

    async def talk(self, call: Any) -> None:
        if self.opened == 4:
            self.stays.set()
            await asyncio.Event().wait()

    def closed(self) -> None:
        self.ended += 1


async def test_neither_opening_nor_cancelling_a_call_ends_the_search() -> None:
    stream = Stream()
    task = asyncio.create_task(keep_open(stream, "127.0.0.1:1"))
    try:
        async with asyncio.timeout(GUARD_S):
            await stream.stays.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (stream.opened, stream.ended) == (4, 2), "the second was open, and is over"
