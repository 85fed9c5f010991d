"""When a job ends: pure functions of the spec and of the recorded losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.training.metrics import lower_is_better
from phalanx.v1.job_spec_pb2 import Plateau, Threshold, Train

STOP_STEPS = "STOP_STEPS"
STOP_EPOCHS = "STOP_EPOCHS"
STOP_THRESHOLD = "STOP_THRESHOLD"
STOP_PLATEAU = "STOP_PLATEAU"
STOP_WALL_TIME = "STOP_WALL_TIME"


class StopRules:
    """The stop rules of one job; the first that holds wins and stays.

    Args:
        train: resolved program.
        total_steps: steps that ``stop.steps`` and ``stop.epochs`` allow; 0: no such limit.
    """

    def __init__(self, train: Train, total_steps: int) -> None:
        self._stop = train.stop
        self._total_steps = total_steps
        self._plateau: list[float] = []
        self.reason = ""

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in what was measured at version ``step``: the loss of a step, or an evaluation."""
        for threshold in self._stop.thresholds:
            value = metrics.get(threshold.metric)
            if value is not None and _holds(threshold, value):
                self._end(STOP_THRESHOLD)
        if self._stop.HasField("plateau") and self._stop.plateau.metric in metrics:
            self._plateau.append(metrics[self._stop.plateau.metric])
            if _is_flat(self._stop.plateau, self._plateau):
                self._end(STOP_PLATEAU)
        if self._total_steps and step >= self._total_steps:
            by_steps = self._stop.HasField("steps") and self._stop.steps <= self._total_steps
            self._end(STOP_STEPS if by_steps else STOP_EPOCHS)

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
        return {"plateau": self._plateau, "reason": self.reason}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a checkpoint.

        The reason is found again rather than restored: a resumed job may have other stop rules.
        """
        self._plateau = [float(value) for value in state["plateau"]]


def _holds(threshold: Threshold, value: float) -> bool:
    if threshold.WhichOneof("bound") == "at_least":
        return value >= threshold.at_least
    return value <= threshold.at_most


def _is_flat(plateau: Plateau, values: list[float]) -> bool:
    """Whether the last evaluations did not improve the best value by more than ``min_change``."""
    patience = max(1, plateau.evaluations)
    if len(values) <= patience:
        return False
    sign = -1.0 if lower_is_better(plateau.metric) else 1.0
    before = max(sign * value for value in values[:-patience])
    recent = max(sign * value for value in values[-patience:])
    return recent <= before + plateau.min_change
