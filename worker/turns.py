"""Who may download next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Lets a bounded number of downloads run at a time, in order of arrival; what somebody waits
    for goes before what is only read ahead. Use it in one event loop."""

    def __init__(self, at_a_time: int) -> None:
        self._free = at_a_time
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._hurried: set[str] = set()

    def hurry(self, name: str) -> None:
        """Somebody waits for this one, which may have a turn, wait for it, or ask for it next."""
        self._hurried.add(name)

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait until it is this one's turn, and have it for as long as the block runs."""
        try:
            await self._acquire(name)
            try:
                yield
            finally:
                self._pass_on()
        finally:
            self._hurried.discard(name)

    async def _acquire(self, name: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn = self._waiting[name] = asyncio.get_running_loop().create_future()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass_on()  # it had come, and nobody is left to take it
            raise
        finally:
            self._waiting.pop(name, None)

    def _pass_on(self) -> None:
        while self._waiting:
            name = next((each for each in self._waiting if each in self._hurried), None)
            turn = self._waiting.pop(name or next(iter(self._waiting)))
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
