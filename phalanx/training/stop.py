"""When a job ends: pure functions of the spec and of the recorded losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.training.metrics import direction
from phalanx.v1.job_spec_pb2 import Plateau, Threshold, Train

STOP_STEPS = "STOP_STEPS"
STOP_EPOCHS = "STOP_EPOCHS"
STOP_THRESHOLD = "STOP_THRESHOLD"
STOP_PLATEAU = "STOP_PLATEAU"
STOP_WALL_TIME = "STOP_WALL_TIME"
STOP_EPSILON = "STOP_EPSILON"


class StopRules:
    """The stop rules of one job; the first that holds wins and stays.

    Args:
        train: resolved program.
        total_steps: steps that the rules allow which count them; 0: no such limit.
        private_steps: steps that ``privacy.max_epsilon`` allows; 0: no such limit.
    """

    def __init__(self, train: Train, total_steps: int, private_steps: int = 0) -> None:
        self._private_steps = private_steps
        self._stop = train.stop
        self._total_steps = total_steps
        self._plateau = _Plateau(train.stop.plateau) if train.stop.HasField("plateau") else None
        self.reason = ""

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in what was measured at version ``step``: the loss of a step, or an evaluation."""
        for threshold in self._stop.thresholds:
            value = metrics.get(threshold.metric)
            if value is not None and holds(threshold, value):
                self._end(STOP_THRESHOLD)
        if self._private_steps and step >= self._private_steps:
            self._end(STOP_EPSILON)
        if self._total_steps and step >= self._total_steps:
            by_steps = self._stop.HasField("steps") and self._stop.steps <= self._total_steps
            self._end(STOP_STEPS if by_steps else STOP_EPOCHS)

    def observe_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of one evaluation, which a plateau is counted in."""
        if self._plateau is not None and self._plateau.metric in metrics:
            self._plateau.add(metrics[self._plateau.metric])
            if self._plateau.is_flat:
                self._end(STOP_PLATEAU)

    def observe_time(self, elapsed_s: float) -> None:
        """Take in how long the job has run; the only rule that depends on a clock."""
        if self._stop.HasField("wall_time"):
            limit_s = self._stop.wall_time.seconds + self._stop.wall_time.nanos / 1e9
            if elapsed_s >= limit_s:
                self._end(STOP_WALL_TIME)

    def _end(self, reason: str) -> None:
        self.reason = self.reason or reason

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, as plain JSON values."""
        return {} if self._plateau is None else {"plateau": self._plateau.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint.

        The reason is found again rather than restored: a job that goes on from another one may
        have other stop rules. What was seen of another metric says nothing of this one's.
        """
        seen = state.get("plateau")
        if self._plateau is not None and seen is not None and self._plateau.is_about(seen):
            self._plateau.restore(seen)


class _Plateau:
    """Counts evaluations without change.

    A metric whose name tells what is better must beat its best value by more than ``min_change``
    within the last ``evaluations``; another must move by more than that, either way.
    """

    def __init__(self, rule: Plateau) -> None:
        self.metric = rule.metric
        self._patience = max(1, rule.evaluations)
        self._min_change = rule.min_change
        self._direction = direction(rule.metric)
        self._best: float | None = None
        self._recent: list[float] = []

    def add(self, value: float) -> None:
        """Take in the next value."""
        self._push(value * self._direction if self._direction else value)

    @property
    def is_flat(self) -> bool:
        """Whether the last ``evaluations`` values brought no change."""
        if self._best is None:
            return False
        if self._direction:
            return max(self._recent) <= self._best + self._min_change
        values = [self._best, *self._recent]
        return max(values) - min(values) <= self._min_change

    def state(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"metric": self.metric, "best": self._best, "recent": self._recent}

    def is_about(self, state: Mapping[str, Any]) -> bool:
        """Whether a state tells of the same metric; older ones do not say of which."""
        return bool(state.get("metric", self.metric) == self.metric)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over another's state, keeping as many values as this rule looks at."""
        best, values = state["best"], [float(value) for value in state["recent"]]
        self._best, self._recent = None if best is None else float(best), []
        for value in values:
            self._push(value)

    def _push(self, value: float) -> None:
        self._recent.append(value)
        if len(self._recent) > self._patience:
            oldest = self._recent.pop(0)
            if self._best is None or not self._direction or oldest > self._best:
                self._best = oldest


def holds(threshold: Threshold, value: float) -> bool:
    """Return whether a value is within a bound; without one every value is."""
    bound = threshold.WhichOneof("bound")
    if bound == "at_least":
        return value >= threshold.at_least
    return bound is None or value <= threshold.at_most
