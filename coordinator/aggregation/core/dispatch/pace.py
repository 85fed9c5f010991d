"""How many tasks a worker has at a time, and when one is late: both by what tasks took so far."""

from __future__ import annotations

import math
from collections import deque

QUEUE_S = 0.1
"""What a slot has of work in hand: enough to hide the way to the dispatcher and back."""

DEPTH_MAX = 256
_WEIGHT = 0.05
_TIMES_KEPT = 256
_TIMES_NEEDED = 5
PATIENCE_FACTOR, PATIENCE_S = 2.0, 0.1


class Pace:
    """Times of the tasks of one job."""

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._round_trips: deque[float] = deque(maxlen=_TIMES_KEPT)

    def took(self, seconds: float, round_trip_s: float) -> None:
        """A task ran for so long, and was handed out so long ago."""
        self._round_trips.append(round_trip_s)
        if self._mean_s is None:
            self._mean_s = seconds
        self._mean_s += _WEIGHT * (seconds - self._mean_s)

    def depth(self) -> int:
        """Tasks for each slot of a worker, the one that runs included."""
        if self._mean_s is None:
            return 1  # it may take an hour, and another worker may come
        if self._mean_s * DEPTH_MAX <= QUEUE_S:
            return DEPTH_MAX
        return max(1, math.ceil(QUEUE_S / self._mean_s))

    def room(self, slots: int, held: int, waiting: int, slots_of_all: int) -> int:
        """Tasks to hand to a worker now: towards the end less and less, so that all end at once.

        A worker that has most of its share gets nothing yet: few large messages cost less.
        """
        share = -(-(waiting + held) * slots // (2 * slots_of_all))
        limit = max(slots, min(slots * self.depth(), share))
        room = limit - held
        return room if room * 4 >= limit or held < slots else 0

    def patience_s(self) -> float | None:
        """How long after it was handed out a task is late; None: too little is known."""
        if len(self._round_trips) < _TIMES_NEEDED:
            return None
        ordered = sorted(self._round_trips)
        return PATIENCE_FACTOR * ordered[(len(ordered) * 95 + 99) // 100 - 1] + PATIENCE_S
