"""A handle on one job."""

import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from phalanx.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    PhalanxError,
    Unavailable,
)
from phalanx.ids import new_request_id
from phalanx.sdk import arguments, following, methods
from phalanx.sdk.backend import Backend
from phalanx.sdk.listing import Listing, Pages
from phalanx.sdk.methods import RequestT, ResponseT
from phalanx.sdk.values import (
    TERMINAL_STATES,
    Failure,
    LogLine,
    MetricPoint,
    Result,
    TaskResult,
    Update,
    failure_value,
    local_time,
    metric_point_value,
    result_value,
    state_name,
    task_result_value,
    update_value,
)
from phalanx.tasks import is_program
from phalanx.v1 import job_pb2, job_service_pb2
from phalanx.v1.task_service_pb2 import TaskResult as TaskResultMessage

REATTACH_S = 60.0
"""How long a watch keeps trying to attach again to a cluster that went away."""
WATCH_S = 30.0
"""Life of one stream of a watch. A process that was stopped keeps its streams open and says nothing
on them, as a job may that waits; so each of them ends, and the next goes to whoever leads by then.
"""
_ANSWER_S = 1.0
"""Time for an answer, also where the time to wait is over."""
METRIC_PAGE = 10_000


class JobFailed(PhalanxError):
    """The job ended without a model; ``failures`` name shard, rows and traceback, ``job_id`` the
    job."""

    code = Code.FAILED_PRECONDITION

    def __init__(self, job: job_pb2.Job) -> None:
        self.job_id = job.id
        self.failures: tuple[Failure, ...] = tuple(failure_value(item) for item in job.failures)
        super().__init__(_story(job), reason=job.reason or "JOB_FAILED")


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""


