"""Spans of the steps and checkpoints of one job, where this process traces."""

from __future__ import annotations

import time

from coordinator.aggregation.core.effects import Committed
from phalanx.telemetry import traces

_NANOS = 1_000_000_000


class StepSpans:
    """Tells of each step when it is committed; a step begins where the one before ended."""

    def __init__(self, job_id: str, term: int) -> None:
        self._tracing = traces.active()
        self._job_id = job_id
        self._term = term
        self._began_ns = time.time_ns()

    def committed(self, effect: Committed, arrived_s: float | None) -> None:
        """A step is done; what it needed last arrived then, by the monotonic clock."""
        if self._tracing is None:
            return
        now_ns, now_s = time.time_ns(), time.monotonic()
        arrived_ns = now_ns - int((now_s - (arrived_s or now_s)) * _NANOS)
        began_ns, self._began_ns = self._began_ns, now_ns
        # The wall clock may have been set meanwhile.
        times_ns = (min(began_ns, now_ns), min(max(began_ns, arrived_ns), now_ns), now_ns)
        counts = {"examples": effect.example_count, "examples_expected": effect.expected_count}
        self._tracing.step((self._job_id, self._term, effect.version), times_ns, counts)

    def checkpointed(self, version: int, range_index: int, seconds: float) -> None:
        """A part of the checkpoint of a version became durable after so long."""
        if self._tracing is not None:
            step = (self._job_id, self._term, version)
            self._tracing.checkpoint(step, seconds, {"range": range_index})
