"""What the dispatcher of tasks is told, and what it wants done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.v1.job_pb2 import Failure
from phalanx.v1.task_service_pb2 import StoredValue, TaskAttempt, TaskRecord, TaskReport


@dataclass(frozen=True, slots=True)
class WorkerOpened:
    """A worker opened a stream; `held` are the attempts that it has from streams before."""

    session: int
    worker_id: str
    slots: int
    held: Sequence[TaskAttempt] = ()


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker said what came of attempts; without any: that it is still there."""

    session: int
    reports: Sequence[TaskReport] = ()


@dataclass(frozen=True, slots=True)
class WorkerClosed:
    """The stream of a worker broke."""

    session: int


@dataclass(frozen=True, slots=True)
class Appended:
    """The record that was to be appended last is durable."""


@dataclass(frozen=True, slots=True)
class ValuesGone:
    """The record that was to be appended last names values that storage does not have: nothing
    named them for so long that they were collected."""

    digests: frozenset[str]


@dataclass(frozen=True, slots=True)
class PauseAsked:
    """Hand nothing out any more and end once nothing is under way."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = WorkerOpened | Reported | WorkerClosed | Appended | ValuesGone | PauseAsked | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Tell a worker to run tasks, as attempts from `first_attempt` on, and to forget attempts.

    `inputs` are the results that each of the tasks needs.
    """

    session: int
    tasks: tuple[int, ...] = ()
    first_attempt: int = 0
    settled: tuple[int, ...] = ()
    inputs: tuple[tuple[StoredValue, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Append:
    """Make a record durable, then say `Appended`, or `ValuesGone`. There is never more than one
    under way."""

    record: TaskRecord


@dataclass(frozen=True, slots=True)
class Durable:
    """Results became durable: the time since each task was handed out, less that of its call."""

    round_trips_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """Tasks of a worker are run by others: its stream broke (lost), it says nothing (silent), it
    takes long (late), they failed there (failed), or what they returned is gone (gone)."""

    cause: str
    tasks: tuple[int, ...]
    worker_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Every task has a durable result."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Too many tasks were given up; this one last. What has a result keeps it."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing is under way any more, or what is takes too long and is given back."""


Effect = Send | Append | Durable | Moved | Finished | Failed | Paused
