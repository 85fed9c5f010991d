"""A sweep whose trials have scores that are given, on workers that die, owners that change and
reports that come twice."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from phalanx.programs import graph_of
from phalanx.programs.base import Beside
from phalanx.programs.data import BlobUnavailable
from phalanx.specs import job_plan, prepare
from phalanx.sweeps.steps import rounds_of, steps_of
from phalanx.sweeps.tasks import SweepTasks
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import KeptState, StoredValue, TaskReport
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
    beside: Beside = field(default_factory=Beside)
    lost: bool = False

    def read(self) -> bytes:
        if self.lost:
            raise BlobUnavailable("it was collected")
        return self.content


@dataclass(frozen=True)
class FakeFitted:
    """A training of so many steps, and what it keeps."""

    job: JobSpec
    steps: int
    kept: bytes


class FakeSweep:
    """The tasks of a sweep over `train.l2`, whose values are the hundredths of their numbers."""

    def __init__(self, spec: JobSpec, dataset: Dataset, score_of: ScoreOf) -> None:
        self.spec = prepare(spec, dataset)
        self.graph = graph_of(job_plan(self.spec, dataset, "job-1"))
        self.steps, self.rounds = steps_of(self.spec), rounds_of(self.spec)
        self._score_of = score_of
        self._kept: dict[str, Kept] = {}
        self._job = SimpleNamespace(spec=self.spec, beside=Beside())
        self._tasks = SweepTasks(self._job)  # type: ignore[arg-type]
        #: (configuration, round, fold) of the trials that went on, and that would have begun anew.
        self.went_on: set[tuple[int, int, int]] = set()
        self.began_anew: set[tuple[int, int, int]] = set()

    def run(self, task: int, digests: Sequence[str]) -> Kept:
        """Run a task with the results of others."""
        inputs: Any = [self._kept[digest] for digest in digests]
        at = [each.steps for each in self.rounds]

        def fit(_job: Any, job: JobSpec, fold: int, steps: int, earlier: Any) -> FakeFitted:
            configuration, number = round(job.train.l2 * 100), at.index(steps)
            try:
                if earlier is not None:
                    # That of another trial would be the end of the same bits.
                    assert earlier() == f"{configuration} {number - 1} {fold}".encode()
            except BlobUnavailable:
                earlier = None
            if number:
                went = self.began_anew if earlier is None else self.went_on
                went.add((configuration, number, fold))
            return FakeFitted(job, steps, f"{configuration} {number} {fold}".encode())

        def score(_job: Any, fitted: FakeFitted, fold: int, _metric: str) -> float | None:
            configuration = round(fitted.job.train.l2 * 100)
            return self._score_of(configuration, at.index(fitted.steps), fold)

        kind = self.steps[task].kind
        with (
            mock.patch("phalanx.sweeps.tasks.fold_of", lambda _job, _folds, fold: (fold, fold)),
            mock.patch("phalanx.sweeps.tasks.fit", fit),
            mock.patch("phalanx.sweeps.tasks.score", score),
        ):
            # What is made of the table is no part of this.
            last = kind in ("plot", "winner", "end")
            self._job.beside = Beside()
            content = MODEL if last else self._tasks.run(task, inputs)
        made = self._keep(content, self._job.beside)
        if made.beside.kept:
            self._keep(made.beside.kept)
        return made

    def _keep(self, content: bytes, beside: Beside | None = None) -> Kept:
        digest = hashlib.sha256(content).hexdigest()
        self._kept[digest] = Kept(digest, len(content), content, beside or Beside())
        return self._kept[digest]

    def report_of(self, task: int, attempt: int, seconds: float, digests: Sequence[str]) -> Any:
        """Run a task and say what came of it."""
        made = self.run(task, digests)
        stored = StoredValue(digest=made.digest, size_bytes=made.size_bytes)
        report = TaskReport(task=task, attempt=attempt, seconds=seconds, stored=stored)
        report.earlier.extend(made.beside.earlier)
        if made.beside.kept:
            kept = hashlib.sha256(made.beside.kept).digest()
            report.kept.CopyFrom(KeptState(sha256=kept, size_bytes=len(made.beside.kept)))
        return report

    def lose(self, share: random.Random) -> None:
        """Half of all that was kept beside results is collected."""
        for digest, each in self._kept.items():
            if each.content.count(b" ") == 2 and share.random() < 0.5:
                self._kept[digest] = replace(each, lost=True)

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
        if self.random.random() < 0.1:
            self.sweep.lose(self.random)
        report = self.sweep.report_of(task, number, 0.01, worker.inputs[number])
        worker.reports[number] = report
        worker.unsent.append(number)
