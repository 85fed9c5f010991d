"""What the runtime must do, in order.

Every effect but `Persist` says in `after` which record (by its `index`) must be durable before it
is performed; 0 means at once. So an answer never leaves before its fact is safe, while acts that
depend on nothing new, such as moving shards, do not wait for storage that is away. Effects with the
same `after` keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from phalanx.errors import PhalanxError
from phalanx.v1 import coordination_service_pb2, job_pb2, storage_service_pb2
from phalanx.v1.control_journal_pb2 import ControlRecord


@dataclass(frozen=True)
class Persist:
    """Append a record to the journal; `index` counts the records of this leadership from 1."""

    index: int
    record: ControlRecord


@dataclass(frozen=True)
class Send:
    """Send a message to the member on a session; the runtime adds nothing to it."""

    session: int
    message: coordination_service_pb2.SessionResponse
    after: int = 0


@dataclass(frozen=True)
class Close:
    """End a session with this error."""

    session: int
    error: PhalanxError
    after: int = 0


@dataclass(frozen=True)
class Answer:
    """Answer the caller `token` with a message, or with an error."""

    token: int
    response: Message | PhalanxError
    after: int = 0


@dataclass(frozen=True)
class Emit:
    """Append to the event log; the log gives the sequence."""

    event: job_pb2.Event
    after: int = 0


@dataclass(frozen=True)
class Publish:
    """Show watchers that the job looks different; `progress_only` where its state is the same."""

    job_id: str
    after: int = 0
    progress_only: bool = False


@dataclass(frozen=True)
class RaiseTerm:
    """Raise the job's term, list its checkpoints → TermRaised, TermRefused, RowRead (final)."""

    job_id: str
    operation: int
    expected_term: int
    after: int = 0


@dataclass(frozen=True)
class ReadRow:
    """Read the job's row in storage → RowRead."""

    job_id: str
    operation: int
    after: int = 0


@dataclass(frozen=True)
class WriteModel:
    """Compose and register the model of a final checkpoint → ModelWritten, OperationFailed."""

    job_id: str
    operation: int
    bit_identical: bool
    final: storage_service_pb2.CheckpointManifest | None
    after: int = 0


@dataclass(frozen=True)
class RemoveJob:
    """Remove what storage keeps of a deleted job: row, checkpoints, logs, metric points, pins."""

    job_id: str
    after: int = 0


@dataclass(frozen=True)
class Observe:
    """Add to a metric of API.md: a counter's increment or a histogram's observation."""

    metric: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()
    after: int = 0


@dataclass(frozen=True)
class SuspectSelf:
    """A member knows a higher generation: check the lease before anything else."""

    generation: int
    after: int = 0


Effect = (
    Persist
    | Send
    | Close
    | Answer
    | Emit
    | Publish
    | RaiseTerm
    | ReadRow
    | WriteModel
    | RemoveJob
    | Observe
    | SuspectSelf
)
