"""When a job last committed a step, told to control as an age: clocks of two machines differ."""

from __future__ import annotations

import time

from phalanx.v1.coordination_service_pb2 import JobReport


class LastCommit:
    """The newest commit of one term, by the monotonic clock of the process that made it."""

    def __init__(self) -> None:
        self._committed_s: float | None = None
        self._contributed_s: float | None = None

    def committed(self, contributed_s: float | None = None) -> None:
        """A step has just been committed; the last contribution to it came then."""
        self._committed_s = time.monotonic()
        self._contributed_s = contributed_s

    def aged(self, report: JobReport) -> JobReport:
        """Note in a report how old the commit is by now; to be called right before it is sent, be
        it for the second time."""
        now_s = time.monotonic()
        if self._committed_s is not None:
            report.since_commit_s = now_s - self._committed_s
        if self._contributed_s is not None:
            report.since_contribution_s = now_s - self._contributed_s
        return report
