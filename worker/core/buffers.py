"""Numbers of the shared buffers of one job: those of parameters, then payloads as needed."""

from __future__ import annotations

import heapq

from worker.core.versions import BUFFERS


class BufferPool:
    """Hands out the lowest free payload buffer, so that few are ever touched."""

    def __init__(self, first: int = BUFFERS) -> None:
        """The buffers below `first` are those of parameters."""
        self._free: list[int] = []
        self._next = first

    def take(self) -> int:
        """A buffer that nobody uses."""
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def give_back(self, buffer: int) -> None:
        """The buffer may be used for something else."""
        heapq.heappush(self._free, buffer)
