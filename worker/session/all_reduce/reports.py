"""What the root of an all-reduce job tells control: progress, metric points, how the term ends.

While control is away nothing waits but the newest points: the next report stands for all before.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from phalanx.last_commit import LastCommit
from phalanx.telemetry import traces
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_pb2
from phalanx.v1.training_pb2 import GoRecord
from worker.core.all_reduce.job import AllReduceJob

Report = coordination.JobReport
Send = Callable[[coordination.SessionRequest], None]

REPORT_EVERY_S = 0.2
TOLD_AT_ONCE = 2
"""Commits of a term that are told at once: the first ones end the incident before it."""

POINTS_MAX = 20_000
POINTS_SAID_AGAIN = 500
_POINTS_PER_MESSAGE = 1000
_RATE_WINDOW_S = 2.0

OUTCOMES = {
    GoRecord.ACTION_STOP: Report.OUTCOME_STOPPED,
    GoRecord.ACTION_PAUSE: Report.OUTCOME_PAUSED,
}


class RootReports:
    """Reports of one job; silent while this worker is not its root."""

    def __init__(self, core: AllReduceJob, send: Send, connected: Callable[[], bool]) -> None:
        self._core = core
        self._send = send
        self._connected = connected
        self._tracing = traces.active()
        self._points: deque[job_pb2.MetricPoint] = deque(maxlen=POINTS_MAX)
        # Said again on the next session: a control that died may not have stored them.
        self._points_sent: deque[job_pb2.MetricPoint] = deque(maxlen=POINTS_SAID_AGAIN)
        self._commits: deque[tuple[float, int]] = deque()
        self.begin(0)

    def begin(self, checkpoint_step: int) -> None:
        """A term begins; the newest checkpoint that is known is that of this step."""
        self.checkpoint_step = checkpoint_step
        self.steps_replayed = 0
        self._last_commit = LastCommit()
        self._reported: tuple[int, int] | None = None
        self._told = 0
        self._step_began_ns = time.time_ns()
        self._final: Report | None = None
        self._commits.clear()

    def committed(self, version: int, example_count: int) -> None:
        """One more step is done."""
        now_s = time.monotonic()
        if self._tracing is not None:
            now_ns = time.time_ns()
            step = (self._core.job_id, self._core.term, version)
            times_ns = (min(self._step_began_ns, now_ns), now_ns)
            self._tracing.step(step, times_ns, {"examples": example_count})
            self._step_began_ns = now_ns
        self._last_commit.committed()
        stalled = bool(self._commits) and now_s - self._commits[-1][0] > REPORT_EVERY_S
        self._commits.append((now_s, example_count))
        while self._commits[0][0] < now_s - _RATE_WINDOW_S and len(self._commits) > 2:
            self._commits.popleft()
        self._told += 1
        if self._told <= TOLD_AT_ONCE or stalled:
            self._report()

    def keep_points(self, points: tuple[tuple[int, str, float], ...]) -> None:
        """New metric points."""
        seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
        for step, name, value in points:
            if math.isfinite(value):
                point = job_pb2.MetricPoint(step=step, name=name, value=value)
                point.time.seconds, point.time.nanos = seconds, nanos
                self._points.append(point)

    def look(self) -> None:
        """Tell what is new; call it every `REPORT_EVERY_S`."""
        self._flush_points()
        if self._final is None and self._core.unheard() and self._connected():
            # Not only the root sees who holds the job up.
            self._send_report(self._made(Report.OUTCOME_RUNNING))
        if self._core.root is None or self._final is not None:
            return
        if (self._core.versions.whole_version, self.checkpoint_step) != self._reported:
            self._report()

    def session_opened(self) -> None:
        """Control is new or back."""
        room = POINTS_MAX - len(self._points)
        again = list(self._points_sent)[-room:] if room else []
        self._points.extendleft(reversed(again))
        self._points_sent.clear()
        self._flush_points()
        if self._final is not None:
            self._send_report(self._final)
        elif self._core.root is not None:
            self._report()

    def stopped(self, go: GoRecord) -> None:
        """The checkpoint of a terminal record is complete."""
        self._finish(self._made(OUTCOMES[go.action], reason=go.reason))

    def failed(self, reason: str, message: str) -> None:
        """The job cannot go on; said by whichever member has found out."""
        failure = job_pb2.Failure(
            code=reason, message=message, step=max(0, self._core.versions.whole_version)
        )
        self._finish(
            self._made(Report.OUTCOME_FAILED, reason=reason, message=message, failure=failure)
        )

    def _finish(self, report: Report) -> None:
        if self._final is None:
            self._final = report
            self._flush_points()
            if self._connected():
                self._send_report(report)

    def _report(self) -> None:
        # Before it holds something the root has nothing to say of how far the job is.
        if not self._connected() or self._core.versions.whole_version < 0:
            return
        self._reported = (self._core.versions.whole_version, self.checkpoint_step)
        self._send_report(self._made(Report.OUTCOME_RUNNING))

    def _send_report(self, report: Report) -> None:
        aged = self._last_commit.aged(report)
        self._send(coordination.SessionRequest(job_report=aged))

    def _made(
        self,
        outcome: Report.Outcome.ValueType,
        *,
        reason: str = "",
        message: str = "",
        failure: job_pb2.Failure | None = None,
    ) -> Report:
        root = self._core.root
        report = Report(
            job_id=self._core.job_id,
            term=self._core.term,
            outcome=outcome,
            reason=reason,
            message=message,
            step=max(0, self._core.versions.whole_version),
            examples_per_second=self._examples_per_s(),
            checkpoint_step=max(0, self.checkpoint_step),
            failure=failure,
            steps_replayed=self.steps_replayed,
            late_workers=[
                coordination.LateWorker(worker_id=worker_id, late_s=late_s)
                for worker_id, late_s in sorted(self._core.unheard().items())
            ],
        )
        if root is not None:
            decider = root.decider
            report.epoch, report.examples = decider.epoch, decider.examples
            report.examples_lost = root.examples_lost
            report.examples_doubled = root.examples_doubled
            finite = {name: x for name, x in decider.metrics.items() if math.isfinite(x)}
            report.metrics.update(finite)
            if decider.best is not None:
                report.best.CopyFrom(decider.best.message())
        return report

    def _examples_per_s(self) -> float:
        if len(self._commits) < 2:
            return 0.0
        seconds = self._commits[-1][0] - self._commits[0][0]
        count = sum(count for _, count in self._commits) - self._commits[0][1]
        return count / seconds if seconds > 0 else 0.0

    def _flush_points(self) -> None:
        while self._points and self._connected():
            count = min(len(self._points), _POINTS_PER_MESSAGE)
            points = [self._points.popleft() for _ in range(count)]
            self._points_sent.extend(points)
            message = coordination.MetricPoints(job_id=self._core.job_id, points=points)
            self._send(coordination.SessionRequest(metric_points=message))
