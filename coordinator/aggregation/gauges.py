"""What an aggregator measures of one job."""

from __future__ import annotations

import math
import time

from coordinator.aggregation.core.effects import Committed
from phalanx.telemetry.metrics import AggregatorMetrics
from phalanx.training.decisions import RootDecider


class JobGauges:
    """The series of one job; nothing is counted where the limit of jobs with series is reached."""

    def __init__(self, metrics: AggregatorMetrics, job_id: str) -> None:
        self._metrics = metrics
        self._job_id = job_id
        self._admitted = metrics.per_job.admits(job_id)
        self._last_commit_s: float | None = None
        if self._admitted:
            metrics.per_job.resume(job_id)
            wire = metrics.wire_bytes_total
            self._received = wire.labels(job_id, "in", "raw")
            self._sent = wire.labels(job_id, "out", "raw")
            self._steps = metrics.step_seconds.labels(job_id)
            self._step = metrics.job_step.labels(job_id)
            self._examples = metrics.job_examples_total.labels(job_id)
            self._lost = metrics.job_examples_lost_total.labels(job_id)
            self._doubled = metrics.job_examples_doubled_total.labels(job_id)
            self._staleness = metrics.staleness_versions.labels(job_id)

    def received(self, size_bytes: int) -> None:
        """A frame came in."""
        if self._admitted:
            self._received.inc(size_bytes)

    def sent(self, size_bytes: int) -> None:
        """A message went out."""
        if self._admitted:
            self._sent.inc(size_bytes)

    def committed(self, effect: Committed, now_s: float) -> None:
        """A step is done."""
        if not self._admitted:
            return
        self._step.set(effect.version)
        self._examples.inc(effect.example_count)
        self._lost.inc(max(0, effect.expected_count - effect.example_count))
        self._doubled.inc(max(0, effect.example_count - effect.expected_count))
        self._staleness.observe(0)
        if self._last_commit_s is not None:
            self._steps.observe(now_s - self._last_commit_s)
        self._last_commit_s = now_s

    def metrics(self, decider: RootDecider | None) -> None:
        """Show the newest values of the job's metrics."""
        if self._admitted and decider is not None:
            for name, value in decider.metrics.items():
                if math.isfinite(value):
                    self._metrics.job_metric.labels(self._job_id, name).set(value)

    def replayed(self, steps: int) -> None:
        """A roll-back makes these steps run again."""
        if self._admitted:
            self._metrics.steps_replayed_total.labels(self._job_id).inc(max(0, steps))

    def checkpointed(self, seconds: float) -> None:
        """A part became durable."""
        if self._admitted:
            self._metrics.checkpoint_seconds.labels(self._job_id).observe(seconds)
            gauge = self._metrics.checkpoint_last_success_timestamp_seconds
            gauge.labels(self._job_id).set(time.time())

    def ended(self) -> None:
        """The job left this process; its series go after a while."""
        self._metrics.per_job.end(self._job_id, time.monotonic())
