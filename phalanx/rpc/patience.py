"""Trying again until it works: for what must happen and may wait.

A single call that is retried within its deadline is ``phalanx.rpc.channel.call_with_retry``.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from phalanx.errors import PhalanxError, passes_by_itself

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Patience:
    """How long to wait between attempts, and when to give up.

    Waits double from ``first_s`` up to ``longest_s``; each is cut by up to half, at random, so that
    many who wait for one server do not come back together. Without ``attempts_max`` and ``limit_s``
    (seconds after the first attempt began) only cancellation ends it.
    """

    first_s: float
    longest_s: float
    attempts_max: int | None = None
    limit_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.longest_s:
            raise ValueError(f"waits from {self.first_s} s to {self.longest_s} s do not grow")


async def insist(
    attempt: Callable[[], Awaitable[ResultT]],
    patience: Patience,
    *,
    passes: Callable[[PhalanxError], bool] = passes_by_itself,
    on_failure: Callable[[PhalanxError, int], None] = lambda _error, _number: None,
) -> ResultT:
    """Return what ``attempt`` returns, repeating it while it fails with errors that pass.

    ``attempt`` bounds itself, and doing it twice must be harmless. ``on_failure`` is told every
    error after which it is tried again, with the number of attempts so far. Raises an error that
    does not pass, or the last one once patience ends.
    """
    began_s, wait_s, number = time.monotonic(), patience.first_s, 0
    while True:
        number += 1
        try:
            return await attempt()
        except PhalanxError as error:
            if not passes(error) or number == patience.attempts_max:
                raise
            pause_s = wait_s * random.uniform(0.5, 1.0)
            if patience.limit_s is not None:
                left_s = patience.limit_s - (time.monotonic() - began_s)
                if left_s <= pause_s:
                    raise
            on_failure(error, number)
        await asyncio.sleep(pause_s)
        wait_s = min(wait_s * 2, patience.longest_s)
