"""What the Python interface hands out: plain, frozen values instead of wire messages."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import nan
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from phalanx.v1 import job_pb2, task_service_pb2

TERMINAL_STATES = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


class Metrics(dict[str, float]):
    """Metric name → newest value; a metric that was not measured yet is ``nan``."""

    def __missing__(self, name: str) -> float:
        return nan


@dataclass(frozen=True)
class Event:
    """Something that happened in the cluster; ``type`` is one of the names in the manual
    (``WORKER_LOST``)."""

    sequence: int
    time: datetime
    type: str
    message: str
    job_id: str
    worker_id: str
    incident_id: str
    shard: int | None
    step: int | None
    details: Mapping[str, str]


@dataclass(frozen=True)
class WorkerProgress:
    """What one worker does for the job: ``shards`` are (first, count) ranges."""

    worker_id: str
    shards: tuple[tuple[int, int], ...]
    examples_per_second: float


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation whose parameters a job keeps (``output.best``): of which step, and what was
    compared."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Update:
    """Where a job is, with the events since the update before.

    ``total_steps`` is 0 where the job has no fixed number of steps; ``best`` is None where none is
    kept so far.
    """

    state: str
    step: int
    total_steps: int
    epoch: float
    examples: int
    examples_per_second: float
    metrics: Metrics
    workers: tuple[WorkerProgress, ...]
    checkpoint_step: int
    events: tuple[Event, ...]
    best: BestEvaluation | None = None


@dataclass(frozen=True)
class Failure:
    """Why a job failed: the shard, its rows and the traceback of the user's code where there is
    one; ``task`` of a set of independent tasks, else None."""

    code: str
    message: str
    shard: int
    first_row: int
    row_count: int
    step: int
    attempts: int
    worker_ids: tuple[str, ...]
    traceback: str
    task: int | None = None


@dataclass(frozen=True)
class ResultFile:
    """A file that a job left; `Job.save` writes it to the disk."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Result:
    """What a finished job leaves: the name of its model (``NAME@VERSION``) and how it was made, or
    the files of a program (``evaluation.json``, ``predictions.parquet``).

    ``best`` is the evaluation whose parameters and ``metrics`` it is; None: those of the last step.
    """

    model: str
    parameters_sha256: str
    bit_identical: bool
    metrics: Metrics
    steps: int
    examples_lost: int
    examples_doubled: int
    best: BestEvaluation | None = None
    files: tuple[ResultFile, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """What came of one task: ``value`` is what the function returned, read from JSON.

    ``failure`` says why a task was given up, and ``value`` is None then. ``seconds`` is how long
    the function ran, ``round_trip_s`` the time from handing the task out to its report.
    """

    task: int
    value: Any
    failure: Failure | None
    worker_id: str
    seconds: float
    round_trip_s: float


@dataclass(frozen=True)
class MetricPoint:
    """One measured value of one metric at one step."""

    step: int
    time: datetime
    name: str
    value: float


@dataclass(frozen=True)
class LogLine:
    """One line that the job's code wrote, or a message about it."""

    time: datetime
    worker_id: str
    shard: int | None
    step: int | None
    level: str
    text: str


def local_time(timestamp: Timestamp) -> datetime:
    """Return ``timestamp`` as an aware datetime in the time zone of this machine."""
    return datetime.fromtimestamp(timestamp.ToNanoseconds() / 1e9).astimezone()


def state_name(state: job_pb2.Job.State.ValueType) -> str:
    """Return ``RUNNING`` for STATE_RUNNING."""
    return job_pb2.Job.State.Name(state).removeprefix("STATE_")


def event_value(event: job_pb2.Event) -> Event:
    """Return the value of a wire message."""
    return Event(
        sequence=event.sequence,
        time=local_time(event.time),
        type=event.type,
        message=event.message,
        job_id=event.job_id,
        worker_id=event.worker_id,
        incident_id=event.incident_id,
        shard=event.shard if event.HasField("shard") else None,
        step=event.step if event.HasField("step") else None,
        details=dict(event.details),
    )


def update_value(
    state: str, progress: job_pb2.Progress, events: Iterable[job_pb2.Event] = ()
) -> Update:
    """Return the value of a wire message and the events before it."""
    workers = tuple(
        WorkerProgress(
            worker_id=worker.worker_id,
            shards=tuple((shards.first, shards.count) for shards in worker.shards),
            examples_per_second=worker.examples_per_second,
        )
        for worker in progress.workers
    )
    return Update(
        state=state,
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        examples=progress.examples,
        examples_per_second=progress.examples_per_second,
        metrics=Metrics(progress.metrics),
        workers=workers,
        checkpoint_step=progress.checkpoint_step,
        events=tuple(event_value(event) for event in events),
        best=best_value(progress),
    )


def result_value(result: job_pb2.Result) -> Result:
    """Return the value of a wire message."""
    return Result(
        model=result.model,
        parameters_sha256=result.parameters_sha256,
        bit_identical=result.bit_identical,
        metrics=Metrics(result.metrics),
        steps=result.steps,
        examples_lost=result.examples_lost,
        examples_doubled=result.examples_doubled,
        best=best_value(result),
        files=tuple(ResultFile(file.name, file.digest, file.size_bytes) for file in result.files),
    )


def best_value(message: job_pb2.Progress | job_pb2.Result) -> BestEvaluation | None:
    """Return the best evaluation that a wire message tells of."""
    if not message.HasField("best"):
        return None
    best = message.best
    return BestEvaluation(best.step, best.metric, best.value)


def failure_value(failure: job_pb2.Failure) -> Failure:
    """Return the value of a wire message."""
    return Failure(
        code=failure.code,
        message=failure.message,
        shard=failure.shard,
        first_row=failure.first_row,
        row_count=failure.row_count,
        step=failure.step,
        attempts=failure.attempts,
        worker_ids=tuple(failure.worker_ids),
        traceback=failure.traceback,
        task=failure.task if failure.HasField("task") else None,
    )


def task_result_value(result: task_service_pb2.TaskResult, value_json: bytes) -> TaskResult:
    """Return the value of a wire message, with what its task returned."""
    return TaskResult(
        task=result.task,
        value=json.loads(value_json) if value_json else None,
        failure=failure_value(result.failure) if result.HasField("failure") else None,
        worker_id=result.worker_id,
        seconds=result.seconds,
        round_trip_s=result.round_trip_s,
    )


def metric_point_value(point: job_pb2.MetricPoint) -> MetricPoint:
    """Return the value of a wire message."""
    return MetricPoint(point.step, local_time(point.time), point.name, point.value)