class Job:
    """One submitted job. Its properties show the state at the last call; ``refresh`` asks again."""

    def __init__(
        self, backend: Backend, message: job_pb2.Job, plan: job_pb2.Plan | None = None
    ) -> None:
        self._backend = backend
        self.message = message
        self.plan = plan

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state}>"

    @property
    def id(self) -> str:
        """The job's id, NAME-xxxxxxxx."""
        return self.message.id

    @property
    def state(self) -> str:
        """QUEUED, RUNNING, PAUSED, SUCCEEDED, FAILED or CANCELLED."""
        return state_name(self.message.state)

    @property
    def reason(self) -> str:
        """Why it is in this state, as a word (``WAITING_FOR_WORKERS``)."""
        return self.message.reason

    @property
    def done(self) -> bool:
        """True once the state is final."""
        return self.state in TERMINAL_STATES

    @property
    def progress(self) -> Update:
        """Where it was at the last call."""
        return update_value(self.state, self.message.progress)

    @property
    def result(self) -> Result | None:
        """Model, SHA-256 and metrics of a job that succeeded; else None."""
        return result_value(self.message.result) if self.state == "SUCCEEDED" else None

    @property
    def failures(self) -> tuple[Failure, ...]:
        """What failed."""
        return tuple(failure_value(failure) for failure in self.message.failures)

    def stream(
        self, method: methods.Method[RequestT, ResponseT], request: RequestT
    ) -> Iterator[ResponseT]:
        """Make another streaming call to the job's cluster."""
        return self._backend.stream(method, request)

    def refresh(self, timeout_s: float | None = None) -> "Job":
        """Ask for the present state; returns itself."""
        request = job_service_pb2.GetJobRequest(job_id=self.id)
        self.message = self._backend.call(
            methods.GET_JOB,
            request,
            timeout_s=timeout_s,
            accept=lambda answer: self._is_news(answer.job),
        ).job
        return self

    def watch(self) -> Iterator[Update]:
        """Yield an update for each report of progress (at most five a second) and change of state.

        Reports before the first step is committed are left out; the last update has the final
        state. A cluster that goes away for a while is attached to again; no event is lost or
        repeated. Leaving the loop leaves the job running.
        """
        events: list[job_pb2.Event] = []
        progress, shown_state = self.message.progress, self.state
        for item in self.watch_messages():
            kind = item.WhichOneof("update")
            if kind == "event":
                events.append(item.event)
                continue
            if kind == "progress":
                progress = item.progress
            elif item.job.HasField("progress"):
                progress = item.job.progress
            news = kind == "progress" or self.state != shown_state
            if news and progress.step > 0 and not self.done:
                yield update_value(self.state, progress, events)
                events, shown_state = [], self.state
        yield update_value(self.state, progress, events)

    def watch_messages(self, after_sequence: int = 0) -> Iterator[job_service_pb2.WatchJobResponse]:
        """Yield what WatchJob sends, across lost connections, until the job has ended."""
        sequence = after_sequence
        give_up_at: float | None = None
        while True:
            try:
                request = job_service_pb2.WatchJobRequest(job_id=self.id, after_sequence=sequence)
                stream = self._backend.stream(
                    methods.WATCH_JOB,
                    request,
                    timeout_s=WATCH_S,
                    accept=lambda item: not item.HasField("job") or self._is_news(item.job),
                )
                for item in stream:
                    give_up_at = None
                    kind = item.WhichOneof("update")
                    if kind == "event":
                        sequence = item.event.sequence
                    elif kind == "job":
                        self.message = item.job
                    yield item
                if self.done:
                    return
            except (Unavailable, DeadlineExceeded):
                # A server that lives sends the job at once: silence is as good as a refusal.
                now = time.monotonic()
                give_up_at = give_up_at or now + REATTACH_S
                if now >= give_up_at:
                    raise
            time.sleep(random.uniform(0.2, 0.4))

    def wait(self, timeout_s: float | None = None) -> Result:
        """Block until the job has ended; return its result.

        A cluster that goes away for a while (a control process restarts) is asked again. Raises
        JobFailed or JobCancelled when the job ended without a result, DeadlineExceeded after
        ``timeout_s`` (the job goes on then), and Unavailable, or DeadlineExceeded where it is
        stopped, when the cluster stays away.
        """
        deadline = None
        if timeout_s is not None:
            deadline = time.monotonic() + arguments.seconds("timeout_s", timeout_s)
        answered_s = time.monotonic()
        wait_s = 0.05
        while not self.done:
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"job {self.id} is still {self.state} after {timeout_s:g} s; "
                    "it goes on, wait again"
                )
            time.sleep(
                wait_s if deadline is None else min(wait_s, max(deadline - time.monotonic(), 0))
            )
            wait_s = min(wait_s * 1.5, 0.5)
            left_s = None if deadline is None else max(deadline - time.monotonic(), _ANSWER_S)
            try:
                self.refresh(left_s)
                answered_s = time.monotonic()
            except (Unavailable, DeadlineExceeded):
                if time.monotonic() - answered_s > REATTACH_S:
                    raise
        self.raise_if_failed()
        return result_value(self.message.result)

    def _is_news(self, told: job_pb2.Job) -> bool:
        """Whether a leader that was replaced meanwhile did not tell this: what it knows is old."""
        return told.generation >= self.message.generation

    def raise_if_failed(self) -> None:
        """Raise JobFailed or JobCancelled if the job ended like that."""
        if self.state == "CANCELLED":
            _fail(JobCancelled(self.message))
        if self.state == "FAILED":
            _fail(JobFailed(self.message))

    def cancel(self, reason: str = "") -> "Job":
        """End the job at the next step boundary; returns itself."""
        request = job_service_pb2.CancelJobRequest(
            job_id=self.id,
            request_id=new_request_id(),
            reason=arguments.text("reason", reason, "a string, which is kept with the job"),
        )
        self.message = self._backend.call(methods.CANCEL_JOB, request).job
        return self

    def pause(self) -> "Job":
        """Write a checkpoint at the next step boundary and give the workers free; returns
        itself."""
        request = job_service_pb2.PauseJobRequest(job_id=self.id, request_id=new_request_id())
        self.message = self._backend.call(methods.PAUSE_JOB, request).job
        return self

    def resume(self) -> "Job":
        """Go on with a paused job; returns itself."""
        request = job_service_pb2.ResumeJobRequest(job_id=self.id, request_id=new_request_id())
        self.message = self._backend.call(methods.RESUME_JOB, request).job
        return self

    def retry(self) -> "Job":
        """Try a failed job again from its last checkpoint; returns itself."""
        request = job_service_pb2.RetryJobRequest(job_id=self.id, request_id=new_request_id())
        self.message = self._backend.call(methods.RETRY_JOB, request).job
        return self

    def delete(self) -> None:
        """Forget a job that has ended, with its checkpoints, logs and metrics; its model stays."""
        request = job_service_pb2.DeleteJobRequest(job_id=self.id, request_id=new_request_id())
        self._backend.call(methods.DELETE_JOB, request)

    def logs(self, *, follow: bool = False, worker_id: str = "") -> Iterator[LogLine]:
        """Yield what the job's code wrote; with ``follow`` until the job has ended, also when the
        cluster was away for a while."""
        for line in self.log_messages(follow=follow, worker_id=worker_id):
            yield LogLine(
                time=local_time(line.time),
                worker_id=line.worker_id,
                shard=line.shard if line.HasField("shard") else None,
                step=line.step if line.HasField("step") else None,
                level=line.level,
                text=line.text,
            )

    def log_messages(
        self, *, follow: bool = False, worker_id: str = ""
    ) -> Iterator[job_service_pb2.ReadJobLogsResponse]:
        """Yield the same as wire messages."""
        request = job_service_pb2.ReadJobLogsRequest(
            job_id=self.id,
            follow=follow,
            worker_id=arguments.text("worker_id", worker_id, arguments.WORKER_ID),
        )
        if not follow:
            yield from self._backend.stream(methods.READ_JOB_LOGS, request)
            return
        seen = 0

        def attach() -> Iterator[job_service_pb2.ReadJobLogsResponse]:
            # The lines have an order and no numbers: those that were seen come first again.
            stream = self._backend.stream(
                methods.READ_JOB_LOGS, request, timeout_s=following.FOLLOW_S
            )
            return islice(stream, seen, None)

        for line in following.follow(self._backend, attach):
            seen += 1
            yield line

    def results(self, tasks: Sequence[int] = ()) -> list[TaskResult]:
        """Return what the tasks of this set returned so far, by number; ``tasks``: only these.

        Raises FailedPrecondition for a job that is no set of tasks; what a program leaves is its
        model and `save`.
        """
        if is_program(self.message.spec):
            raise FailedPrecondition(
                f"job {self.id} is a program, whose tasks have no results of their own for people; "
                "see its model, and the files of its result",
                reason="NO_TASKS",
            )
        wanted = arguments.wholes("tasks", tasks, "numbers of tasks, from 0")
        request = job_service_pb2.ReadTaskResultsRequest(job_id=self.id, tasks=wanted)
        found = [
            task_result_value(result, self._value_json(result))
            for page in self._backend.stream(methods.READ_TASK_RESULTS, request)
            for result in page.results
        ]
        return sorted(found, key=lambda each: each.task)

    def save(self, file: str | PathLike[str], name: str = "") -> Path:
        """Write a file that the job left to the disk; return its path.

        ``name`` is one of ``result.files``. Without it the only one is meant, or all of one table:
        Parquet files that follow each other are written as one. Raises FailedPrecondition where
        the job has not succeeded, and NotFound where it left no such file.
        """
        from phalanx.sdk.saving import save_files

        target = arguments.path("file", file, "the path of a new file")
        wanted = arguments.text("name", name, "the name of a file that the job left")
        save_files(self._backend, self.refresh().message, target, wanted)
        return target

    def _value_json(self, result: TaskResultMessage) -> bytes:
        """What a task returned; a large value lies in storage."""
        if result.HasField("stored"):
            return self._backend.get_blob(result.stored.digest)
        return result.value_json.encode()

    def metrics(self, names: Sequence[str] = ()) -> Listing[MetricPoint]:
        """Return all points of the named metrics (none named: of all), by step. Warns with
        IncompleteWarning where control is cut off from storage and may lack some."""
        pages = Pages[MetricPoint](self._backend)
        return pages.listing([metric_point_value(each) for each in self._metrics(pages, names)])

    def metric_messages(self, names: Sequence[str] = ()) -> Listing[job_pb2.MetricPoint]:
        """Return the same as wire messages."""
        pages = Pages[job_pb2.MetricPoint](self._backend)
        return pages.listing(self._metrics(pages, names))

    def _metrics(self, pages: Pages[Any], names: Sequence[str]) -> list[job_pb2.MetricPoint]:
        points: list[job_pb2.MetricPoint] = []
        names = arguments.texts("names", names, 'names of metrics, as "train/loss"')
        after_step = -1
        while True:
            request = job_service_pb2.ListJobMetricsRequest(
                job_id=self.id, names=names, after_step=after_step, max_points=METRIC_PAGE
            )
            page = list(pages.ask(methods.LIST_JOB_METRICS, request).points)
            if len(page) < METRIC_PAGE:
                return points + page
            # The page may end within a step; that step is asked for again.
            last = page[-1].step
            whole = [point for point in page if point.step < last] or page
            points += whole
            after_step = whole[-1].step


def _fail(error: JobFailed) -> NoReturn:
    raise error


def _story(job: job_pb2.Job) -> str:
    """Tell how a job ended: its own message and the first failure with its place."""
    text = f"job {job.id} {state_name(job.state).lower()}"
    if job.message or job.reason:
        text += f": {job.message or job.reason}"
    for failure in job.failures[:1]:
        if failure.message and failure.message not in text:
            text += f" (shard {failure.shard}, step {failure.step}: {failure.message})"
    return text
