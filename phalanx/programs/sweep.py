"""Sweeps: every configuration on every fold is a task.

The graph: trials of a round, then a task that orders them; the next round has trials of the best
only. Without `asha` there is one round. Then the table is written, in the forms in which people
read it, the best is trained on all rows, and one task names what was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from phalanx.errors import Violation
from phalanx.programs.base import Graph, Program
from phalanx.programs.evaluate import METRICS
from phalanx.sweeps import checks
from phalanx.sweeps.configurations import count_of
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

FOLDS, REDUCTION = 5, 3.0
LESS_IS_BETTER = ("log_loss", "rmse", "mae")
TABLE_FILE, CSV_FILE, PLOT_FILE = "results.json", "results.csv", "results.png"

TRIAL, ORDER, TABLE, CSV, PLOT, WINNER, END = (
    "trial",
    "order",
    "table",
    "csv",
    "plot",
    "winner",
    "end",
)


@dataclass(frozen=True)
class Round:
    """How many configurations are left, and for how many steps they train; 0: to their end."""

    count: int
    steps: int


@dataclass(frozen=True)
class Step:
    """What one task does: `place` among those left of its round, and a fold."""

    kind: str
    needs: tuple[int, ...]
    round: int = 0
    place: int = 0
    fold: int = 0


def rounds_of(spec: JobSpec) -> list[Round]:
    """Return the rounds of a resolved sweep."""
    sweep = spec.sweep
    left = count_of(sweep)
    found = []
    if sweep.HasField("asha"):
        steps = float(sweep.asha.min_steps)
        while steps < sweep.base.train.stop.steps:
            found.append(Round(left, int(steps)))
            left = max(1, int(left / sweep.asha.reduction))
            steps *= sweep.asha.reduction
    return [*found, Round(left, 0)]


def steps_of(spec: JobSpec) -> list[Step]:
    """Return what each task of a resolved sweep does."""
    steps: list[Step] = []
    orders: list[int] = []
    folds = spec.sweep.folds
    for number, each in enumerate(rounds_of(spec)):
        first = len(steps)
        before = tuple(orders[-1:])
        steps += [
            Step(TRIAL, before, number, place, fold)
            for place in range(each.count)
            for fold in range(folds)
        ]
        orders.append(len(steps))
        steps.append(Step(ORDER, tuple(range(first, orders[-1])), number))
    table = len(steps)
    steps.append(Step(TABLE, tuple(orders)))
    steps += [Step(kind, (table,)) for kind in (CSV, PLOT, WINNER)]
    steps.append(Step(END, tuple(range(table, table + 4))))
    return steps


class Sweep(Program):
    """Grid and random search with cross-validation."""

    name: ClassVar[str] = "sweep"
    leaves_model: ClassVar[bool] = True

    def violations(self, spec: JobSpec) -> Iterator[Violation]:
        """See `Program`."""
        yield from checks.violations(spec)

    def violations_against(self, spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
        """See `Program`."""
        yield from checks.violations_against(spec, dataset)

    def resolve(self, spec: JobSpec, dataset: Dataset) -> None:
        """See `Program`. The base stays as it is written: what its defaults are may depend on the
        values of a configuration."""
        sweep = spec.sweep
        sweep.folds = sweep.folds or FOLDS
        sweep.objective.metric = sweep.objective.metric or METRICS[dataset.task][0]
        if sweep.HasField("asha") and not sweep.asha.HasField("reduction"):
            sweep.asha.reduction = REDUCTION
        if not spec.data.HasField("shards"):
            spec.data.shards = 1

    def graph(self, plan: JobPlan) -> Graph:
        """See `Program`."""
        return Graph(tuple(step.needs for step in steps_of(JobSpec.FromString(plan.spec))))
