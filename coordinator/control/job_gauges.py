"""What control shows of each job that runs: how far it is, whatever kind it is."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet

from coordinator.control.core.clock import NANOS
from coordinator.control.core.state import Core, JobRuntime
from phalanx.specs.parts import may_lose_examples
from phalanx.telemetry.metrics import JobProgressMetrics


class Moment:
    """A number of a job, and since when it is what it is."""

    def __init__(self, value: int, since_unix_nanos: int) -> None:
        self.value = value
        self.since_unix_nanos = since_unix_nanos

    def now(self, value: int, unix_nanos: int) -> float:
        """Take in what it is now; return since when, in Unix seconds."""
        if value != self.value:
            self.value, self.since_unix_nanos = value, unix_nanos
        return self.since_unix_nanos / NANOS


class JobProgress:
    """The `job_progress_…` series; `show` brings them up to date."""

    def __init__(self, metrics: JobProgressMetrics) -> None:
        self._metrics = metrics
        self._steps: dict[str, Moment] = {}
        self._checkpoints: dict[str, Moment] = {}

    def clear(self) -> None:
        """Forget all jobs: this process does not lead any more."""
        self._keep_only(set())

    def show(self, core: Core) -> None:
        """Copy what the core knows of the jobs that run."""
        running = {job.job_id: job for job in core.running()}
        self._keep_only(running.keys())
        for job_id, job in running.items():
            if self._metrics.per_job.admits(job_id):
                self._show_job(core, job)

    def _keep_only(self, job_ids: AbstractSet[str]) -> None:
        self._metrics.per_job.keep_only(job_ids)
        for moments in (self._steps, self._checkpoints):
            for job_id in moments.keys() - job_ids:
                del moments[job_id]

    def _show_job(self, core: Core, job: JobRuntime) -> None:
        metrics, facts, job_id = self._metrics, core.facts_of(job), job.job_id
        metrics.planned_steps.labels(job_id).set(facts.plan.total_steps)
        metrics.loss_allowed.labels(job_id).set(may_lose_examples(facts.spec.train))
        metrics.workers.labels(job_id).set(len(job.hosts))
        metrics.waiting.remove_by_labels({"job_id": job_id})
        if job.reason.startswith("WAITING"):
            metrics.waiting.labels(job_id, job.reason).set(1)
        self._show_moments(core, job)
        report = job.report
        if report is None:
            return
        metrics.step.labels(job_id).set(report.step)
        metrics.examples.labels(job_id).set(report.examples)
        metrics.lost_examples.labels(job_id).set(report.examples_lost)
        metrics.doubled_examples.labels(job_id).set(report.examples_doubled)
        metrics.checkpoint_step.labels(job_id).set(report.checkpoint_step)
        for name, value in report.metrics.items():
            if math.isfinite(value):
                metrics.metric.labels(job_id, name).set(value)

    def _show_moments(self, core: Core, job: JobRuntime) -> None:
        """Say since when nothing has changed; the clock is that of this leader."""
        nanos, job_id = core.now.unix_nanos, job.job_id
        step = self._steps.setdefault(job_id, Moment(job.step, nanos))
        changed = self._metrics.changed_timestamp_seconds.labels(job_id)
        changed.set(step.now(job.step, nanos))
        if not core.facts_of(job).spec.HasField("train"):
            return
        newest = 0 if job.report is None else job.report.checkpoint_step
        checkpoint = self._checkpoints.setdefault(job_id, Moment(newest, nanos))
        complete = self._metrics.checkpoint_timestamp_seconds.labels(job_id)
        complete.set(checkpoint.now(newest, nanos))
