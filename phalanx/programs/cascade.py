"""Kernel support vector machines by a cascade: only rows that may be support vectors are passed on.

The graph: in each pass every shard is solved by itself, and what is left of two of them is solved
together, up to the top, whose support vectors go back into every shard of the next pass. A pass
can only make the dual objective larger, so that they end at the optimum of all rows. Then the
support vectors are read, shard by shard, and one task puts the model together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from phalanx.errors import Violation
from phalanx.programs.base import Graph, Program
from phalanx.tasks import TASKS_MAX
from phalanx.texts import number_of
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

ROWS_OF_A_SHARD = 5_000
"""By default; the time of a task grows with the square of its rows."""

SHARDS_BY_DEFAULT, PASSES, GAP = 64, 10, 1e-6
PASSES_MAX = 1000

KERNEL_MEGABYTES = 200
"""libsvm keeps so much of the kernel."""

SHARD, MERGE, VECTORS, MODEL = "shard", "merge", "vectors", "model"


@dataclass(frozen=True)
class Step:
    """What one task does; `number` is its shard, or its place among the merges of the pass."""

    kind: str
    number: int
    needs: tuple[int, ...]
    top: bool = False
    """Whether a pass ends with it. From the second on, its last input is the top before it."""


@dataclass(frozen=True)
class Layers:
    """The steps of all passes, in order."""

    steps: tuple[Step, ...]

    @staticmethod
    def of(plan: JobPlan) -> Layers:
        """Return those of a job."""
        spec = JobSpec.FromString(plan.spec)
        shards = max(1, plan.shards)
        steps: list[Step] = []
        before: tuple[int, ...] = ()
        for _ in range(passes_of(shards, spec.cascade.passes)):
            _add_pass(steps, shards, before)
            before = (len(steps) - 1,)
        first = len(steps)
        steps += [Step(VECTORS, shard, before) for shard in range(shards)]
        steps.append(Step(MODEL, 0, (*before, *range(first, first + shards))))
        return Layers(tuple(steps))


def _add_pass(steps: list[Step], shards: int, before: tuple[int, ...]) -> None:
    """Add the tasks of one pass; `before` is the top of the one before."""
    level = list(range(len(steps), len(steps) + shards))
    steps += [Step(SHARD, shard, before, top=shards == 1) for shard in range(shards)]
    merges = 0
    while len(level) > 1:
        last = len(level) == 2
        following = []
        for pair in range(0, len(level) - 1, 2):
            needs = (level[pair], level[pair + 1], *(before if last else ()))
            following.append(len(steps))
            steps.append(Step(MERGE, merges, needs, top=last))
            merges += 1
        # One without a neighbour goes up a level as it is.
        level = following + level[len(level) - len(level) % 2 :]


def passes_of(shards: int, passes: int) -> int:
    """Return how many passes there are at most: one shard has all rows in the first."""
    return 1 if shards == 1 else passes


class Cascade(Program):
    """The machine of libsvm, of rows that no process could solve at once."""

    name: ClassVar[str] = "cascade"
    leaves_model: ClassVar[bool] = True

    def violations(self, spec: JobSpec) -> Iterator[Violation]:
        """See `Program`."""
        cascade = spec.cascade
        for name, value in (("c", cascade.c), ("gamma", cascade.gamma)):
            if value <= 0 and math.isfinite(value):
                yield Violation(f"cascade.{name}", f"must be above 0, not {value:g}")
        if not 0 <= cascade.gap_at_most < 1:
            message = f"must be from 0 to below 1, not {cascade.gap_at_most:g}"
            yield Violation("cascade.gap_at_most", message)
        if cascade.HasField("passes") and not 1 <= cascade.passes <= PASSES_MAX:
            message = f"must be at least 1 and at most {PASSES_MAX}, not {cascade.passes}"
            yield Violation("cascade.passes", message)
        if spec.seed:
            yield Violation("seed", "changes nothing, as nothing is drawn here; leave it out")

    def violations_against(self, spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
        """See `Program`."""
        if len(dataset.classes) < 2:
            yield Violation(
                "cascade",
                f"tells classes apart, and {dataset.name} is for {dataset.task}"
                if not dataset.classes
                else f"tells classes apart, and {dataset.name} has only one",
            )
        shards = spec.data.shards
        tasks = 2 * shards * passes_of(shards, spec.cascade.passes) + shards
        if tasks > TASKS_MAX:
            yield Violation(
                "cascade.passes",
                f"{number_of(spec.cascade.passes, 'pass', 'passes')} over "
                f"{number_of(shards, 'shard')} are {tasks} tasks; at most {TASKS_MAX} are allowed",
            )

    def resolve(self, spec: JobSpec, dataset: Dataset) -> None:
        """See `Program`."""
        cascade = spec.cascade
        cascade.gap_at_most = cascade.gap_at_most or GAP
        if not cascade.HasField("passes"):
            cascade.passes = PASSES
        if not cascade.HasField("standardise"):
            cascade.standardise = dataset.format != "csr"
        if not spec.data.HasField("shards"):
            rows = dataset.rows.get(spec.data.split or "train", 0)
            spec.data.shards = max(1, min(SHARDS_BY_DEFAULT, rows // ROWS_OF_A_SHARD))

    def graph(self, plan: JobPlan) -> Graph:
        """See `Program`."""
        return Graph(tuple(step.needs for step in Layers.of(plan).steps))

    def worker_bytes(self, spec: JobSpec, dataset: Dataset) -> int:
        """See `Program`: the rows of a task, dense, and the part of the kernel that is kept."""
        rows = dataset.rows.get(spec.data.split, 0)
        share = min(rows, 4 * rows // max(1, spec.data.shards))
        return 2 * 8 * share * dataset.features + KERNEL_MEGABYTES * 2**20
