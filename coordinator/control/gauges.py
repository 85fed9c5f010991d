"""What control shows at /metrics."""

from __future__ import annotations

from typing import Any

from coordinator.control.core.effects import Observe
from coordinator.control.core.facts import Facts
from coordinator.control.core.lifecycle import FAILED
from coordinator.control.core.state import Core
from coordinator.control.core.views import worker_view
from phalanx.telemetry.metrics import ControlMetrics
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.job_pb2 import Job

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

    def leads(self, generation: int) -> None:
        """Say that this process leads (0: it does not)."""
        self._metrics.leader.set(1 if generation else 0)
        if generation:
            self._metrics.generation.set(generation)

    def observe(self, effect: Observe) -> None:
        """Add to the metric that the core names."""
        metric: Any = getattr(self._metrics, effect.metric)
        labelled = metric.labels(**dict(effect.labels)) if effect.labels else metric
        if hasattr(labelled, "observe"):
            labelled.observe(effect.value)
        else:
            labelled.inc(effect.value)

    def observe_append(self, seconds: float) -> None:
        """Note how long it took until facts were durable."""
        self._metrics.journal_append_seconds.observe(seconds)

    def show(self, core: Core, durable: Facts, lag: int) -> None:
        """Copy the number of workers, slots and jobs by state."""
        workers = dict.fromkeys(_WORKER_STATES, 0)
        slots = dict.fromkeys(_WORKER_STATES, 0)
        for worker in core.workers.values():
            view = worker_view(core, worker)
            workers[view.state] += 1
            slots[view.state] += view.slots
        for number, name in _WORKER_STATES.items():
            self._metrics.workers.labels(state=name).set(workers[number])
            self._metrics.slots.labels(state=name).set(slots[number])
        jobs = dict.fromkeys(_JOB_STATES, 0)
        dead = 0
        for facts in durable.jobs.values():
            jobs[facts.state] += 1
            dead += len(facts.kept.changed.failures) if facts.state == FAILED else 0
        for state, name in _JOB_STATES.items():
            self._metrics.jobs.labels(state=name).set(jobs[state])
        self._metrics.dead_letters.set(dead)
        self._metrics.journal_lag_records.set(lag)
