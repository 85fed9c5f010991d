"""What heartbeats say: of a job leaves done, examples per second, leaf times; attempts of all."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import TypeAlias

from phalanx.v1 import coordination_service_pb2 as coordination

Kind: TypeAlias = coordination.LeafFailed.Kind.ValueType

DONE = coordination.LeafFailed.KIND_UNSPECIFIED
_LEAF_TIMES_KEPT = 128
_HALF_LIFE_S = 2.0


class EndedAttempts:
    """How many attempts at tasks of all jobs came to which end, since the worker started."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[bool, Kind]] = Counter()

    def ended(self, *, calls: bool, failed: Kind = DONE, count: int = 1) -> None:
        """Count attempts: calls of sets of tasks, or leaves."""
        self._counts[calls, failed] += count

    def messages(self) -> list[coordination.EndedAttempts]:
        """All counts, for a heartbeat."""
        return [
            coordination.EndedAttempts(calls=calls, failed=failed, count=count)
            for (calls, failed), count in self._counts.items()
        ]


class JobProgress:
    """Counts of one job on this worker; times are monotonic seconds."""

    def __init__(self) -> None:
        self.leaves_done = 0
        self.train_leaves = 0
        self.train_leaf_seconds = 0.0
        self._examples = 0
        self._rate = 0.0
        self._last_s: float | None = None
        self._leaf_seconds: deque[float] = deque(maxlen=_LEAF_TIMES_KEPT)

    def add(
        self,
        examples: int,
        leaf_seconds: Iterable[float],
        *,
        waited_s: float = 0.0,
        trains: bool = True,
    ) -> None:
        """A part was finished. Waiting for rows says nothing about how fast a worker computes."""
        before = self.leaves_done
        total_s = 0.0
        for seconds in leaf_seconds:
            self._leaf_seconds.append(seconds)
            self.leaves_done += 1
            total_s += seconds
        if trains:
            self.train_leaves += self.leaves_done - before
            self.train_leaf_seconds += max(0.0, total_s - waited_s)
        self._examples += examples

    def examples_per_second(self, now_s: float) -> float:
        """Smoothed rate; call it once per heartbeat."""
        if self._last_s is not None and now_s > self._last_s:
            elapsed_s = now_s - self._last_s
            keep = 0.5 ** (elapsed_s / _HALF_LIFE_S)
            self._rate = keep * self._rate + (1 - keep) * self._examples / elapsed_s
        self._last_s = now_s
        self._examples = 0
        return self._rate

    @property
    def leaf_seconds_p95(self) -> float:
        """95th percentile of the newest leaf times; 0 before the first."""
        ordered = sorted(self._leaf_seconds)
        return ordered[(len(ordered) * 95 + 99) // 100 - 1] if ordered else 0.0
