"""Turns at the readers of linked files: one data set never has all of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from phalanx.errors import Unavailable

WAITING_MAX = 1000
"""Chunks of one data set that wait for a turn; whoever asks for more is told to come again."""


class Slots:
    """Use it in one event loop.

    Of ``count`` slots each key has all but one at a time, so that a data set whose files are slow,
    or hang, leaves one to the others. Where there is only one slot, all take turns at it.
    """

    def __init__(self, count: int) -> None:
        self._most = max(1, count - 1)
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._inside: dict[str, int] = {}

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Have one of the slots of a key, in the order of asking. Raises Unavailable."""
        inside = self._inside.get(key, 0)
        if inside >= WAITING_MAX + self._most:
            raise Unavailable(
                f"{WAITING_MAX} chunks of the data set {key} wait to be made; try again",
                reason="TOO_MANY_READS",
                retry_after_s=1.0,
            )
        turns = self._turns.setdefault(key, asyncio.Semaphore(self._most))
        self._inside[key] = inside + 1
        try:
            async with turns:
                yield
        finally:
            self._inside[key] -= 1
            if not self._inside[key]:
                del self._inside[key], self._turns[key]
