"""What control shows at /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.control.core import speeds
from coordinator.control.core.clock import NANOS
from coordinator.control.core.effects import Observe
from coordinator.control.core.facts import Facts
from coordinator.control.core.lifecycle import FAILED, QUEUED
from coordinator.control.core.state import Core
from coordinator.control.core.views import worker_view
from coordinator.control.job_gauges import JobProgress
from coordinator.control.labels import EVENT_TYPES, KNOWN
from phalanx.telemetry.metrics import ControlMetrics
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.job_pb2 import Job

SLOW_WORKERS_SHOWN = 100
"""Series of single workers: of the slowest only, however many there are."""

_WORKER_STATES = {
    number: name.removeprefix("STATE_").lower()
    for name, number in Worker.State.items()
    if number != Worker.STATE_UNSPECIFIED
}
_JOB_STATES = {
    number: name.removeprefix("STATE_").lower()
    for name, number in Job.State.items()
    if number != Job.STATE_UNSPECIFIED
}


class Gauges:
    """Control's metrics; `show` copies what can be counted at any time."""

    def __init__(self, metrics: ControlMetrics) -> None:
        self._metrics = metrics
        self._progress = JobProgress(metrics.progress)
        self._events_dropped = 0
        # What is counted from the first time on is not seen to rise by that one, so it begins at 0.
        for kind in EVENT_TYPES:
            metrics.events_total.labels(type=kind)
        for name, known in KNOWN.items():
            for labels in known:
                getattr(metrics, name).labels(**labels)

    def leads(self, generation: int) -> None:
        """Say that this process leads (0: it does not, and knows nothing of the cluster)."""
        self._metrics.leader.set(1 if generation else 0)
        self._events_dropped = 0
        if generation:
            self._metrics.generation.set(generation)
            return
        self._progress.clear()
        metrics = self._metrics
        for gauge in (metrics.workers, metrics.slots, metrics.aggregators, metrics.jobs):
            gauge.clear()
        metrics.worker_speed_ratio.clear()
        for gauge in (
            metrics.job_queue_oldest_seconds,
            metrics.incidents_open,
            metrics.dead_letters,
            metrics.journal_lag_records,
        ):
            gauge.set(0)

    def observe(self, effect: Observe) -> None:
        """Add to the metric that the core names."""
        metric: Any = getattr(self._metrics, effect.metric)
        labels = _bounded(effect.metric, dict(effect.labels))
        labelled = metric.labels(**labels) if labels else metric
        if hasattr(labelled, "observe"):
            labelled.observe(effect.value)
        else:
            labelled.inc(effect.value)

    def observe_append(self, seconds: float) -> None:
        """Note how long it took until facts were durable."""
        self._metrics.journal_append_seconds.observe(seconds)

    def told(self, event_type: str) -> None:
        """Count an event."""
        self._metrics.events_total.labels(type=event_type).inc()

    def show(self, core: Core, durable: Facts, lag: int, events_dropped: int = 0) -> None:
        """Copy the number of members and jobs by state, and how far the jobs are."""
        self._show_members(core)
        self._show_jobs(core, durable)
        self._progress.show(core)
        self._metrics.incidents_open.set(len(core.incidents) + (core.outage is not None))
        self._metrics.journal_lag_records.set(lag)
        self._metrics.events_dropped_total.inc(max(0, events_dropped - self._events_dropped))
        self._events_dropped = events_dropped

    def _show_members(self, core: Core) -> None:
        workers = dict.fromkeys(_WORKER_STATES, 0)
        slots = dict.fromkeys(_WORKER_STATES, 0)
        for worker in core.workers.values():
            view = worker_view(core, worker)
            workers[view.state] += 1
            slots[view.state] += view.slots
        for number, name in _WORKER_STATES.items():
            self._metrics.workers.labels(state=name).set(workers[number])
            self._metrics.slots.labels(state=name).set(slots[number])
        connected = sum(each.connected for each in core.aggregators.values())
        away = len(core.aggregators) - connected
        self._metrics.aggregators.labels(state="connected").set(connected)
        self._metrics.aggregators.labels(state="away").set(away)
        self._metrics.worker_speed_ratio.clear()
        for worker_id, ratio in _slowest(core):
            self._metrics.worker_speed_ratio.labels(worker_id=worker_id).set(ratio)

    def _show_jobs(self, core: Core, durable: Facts) -> None:
        jobs = dict.fromkeys(_JOB_STATES, 0)
        dead, oldest_s = 0, 0.0
        for facts in durable.jobs.values():
            jobs[facts.state] += 1
            if facts.state == FAILED:
                dead += len(facts.kept.changed.failures)
            elif facts.state == QUEUED:
                waited_s = (core.now.unix_nanos - facts.kept.submit_unix_nanos) / NANOS
                oldest_s = max(oldest_s, waited_s)
        for state, name in _JOB_STATES.items():
            self._metrics.jobs.labels(state=name).set(jobs[state])
        self._metrics.dead_letters.set(dead)
        self._metrics.job_queue_oldest_seconds.set(oldest_s)


def _bounded(metric: str, labels: Mapping[str, str]) -> dict[str, str]:
    """The labels; `other` in place of a cause that a member made up."""
    known = KNOWN.get(metric)
    if known is None or labels in known:
        return dict(labels)
    values = {name: {each[name] for each in known} for name in labels}
    return {name: value if value in values[name] else "other" for name, value in labels.items()}


def _slowest(core: Core) -> list[tuple[str, float]]:
    """The workers that take part, each with its speed in the job where it is slowest."""
    ratios: dict[str, float] = {}
    for job in core.running():
        slots = {key: core.workers[key].slots for key in job.hosts if key in core.workers}
        found = speeds.factors(job.speeds, slots, core.now.monotonic_s)
        for worker_id, ratio in found.items():
            ratios[worker_id] = min(ratio, ratios.get(worker_id, ratio))
    slowest = sorted(ratios.items(), key=lambda each: each[1])
    return slowest[:SLOW_WORKERS_SHOWN]
