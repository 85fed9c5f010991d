"""Calls that stay open between requests: a server that stops does not wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Request = TypeVar("Request")


class OpenStreams(Generic[Request]):
    """Waits for requests of streams until all are ended, which is never in the middle of one."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Task[object]] = set()
        self._ended = asyncio.Event()

    async def next(self, arriving: AsyncIterator[Request]) -> Request | None:
        """Return the next request of a stream; None: it has ended."""
        task = asyncio.current_task()
        if self._ended.is_set() or task is None:
            return None
        self._waiting.add(task)
        try:
            return await anext(arriving, None)
        except asyncio.CancelledError:
            if not self._ended.is_set():
                raise
            task.uncancel()
            return None
        finally:
            self._waiting.discard(task)

    def end(self) -> None:
        """End the streams that wait for a request, and each other one after its request."""
        self._ended.set()
        for task in self._waiting:
            task.cancel()
