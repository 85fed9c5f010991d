"""How long a leaf may go on without progress."""

from __future__ import annotations


class Patience:
    """Watches the leaf of one slot.

    Time is counted in ticks, and a tick never counts for more than `tick_max_s`: a machine or a
    session process that was stopped for a minute must not take that for a hanging leaf.
    """

    def __init__(self, limit_s: float, tick_max_s: float) -> None:
        self._limit_s = limit_s
        self._tick_max_s = tick_max_s
        self._seen: object = None
        self._spent_s = 0.0
        self._last_s = 0.0

    def exhausted(self, progress: object, now_s: float, limit_s: float = 0.0) -> bool:
        """Whether `progress` (anything that changes with it; None: idle) stood still too long.

        `limit_s` is that of what runs now, where it has its own.
        """
        elapsed_s = min(now_s - self._last_s, self._tick_max_s)
        self._last_s = now_s
        if progress is None or progress != self._seen:
            self._seen = progress
            self._spent_s = 0.0
            return False
        self._spent_s += elapsed_s
        return self._spent_s > (limit_s or self._limit_s)
