"""Jobs that run inside this process: the same leaves and the same tree, one job after another."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from phalanx.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    PhalanxError,
    no_job,
)
from phalanx.ids import new_id
from phalanx.privacy.secret import new_secret
from phalanx.sdk.in_process_tasks import TaskFailed
from phalanx.tasks import is_program, is_task_set, runs_tasks
from phalanx.texts import number_of
from phalanx.training.expected import expected_of_shard
from phalanx.v1 import job_pb2, job_service_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import TaskResult
from phalanx.v1.training_pb2 import JobPlan

if TYPE_CHECKING:
    from phalanx.training.local import Progress, TrainedModel

State = job_pb2.Job.State
OVER = frozenset({State.STATE_SUCCEEDED, State.STATE_CANCELLED})
"""Ended for good; a job that failed may be tried again."""
ENDED = OVER | {State.STATE_FAILED}

Train = Callable[[JobPlan, Callable[["Progress"], None], bytes], "TrainedModel"]
Register = Callable[[job_pb2.Job, JobPlan, "TrainedModel"], str]
"""Stores the model of a job; returns its name."""


RunTasks = Callable[[JobPlan, dict[int, TaskResult], Callable[[], None]], None]
"""Runs the tasks of a job that have no result yet."""

RunProgram = Callable[
    [job_pb2.Job, JobPlan, dict[int, TaskResult], Callable[[], None]], job_pb2.Result
]
"""The same for a program; stores what it leaves."""


class InProcessJobs:
    """The jobs of one process; they run in one thread, in the order of their submission.

    ``train`` computes a job, by a secret of its own, and ``register`` stores its model;
    ``run_tasks`` runs independent tasks, and ``run_program`` those of a program. All public methods
    may be called from any thread.
    """

    def __init__(
        self, train: Train, register: Register, run_tasks: RunTasks, run_program: RunProgram
    ) -> None:
        self._train = train
        self._register = register
        self._run_tasks = run_tasks
        self._run_program = run_program
        self._changed = threading.Condition()
        self._jobs: dict[str, _Run] = {}
        self._answers: dict[str, tuple[bytes, str]] = {}
        self._events: list[job_pb2.Event] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="phalanx-in-process")

    def submitted(self, request_id: str, content: bytes) -> job_pb2.Job | None:
        """Return the job of an earlier request with this id; None: there was none.

        Raises AlreadyExists where that one said something else, NotFound where its job is deleted.
        """
        with self._changed:
            known = self._answers.get(request_id) if request_id else None
            if known is None:
                return None
            if known[0] != content:
                raise AlreadyExists(f"request id {request_id!r} stands for another job already")
            return self._copy(known[1])

    def submit(
        self,
        spec: JobSpec,
        spec_sha256: str,
        plan: JobPlan,
        total_steps: int,
        request_id: str,
        content: bytes,
    ) -> job_pb2.Job:
        """Queue a job; the same request id and ``content`` give the first answer."""
        with self._changed:
            known = self.submitted(request_id, content)
            if known is not None:
                return known
            job = job_pb2.Job(
                id=new_id(spec.name),
                spec=spec,
                spec_sha256=spec_sha256,
                state=State.STATE_QUEUED,
                submitter="in-process",
                create_time=now(),
            )
            job.progress.total_steps = total_steps
            plan.job_id = job.id
            run = self._jobs[job.id] = _Run(job, plan)
            self._answers[request_id or job.id] = (content, job.id)
            self._event(run, "JOB_QUEUED", "")
        self._thread.submit(self._run, run)
        return self._copy(job.id)

    def get(self, job_id: str) -> job_pb2.Job:
        """Return a copy of a job. Raises NotFound."""
        with self._changed:
            return self._copy(job_id)

    def all(self) -> list[job_pb2.Job]:
        """Return copies of all jobs, newest first."""
        with self._changed:
            return [self._copy(job_id) for job_id in reversed(self._jobs)]

    def points(self, job_id: str) -> list[job_pb2.MetricPoint]:
        """Return what was measured, by step."""
        with self._changed:
            return list(self._find(job_id).points)

    def results(self, job_id: str) -> list[TaskResult]:
        """Return what the tasks of a job returned so far."""
        with self._changed:
            run = self._find(job_id)
            if not runs_tasks(run.job.spec):
                text = f"job {job_id} is no set of tasks and has no results of tasks"
                raise FailedPrecondition(text, reason="NO_TASKS")
            return list(run.results.values())

    def events(self, job_id: str, after_sequence: int) -> list[job_pb2.Event]:
        """Return what happened; an empty id means all jobs."""
        with self._changed:
            return [
                event
                for event in self._events
                if event.sequence > after_sequence and job_id in ("", event.job_id)
            ]

    def watch(self, job_id: str, after_sequence: int) -> Iterator[job_service_pb2.WatchJobResponse]:
        """Yield what WatchJob does: the job first, on every change and last."""
        sequence, revision, state = after_sequence, -1, None
        while True:
            with self._changed:
                run = self._find(job_id)
                while (
                    run.job.state == state
                    and run.revision == revision
                    and not self.events(job_id, sequence)
                ):
                    self._changed.wait()
                job, events = self._copy(job_id), self.events(job_id, sequence)
                seen, revision = revision, run.revision
            if state is None:
                yield job_service_pb2.WatchJobResponse(job=job)
            for event in events:
                sequence = event.sequence
                yield job_service_pb2.WatchJobResponse(event=event)
            if revision != seen:
                yield job_service_pb2.WatchJobResponse(progress=job.progress)
            if state is not None and job.state != state:
                yield job_service_pb2.WatchJobResponse(job=job)
            state = job.state
            if state in ENDED:
                return

    def cancel(self, job_id: str, reason: str) -> job_pb2.Job:
        """End a job at its next step."""
        with self._changed:
            run = self._find(job_id)
            self._require(
                run, "cancelled", State.STATE_QUEUED, State.STATE_RUNNING, State.STATE_PAUSED
            )
            run.cancel_reason = reason or "cancelled by its user"
            if run.job.state == State.STATE_QUEUED:
                self._end(run, State.STATE_CANCELLED, "CANCELLED", run.cancel_reason)
            run.paused = False
            self._changed.notify_all()
            return self._copy(job_id)

    def pause(self, job_id: str) -> job_pb2.Job:
        """Hold a job at its next step."""
        with self._changed:
            run = self._find(job_id)
            self._require(run, "paused", State.STATE_RUNNING)
            run.paused = True
            return self._copy(job_id)

    def resume(self, job_id: str) -> job_pb2.Job:
        """Go on with a paused job."""
        with self._changed:
            run = self._find(job_id)
            self._require(run, "resumed", State.STATE_PAUSED)
            run.paused = False
            self._changed.notify_all()
            return self._copy(job_id)

    def retry(self, job_id: str) -> job_pb2.Job:
        """Run a failed job again, from its beginning: in one process nothing is checkpointed."""
        with self._changed:
            run = self._find(job_id)
            self._require(run, "retried", State.STATE_FAILED)
            run.restart()
        self._thread.submit(self._run, run)
        return self.get(job_id)

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended."""
        with self._changed:
            run = self._find(job_id)
            self._require(run, "deleted", *ENDED)
            del self._jobs[job_id]

    def close(self) -> None:
        """Cancel what runs and wait for the end of its present step."""
        with self._changed:
            for run in self._jobs.values():
                if run.job.state not in ENDED:
                    run.cancel_reason = "its process ended"
                    run.paused = False
            self._changed.notify_all()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, run: _Run) -> None:
        with self._changed:
            if run.job.state in ENDED:
                return
            run.job.start_time.CopyFrom(now())
            run.begin_s = time.monotonic()
            self._set_state(run, State.STATE_RUNNING, "JOB_STARTED")
        try:
            finish = self._carry_out(run)
        except Cancelled:
            with self._changed:
                self._end(run, State.STATE_CANCELLED, "CANCELLED", run.cancel_reason)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything, and exit
            with self._changed:
                self._fail(run, error)
        else:
            with self._changed:
                finish()

    def _carry_out(self, run: _Run) -> Callable[[], None]:
        """Do what the job says; return what notes that it is done."""
        if is_task_set(run.job.spec):
            self._run_tasks(run.plan, run.results, partial(self._task_done, run))
            return partial(self._tasks_done, run)
        if is_program(run.job.spec):
            job, done = self.get(run.job.id), partial(self._task_done, run)
            result = self._run_program(job, run.plan, run.results, done)
            return partial(self._program_done, run, result)
        trained = self._train(run.plan, partial(self._progress, run), run.secret)
        model = self._register(self.get(run.job.id), run.plan, trained)
        return partial(self._succeed, run, model, trained)

    def _progress(self, run: _Run, progress: Progress) -> None:
        """Note a step; wait here while the job is paused, raise Cancelled when it shall end."""
        with self._changed:
            run.take(progress)
            self._go_on_or_not(run)

    def _task_done(self, run: _Run) -> None:
        """Note a task; wait here while the job is paused, raise Cancelled when it shall end."""
        with self._changed:
            run.count_tasks()
            self._go_on_or_not(run)

    def _tasks_done(self, run: _Run) -> None:
        steps, metrics = len(run.results), run.job.progress.metrics
        run.job.result.CopyFrom(job_pb2.Result(steps=steps, metrics=metrics))
        self._end(run, State.STATE_SUCCEEDED, "TASKS_DONE", f"{number_of(steps, 'task')} done")

    def _program_done(self, run: _Run, result: job_pb2.Result) -> None:
        for name, value in run.job.progress.metrics.items():
            if name not in result.metrics:
                result.metrics[name] = value
        run.job.result.CopyFrom(result)
        if result.model:
            self._event(run, "MODEL_REGISTERED", result.model)
        steps = number_of(result.steps, "task")
        self._end(run, State.STATE_SUCCEEDED, "TASKS_DONE", f"{steps} done")

    def _go_on_or_not(self, run: _Run) -> None:
        self._changed.notify_all()
        if run.held():
            self._set_state(run, State.STATE_PAUSED, "JOB_PAUSED")
            while run.held():
                self._changed.wait()
            if not run.cancel_reason:
                self._set_state(run, State.STATE_RUNNING, "JOB_RESUMED")
        if run.cancel_reason:
            raise Cancelled(run.cancel_reason)

    def _succeed(self, run: _Run, model: str, trained: TrainedModel) -> None:
        run.job.result.CopyFrom(
            job_pb2.Result(
                model=model,
                parameters_sha256=trained.parameters_sha256,
                bit_identical=not run.plan.asynchronous,
                metrics=trained.metrics,
                steps=trained.steps,
                best=None if trained.best is None else trained.best.message(),
                examples_lost=sum(
                    expected_of_shard(run.plan, shard, step) for shard, step in trained.left_out
                ),
            )
        )
        self._event(run, "MODEL_REGISTERED", model)
        self._end(run, State.STATE_SUCCEEDED, trained.reason, "")

    def _fail(self, run: _Run, error: BaseException) -> None:
        known = isinstance(error, PhalanxError)
        reason = error.reason if isinstance(error, PhalanxError) else "RAISED"
        failure = (
            error.failure
            if isinstance(error, TaskFailed)
            else job_pb2.Failure(
                code=reason,
                message=str(error) if known else f"{type(error).__name__}: {error}",
                step=run.job.progress.step,
                attempts=1,
                worker_ids=["in-process"],
                traceback="" if known else "".join(traceback.format_exception(error)),
            )
        )
        run.job.failures.append(failure)
        self._end(run, State.STATE_FAILED, reason, failure.message)

    def _end(self, run: _Run, state: State.ValueType, reason: str, message: str) -> None:
        run.job.reason, run.job.message = reason, message
        run.job.end_time.CopyFrom(now())
        self._set_state(run, state, "JOB_" + State.Name(state).removeprefix("STATE_"))

    def _set_state(self, run: _Run, state: State.ValueType, event_type: str) -> None:
        run.job.state = state
        self._event(run, event_type, run.job.message)
        self._changed.notify_all()

    def _event(self, run: _Run, event_type: str, message: str) -> None:
        event = job_pb2.Event(
            sequence=len(self._events) + 1,
            time=now(),
            type=event_type,
            job_id=run.job.id,
            step=run.job.progress.step,
            message=message,
        )
        self._events.append(event)

    def _require(self, run: _Run, verb: str, *states: State.ValueType) -> None:
        if run.job.state not in states:
            state = State.Name(run.job.state).removeprefix("STATE_")
            raise FailedPrecondition(f"job {run.job.id} is {state} and cannot be {verb}")

    def _find(self, job_id: str) -> _Run:
        if job_id not in self._jobs:
            raise no_job(job_id)
        return self._jobs[job_id]

    def _copy(self, job_id: str) -> job_pb2.Job:
        copy = job_pb2.Job()
        copy.CopyFrom(self._find(job_id).job)
        return copy


