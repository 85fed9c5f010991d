"""What is told of recoveries, against the time at which the steps were really committed.

The machines of a run agree on no wall time, so whoever compares two of their clocks is far off.
"""

from __future__ import annotations

import random
from typing import Any

from coordinator.aggregation.core.effects import Committed
from coordinator.aggregation.hosting import HostedJob
from coordinator.control import leader
from coordinator.control.core import incidents
from coordinator.control.core.effects import Emit, Observe
from phalanx.testing.simulation.clocks import Environment
from tests.simulation.oracle import Oracle

CLOCK_OFF_S = 25.0
"""By how much wall clocks are off at most: any two by less than what control takes for a jump."""
_EXACT_S = 1e-5
"""Events tell microseconds."""


def clock_off_ns(seed: int, machine: str) -> int:
    """By how much the wall clock of a machine is off, from the beginning on."""
    off_s = random.Random(f"clock {seed} {machine}").uniform(-CLOCK_OFF_S, CLOCK_OFF_S)
    return int(off_s * 1e9)


class TimeLines:
    """The commits of one run, and the checks of what control says about them."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._committed_s: dict[tuple[str, int, int], float] = {}
        """When each step of each term of a job was committed."""

    def _told(self, core: Any, event: Any) -> None:
        """A step is told to be as old as it is, and by no more younger than its report."""
        now_s = self._oracle.world.now_s
        took_s, committed_s = float(event.details["commit_s"]), event.details["committed_unix_s"]
        told_ago_s = event.time.ToNanoseconds() / 1e9 - float(committed_s)
        self._oracle.demand(took_s >= 0, f"{event.job_id} recovered {-took_s:.3f} s too early")
        key = (event.job_id, core.facts.jobs[event.job_id].term, event.step)
        ago_s = now_s - self._committed_s.get(key, 0.0)
        self._oracle.demand(
            -_EXACT_S <= told_ago_s <= ago_s + _EXACT_S,
            f"step {event.step} of {event.job_id} is told to be committed {told_ago_s:.3f} s ago; "
            f"it was {ago_s:.3f} s ago",
        )

    def _observed(self, effect: Observe) -> None:
        self._oracle.demand(
            effect.metric != "recovery_seconds" or 0 <= effect.value <= self._oracle.world.now_s,
            f"a recovery of {effect.value:.3f} s: {dict(effect.labels)}",
        )

    def _is_open(self, core: Any, job: Any) -> None:
        """A step that is known to be committed after a failure ends it."""
        if job.report is None:
            return
        step_s = self._committed_s.get((job.job_id, job.report.term, job.report.step))
        for incident in core.incidents.values() if step_s is not None else ():
            if job.job_id in incident.jobs and incident.cause != incidents.CONTROL_LOST:
                detected_s = incident.detected.monotonic_s
                self._oracle.demand(
                    step_s <= detected_s,
                    f"{job.job_id} has not recovered by step {job.report.step}, committed "
                    f"{step_s - detected_s:.3f} s after the loss of {incident.member_id}",
                )

    def install(self, environment: Environment) -> None:
        """Look at what is committed and at what is told."""
        commit, handle, close = HostedJob._committed, leader.handle, incidents.committed

        def committed(hosted: Any, effect: Committed) -> None:
            ranges = hosted.ranges
            if ranges.is_root:
                key = (ranges.plan.job_id, ranges.term, effect.version)
                self._committed_s.setdefault(key, self._oracle.world.now_s)
            commit(hosted, effect)

        def closed(core: Any, job: Any, *more: Any) -> None:
            close(core, job, *more)
            self._is_open(core, job)

        def handled(core: Any, event: Any, now: Any) -> Any:
            effects = handle(core, event, now)
            for effect in effects:
                if isinstance(effect, Observe):
                    self._observed(effect)
                elif isinstance(effect, Emit) and effect.event.type == "RECOVERED":
                    self._told(core, effect.event)
            return effects

        environment.replace(HostedJob, "_committed", committed)
        environment.replace(incidents, "committed", closed)
        environment.replace(leader, "handle", handled)
