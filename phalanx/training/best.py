"""Which evaluation is the best so far: a pure function of the spec and of what was measured.

The rule is that of ``output.best``. Of equal values the first is kept, so that a step that is
computed again changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phalanx.training.metrics import direction, metrics_from_sums
from phalanx.training.stop import holds
from phalanx.v1.job_pb2 import BestEvaluation
from phalanx.v1.job_spec_pb2 import JobSpec, Output, Threshold

BEST_VECTOR = "best"
"""The name in checkpoints of the parameters with the best evaluation, where they are not those of
the checkpoint's own step."""

METRIC_NOT_COMPUTED = "METRIC_NOT_COMPUTED"
"""Why a job fails whose model does not measure what is to be compared."""


@dataclass(frozen=True)
class Kept:
    """The evaluation whose parameters are kept.

    Attributes:
        step: the step whose parameters were evaluated.
        metric: what was compared, and its value there.
        metrics: newest value of every metric at that step.
    """

    step: int
    metric: str
    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def message(self) -> BestEvaluation:
        """What people are told of it."""
        return BestEvaluation(step=self.step, metric=self.metric, value=self.value)


class BestRule:
    """Compares the evaluations of one job, if it keeps the best one."""

    def __init__(self, output: Output) -> None:
        self._rule = output.best if output.HasField("best") else None
        self._direction = 0 if self._rule is None else better(self._rule)
        self.kept: Kept | None = None

    def observe(
        self, step: int, measured: Mapping[str, float], metrics: Mapping[str, float]
    ) -> None:
        """Take in an evaluation of the parameters of a step; ``metrics`` is all that is told."""
        rule = self._rule
        value = math.nan if rule is None else measured.get(rule.metric, math.nan)
        if rule is not None and self._may_be_kept(value) and self._is_better(value):
            known = {name: each for name, each in metrics.items() if math.isfinite(each)}
            self.kept = Kept(step, rule.metric, value, {**known, rule.metric: value})

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint must keep, as plain JSON values; None: nothing is kept yet."""
        if self.kept is None:
            return None
        return {
            "metric": self.kept.metric,
            "direction": self._direction,
            "step": self.kept.step,
            "value": self.kept.value,
            "metrics": dict(self.kept.metrics),
        }

    def restore(self, root_state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint's root kept, if it would be kept by this rule, too.

        A job that goes on from another one may have another rule; what was best by that one says
        nothing here, and its parameters are the only ones that are left.
        """
        found, state = kept_in(root_state), root_state.get("best")
        if found is None or state is None or self._rule is None:
            return
        same = (found.metric, state["direction"]) == (self._rule.metric, self._direction)
        if same and self._may_be_kept(found.value):
            self.kept = found

    def _may_be_kept(self, value: float) -> bool:
        assert self._rule is not None
        return math.isfinite(value) and holds(self._rule, value)

    def _is_better(self, value: float) -> bool:
        return self.kept is None or (value - self.kept.value) * self._direction > 0


def better(rule: Threshold) -> int:
    """Return +1 where the greater value of a rule's metric is the better one, -1 for the smaller,
    and 0 where neither its bound nor the metric's name tells."""
    bound = rule.WhichOneof("bound")
    if bound is None:
        return direction(rule.metric)
    return 1 if bound == "at_least" else -1


def missing_metric(spec: JobSpec, evaluation_sums: Sequence[str]) -> str:
    """Say what is wrong where a job's evaluations do not give what is to be compared; else "".

    Of user code only whoever has built the model knows what it measures.
    """
    metric, split = spec.output.best.metric, spec.train.evaluation.split
    zeros = [0.0] * len(evaluation_sums)
    known = sorted(metrics_from_sums(split, evaluation_sums, zeros, rows=1))
    if not spec.output.HasField("best") or metric in known:
        return ""
    given = ", ".join(known) or "nothing"
    return f"output.best.metric: {metric!r} is never computed; evaluations of this job give {given}"


def kept_in(root_state: Mapping[str, Any]) -> Kept | None:
    """Return what the root's part of a checkpoint says of the best evaluation; None: nothing.

    Raises ValueError, KeyError or TypeError where it cannot be read.
    """
    state = root_state.get("best")
    if state is None:
        return None
    metrics = {str(name): float(value) for name, value in state["metrics"].items()}
    return Kept(int(state["step"]), str(state["metric"]), float(state["value"]), metrics)
