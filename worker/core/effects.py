"""What the decisions ask the session process to do.

None of them has to be durable first: a worker keeps nothing that cannot be computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.v1 import coordination_service_pb2, storage_service_pb2, training_pb2
from worker.core.dispatch import Task


@dataclass(slots=True)
class Prepare:
    """Fetch what the job needs (manifest, code, start model) and set its leaf processes up.

    `describe`: only to describe the job; no term, no shared buffers.
    """

    plan: training_pb2.JobPlan
    describe: bool = False


@dataclass(slots=True)
class Discard:
    """Let everything of the job go: streams, buffers, leaf state."""

    job_id: str


@dataclass(slots=True)
class OpenStreams:
    """Replace the job's exchange streams by one to each of these aggregators (id, address).

    With all-reduce they go to other members, who are told which version is held; -1: none.
    """

    job_id: str
    term: int
    owners: tuple[tuple[str, str], ...]
    held: int = -1


@dataclass(slots=True)
class Wake:
    """The stream to this aggregator has something to send."""

    job_id: str
    aggregator_id: str


@dataclass(slots=True)
class Run:
    """Have the slot's leaf process run the task."""

    task: Task


@dataclass(slots=True)
class WaitForJob:
    """Idle slots wait for a job that is behind others: say `wait_over` with this number soon."""

    number: int


@dataclass(slots=True)
class Cancel:
    """Tell the leaf process that runs the task to stop after its present leaf."""

    task: Task


@dataclass(slots=True)
class Report:
    """Send this to control; kept over a broken session while it is about the current term."""

    message: coordination_service_pb2.SessionRequest


@dataclass(slots=True)
class RefuseSession:
    """Control's generation is lower than one seen before: leave it and try the next address."""

    generation: int
    highest: int


@dataclass(slots=True)
class Drained:
    """A drain was asked for and nothing is hosted any more."""


# Of all-reduce jobs


@dataclass(slots=True)
class Serve:
    """There may be something to send on the streams that other members opened."""

    job_id: str


@dataclass(slots=True)
class Work:
    """There is an update to do: `AllReduceJob.work` does a slice of it, until none is left."""

    job_id: str


@dataclass(slots=True)
class Restore:
    """Read a checkpoint, then `AllReduceJob.restored`."""

    job_id: str
    term: int
    manifest: storage_service_pb2.CheckpointManifest


@dataclass(slots=True)
class Snapshot:
    """Copy the version that is held and hash the copy, then `AllReduceJob.hashed`."""

    job_id: str
    term: int
    version: int


@dataclass(slots=True)
class Store:
    """All members hold the same: write the copy that was made for this record as a checkpoint."""

    job_id: str
    go: training_pb2.GoRecord


@dataclass(slots=True)
class Committed:
    """The root holds one more version, of so many examples."""

    job_id: str
    version: int
    example_count: int


@dataclass(slots=True)
class Points:
    """New metric points (version, name, value)."""

    job_id: str
    points: tuple[tuple[int, str, float], ...]


@dataclass(slots=True)
class Ended:
    """A terminal go record is in force."""

    job_id: str
    go: training_pb2.GoRecord


@dataclass(slots=True)
class Fail:
    """The job cannot go on: tell control."""

    job_id: str
    term: int
    reason: str
    message: str


OfAllReduce = Serve | Work | Restore | Snapshot | Store | Committed | Points | Ended | Fail

Effect = (
    Prepare
    | Discard
    | OpenStreams
    | Wake
    | Run
    | WaitForJob
    | Cancel
    | Report
    | RefuseSession
    | Drained
    | OfAllReduce
)
