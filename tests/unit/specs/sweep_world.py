"""A sweep whose trials have scores that are given, on workers that die, owners that change and
reports that come twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from phalanx.programs import graph_of
from phalanx.specs import job_plan, prepare
from phalanx.sweeps.steps import rounds_of, steps_of
from phalanx.sweeps.tasks import SweepTasks
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import StoredValue, TaskReport
from tests.unit.aggregation.dispatch_world import Worker, World

ScoreOf = Callable[[int, int, int], float | None]
"""Configuration, round, fold → score."""

MODEL = b"the model"


@dataclass(frozen=True)
class Kept:
    """A result that lies in memory."""

    digest: str
    size_bytes: int
    content: bytes

    def read(self) -> bytes:
        return self.content


class FakeSweep:
    """The tasks of a sweep over `train.l2`, whose values are the hundredths of their numbers."""

    def __init__(self, spec: JobSpec, dataset: Dataset, score_of: ScoreOf) -> None:
        self.spec = prepare(spec, dataset)
        self.graph = graph_of(job_plan(self.spec, dataset, "job-1"))
        self.steps, self.rounds = steps_of(self.spec), rounds_of(self.spec)
        self._score_of = score_of
        self._kept: dict[str, Kept] = {}
        self._tasks = SweepTasks(SimpleNamespace(spec=self.spec))  # type: ignore[arg-type]

    def run(self, task: int, digests: Sequence[str]) -> Kept:
        """Run a task with the results of others."""
        inputs: Any = [self._kept[digest] for digest in digests]
        at = [each.steps for each in self.rounds]

        def score(_job: Any, fitted: tuple[JobSpec, int], fold: int, _metric: str) -> float | None:
            job, steps = fitted
            return self._score_of(round(job.train.l2 * 100), at.index(steps), fold)

        kind = self.steps[task].kind
        with (
            mock.patch("phalanx.sweeps.tasks.fold_of", lambda _job, _folds, fold: (fold, fold)),
            mock.patch("phalanx.sweeps.tasks.fit", lambda _job, job, _rows, steps: (job, steps)),
            mock.patch("phalanx.sweeps.tasks.score", score),
        ):
            # What is made of the table is no part of this.
            last = kind in ("plot", "winner", "end")
            content = MODEL if last else self._tasks.run(task, inputs)
        digest = hashlib.sha256(content).hexdigest()
        self._kept[digest] = Kept(digest, len(content), content)
        return self._kept[digest]

    def in_order(self) -> list[Kept]:
        """All results, made one after another."""
        found: list[Kept] = []
        for task, needs in enumerate(self.graph.needs):
            values = {
                needed: StoredValue(
                    digest=found[needed].digest, size_bytes=found[needed].size_bytes
                )
                for needed in needs
            }
            passed = self.graph.passed(task, values)
            if passed is not None:
                found.append(self._kept[passed.digest])
            else:
                found.append(self.run(task, [values[needed].digest for needed in needs]))
        return found

    def content(self, digest: str) -> bytes:
        return self._kept[digest].content


class SweepWorld(World):
    """Runs such a sweep on a dispatcher with everything that goes wrong, drawn by one seed."""

    def __init__(self, seed: int, sweep: FakeSweep) -> None:
        self.sweep = sweep
        super().__init__(seed, total=sweep.graph.count, graph=sweep.graph)

    def run_one(self, worker: Worker) -> None:
        number = self.random.choice(list(worker.open))
        task = worker.open.pop(number)
        kept = self.sweep.run(task, worker.inputs[number])
        stored = StoredValue(digest=kept.digest, size_bytes=kept.size_bytes)
        report = TaskReport(task=task, attempt=number, seconds=0.01, stored=stored)
        worker.reports[number] = report
        worker.unsent.append(number)
