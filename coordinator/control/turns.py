"""Turns at submitting: the many jobs of one namespace do not wait in front of another's few."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from phalanx.errors import ResourceExhausted
from phalanx.texts import number_of

AT_ONCE = 4
WAITING_MAX = 256


class Turns:
    """Lets a few of each namespace work at once; others of it wait, in order and within a bound."""

    def __init__(self, at_once: int = AT_ONCE, waiting_max: int = WAITING_MAX) -> None:
        self._at_once = at_once
        self._waiting_max = waiting_max
        self._turns: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}

    def __len__(self) -> int:
        """Return how many namespaces have work under way."""
        return len(self._turns)

    @asynccontextmanager
    async def of(self, namespace: str) -> AsyncIterator[None]:
        """Wait for a turn and hold it for the block. Raises ResourceExhausted."""
        semaphore, there = self._turns.setdefault(namespace, (asyncio.Semaphore(self._at_once), []))
        if len(there) >= self._at_once + self._waiting_max:
            raise ResourceExhausted(
                f"the namespace {namespace!r} has {number_of(len(there), 'submission')} under "
                "way, which is its limit; try again when some are answered",
                reason="TOO_MANY_SUBMISSIONS",
                retry_after_s=1.0,
            )
        there.append(None)
        try:
            async with semaphore:
                yield
        finally:
            there.pop()
            if not there:
                del self._turns[namespace]
