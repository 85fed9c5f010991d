"""Streams of people end soon after their token does: it is looked at again while they are open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

LOOK_EVERY_S = 2.0


@asynccontextmanager
async def as_long_as(check: Callable[[], None]) -> AsyncIterator[None]:
    """Run what is in the block until `check` raises, then raise that instead."""
    found: list[Exception] = []
    loop = asyncio.get_running_loop()

    async def look() -> None:
        while not found:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                check()
            except Exception as error:  # noqa: BLE001 - who cannot be looked at is not let through
                found.append(error)
        block.reschedule(loop.time())

    try:
        async with asyncio.timeout(None) as block:
            looking = asyncio.create_task(look())
            try:
                yield
            finally:
                looking.cancel()
    except TimeoutError:
        if not found:
            raise
        raise found[0] from None