class _Run:
    """One job and what its thread is told."""

    def __init__(self, job: job_pb2.Job, plan: JobPlan) -> None:
        self.job = job
        self.plan = plan
        #: Of a private job; a second attempt repeats the noise of the first.
        self.secret = new_secret()
        self.points: list[job_pb2.MetricPoint] = []
        self.results: dict[int, TaskResult] = {}
        self.begin_s = time.monotonic()
        self.revision = 0
        self.paused = False
        self.cancel_reason = ""

    def held(self) -> bool:
        """Return whether the training shall wait."""
        return self.paused and not self.cancel_reason

    def take(self, progress: Progress) -> None:
        """Note a step or an evaluation."""
        self.revision += 1
        evaluated = progress.step == self.job.progress.step
        for name, value in progress.metrics.items():
            # An evaluation reports at the step of the update before it.
            if name.startswith("train/") != evaluated:
                point = job_pb2.MetricPoint(step=progress.step, time=now(), name=name, value=value)
                self.points.append(point)
        shown = self.job.progress
        shown.step, shown.epoch, shown.examples = progress.step, progress.epoch, progress.examples
        shown.examples_per_second = progress.examples / (time.monotonic() - self.begin_s)
        if progress.best is not None:
            shown.best.CopyFrom(progress.best.message())
        shown.metrics.clear()
        for name, value in progress.metrics.items():
            shown.metrics[name] = value

    def count_tasks(self) -> None:
        """Note how many tasks have a result."""
        self.revision += 1
        given_up = sum(each.HasField("failure") for each in self.results.values())
        shown = self.job.progress
        shown.step = len(self.results)
        shown.examples = shown.step - given_up
        shown.examples_per_second = shown.step / (time.monotonic() - self.begin_s)
        shown.metrics["tasks/given_up"] = given_up

    def restart(self) -> None:
        """Be as new; tasks that have a result keep it."""
        self.results = {
            task: each for task, each in self.results.items() if not each.HasField("failure")
        }
        self.points.clear()
        self.job.ClearField("failures")
        self.job.ClearField("end_time")
        self.job.progress.step = 0
        self.job.progress.ClearField("best")
        self.job.reason = self.job.message = self.cancel_reason = ""
        self.job.state = State.STATE_QUEUED


def now() -> Timestamp:
    """Return the present time."""
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp
