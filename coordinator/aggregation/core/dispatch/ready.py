"""Tasks that may be handed out, in the order in which they are."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


class Ready:
    """Those of the highest level first, of one level in the order in which they became ready."""

    def __init__(self, levels: Sequence[int]) -> None:
        self._levels = levels
        self._heap: list[tuple[int, int, int]] = []
        self._added = 0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._heap)

    def clear(self) -> None:
        """Forget all of them."""
        self._heap.clear()

    def add(self, tasks: Iterable[int]) -> None:
        """Some became ready."""
        for task in tasks:
            level = self._levels[task] if self._levels else 0
            heapq.heappush(self._heap, (-level, self._added, task))
            self._added += 1

    def next(self) -> int:
        """Take the first of them."""
        return heapq.heappop(self._heap)[2]
