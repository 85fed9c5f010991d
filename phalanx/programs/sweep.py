"""Sweeps; their tasks are told in `phalanx.sweeps.steps`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from phalanx.errors import Violation
from phalanx.programs.base import Graph, Program
from phalanx.programs.evaluate import METRICS
from phalanx.sweeps import checks
from phalanx.sweeps.steps import FOLDS, REDUCTION, level, rounds_of, steps_of, stopping_of
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

LESS_IS_BETTER = ("log_loss", "rmse", "mae")
TABLE_FILE, CSV_FILE, PLOT_FILE = "results.json", "results.csv", "results.png"


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
        stopping = stopping_of(sweep)
        if stopping is not None and not stopping.HasField("reduction"):
            stopping.reduction = REDUCTION
        if not spec.data.HasField("shards"):
            spec.data.shards = 1

    def worker_bytes(self, spec: JobSpec, dataset: Dataset) -> int:
        """See `Program`: the rows, and what the largest of the jobs that are tried takes."""
        from phalanx.specs.sweeps import trial_bytes  # which plans jobs of programs with this

        return super().worker_bytes(spec, dataset) + trial_bytes(spec, dataset)

    def graph(self, plan: JobPlan) -> Graph:
        """See `Program`."""
        spec = JobSpec.FromString(plan.spec)
        steps, rounds = steps_of(spec), len(rounds_of(spec))
        return Graph(
            needs=tuple(step.needs for step in steps),
            passing=frozenset(task for task, step in enumerate(steps) if step.passes),
            levels=tuple(level(step, rounds) for step in steps),
        )
