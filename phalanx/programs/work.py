"""The tasks of a program inside a leaf process, or in this one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from phalanx.errors import ResourceExhausted, Unimplemented
from phalanx.programs import RESULT_BYTES_MAX, graph_of
from phalanx.programs.base import Beside
from phalanx.programs.data import Fetch, JobData, JobFiles, Run
from phalanx.v1.task_service_pb2 import StoredValue
from phalanx.v1.training_pb2 import JobPlan, Layout


class ProgramWork:
    """One job; what runs its tasks is loaded when it is first needed."""

    def __init__(self, plan: JobPlan, files: JobFiles, fetch: Fetch) -> None:
        self._plan = plan
        self._files = files
        self._fetch = fetch

    def describe(self) -> Layout:
        """Load what runs tasks; return how many there are, as elements of one range."""
        assert self._run is not None
        return Layout(element_count=graph_of(self._plan).count)

    def call(self, task: int, inputs: Sequence[StoredValue]) -> tuple[bytes, Beside]:
        """Run one task; return its result and what it leaves beside it. Raises ResourceExhausted
        for a result that is too large."""
        job, run = self._job, self._run
        job.beside = Beside()
        found = run(task, [job.result(each.digest, each.size_bytes) for each in inputs])
        if len(found) > RESULT_BYTES_MAX:
            raise ResourceExhausted(
                f"task {task} has a result of {len(found)} bytes; at most {RESULT_BYTES_MAX} are "
                "taken",
                reason="VALUE_TOO_LARGE",
            )
        if len(found) + len(job.beside.kept) > RESULT_BYTES_MAX:
            job.beside.kept = b""
        return found, job.beside

    def close(self) -> None:
        """Nothing is held but memory."""

    @cached_property
    def _job(self) -> JobData:
        return JobData(self._plan, self._files, self._fetch)

    @cached_property
    def _run(self) -> Run:
        return runner_of(self._job)


def runner_of(job: JobData) -> Run:
    """Return what runs the tasks of a job. Raises PhalanxError where that cannot be done on this
    machine, and Unimplemented for a program that is not known here."""
    match job.spec.WhichOneof("program"):
        case "forest":
            from phalanx.forests.growing import ForestTasks

            return ForestTasks(job).run
        case "evaluate":
            from phalanx.scoring.tasks import EvaluateTasks

            return EvaluateTasks(job).run
        case "predict":
            from phalanx.scoring.tasks import PredictTasks

            return PredictTasks(job).run
        case "cascade":
            from phalanx.cascades.tasks import CascadeTasks

            return CascadeTasks(job).run
        case "sweep":
            from phalanx.sweeps.tasks import SweepTasks

            return SweepTasks(job).run
        case other:
            raise Unimplemented(f"the program {other} has no tasks that can be run")
