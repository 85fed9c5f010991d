"""What happens to control. Each event is handed to `machine.handle` with the time."""

from __future__ import annotations

from dataclasses import dataclass, field

from phalanx.quotas import Namespaces
from phalanx.v1 import coordination_service_pb2, job_pb2, storage_service_pb2
from phalanx.v1.control_journal_pb2 import JobSubmitted, RememberedRequest


@dataclass(frozen=True)
class WorkerConnected:
    """A worker opened a session and said hello."""

    session: int
    hello: coordination_service_pb2.WorkerHello


@dataclass(frozen=True)
class AggregatorConnected:
    """An aggregator opened a session and said hello."""

    session: int
    hello: coordination_service_pb2.AggregatorHello


@dataclass(frozen=True)
class SessionBroken:
    """The stream of a session ended, for whatever reason."""

    session: int
    reason: str = ""


@dataclass(frozen=True)
class MemberSaid:
    """A message other than hello arrived on a session."""

    session: int
    message: coordination_service_pb2.SessionRequest


@dataclass(frozen=True)
class Tick:
    """Time went on; deadlines are checked."""


@dataclass(frozen=True)
class QuotasChanged:
    """What the operator's file says of single namespaces is something else now."""

    namespaces: Namespaces


@dataclass(frozen=True)
class LostLeader:
    """Who led before and did not hand over; seconds on the clock of the one that took over."""

    control_id: str
    silent_since_s: float
    fenced_s: float
    """When storage gave its lease away: from then on it decides nothing."""


@dataclass(frozen=True)
class Led:
    """This process has just become the leader; its facts are replayed."""

    control_id: str
    lost: LostLeader | None = None


@dataclass(frozen=True)
class StorageLost:
    """Storage does not answer control any more; it did last at this time of the monotonic clock."""

    answered_s: float


@dataclass(frozen=True)
class StorageReturned:
    """Storage answers control again; `lost_s` is when it was first missed."""

    lost_s: float
    dropped_events: int = 0
    """Events that this leadership could not keep so far."""


@dataclass(frozen=True)
class SubmitJob:
    """A checked, resolved job; `token` names the caller in the answer."""

    token: int
    submitted: JobSubmitted
    request: RememberedRequest


@dataclass(frozen=True)
class CancelJob:
    """A caller wants the job to end."""

    token: int
    job_id: str
    request: RememberedRequest
    reason: str = ""


@dataclass(frozen=True)
class PauseJob:
    """A caller wants the job to pause at its next step boundary."""

    token: int
    job_id: str
    request: RememberedRequest


@dataclass(frozen=True)
class ResumeJob:
    """A caller wants a paused job to go on."""

    token: int
    job_id: str
    request: RememberedRequest


@dataclass(frozen=True)
class RetryJob:
    """A caller wants a failed job to be tried again from its last checkpoint."""

    token: int
    job_id: str
    request: RememberedRequest


@dataclass(frozen=True)
class DeleteJob:
    """A caller wants an ended job to be forgotten."""

    token: int
    job_id: str
    request: RememberedRequest


@dataclass(frozen=True)
class DrainWorker:
    """An operator wants a worker to finish and leave."""

    token: int
    worker_id: str
    request: RememberedRequest


@dataclass(frozen=True)
class TermRaised:
    """Storage raised the job's term; `checkpoints` are its complete manifests, newest first."""

    job_id: str
    operation: int
    term: int
    checkpoints: tuple[storage_service_pb2.CheckpointManifest, ...] = ()
    seal_key: bytes = b""
    """Drawn for the term; empty where nobody proves who he is."""


@dataclass(frozen=True)
class TermRefused:
    """Storage holds another term than expected; nothing was changed."""

    job_id: str
    operation: int
    current_term: int


@dataclass(frozen=True)
class RowRead:
    """The job's row in storage, read or met while raising the term."""

    job_id: str
    operation: int
    term: int
    final: storage_service_pb2.CheckpointManifest | None = None


@dataclass(frozen=True)
class ModelWritten:
    """The model of a finished job is registered; `result` and `reason`, why it ended, are what
    storage knows of it."""

    job_id: str
    operation: int
    result: job_pb2.Result
    reason: str


@dataclass(frozen=True)
class OperationFailed:
    """A storage operation failed for good (storage being away is retried, not reported)."""

    job_id: str
    operation: int
    code: str
    message: str
    details: dict[str, str] = field(default_factory=dict)


Event = (
    WorkerConnected
    | AggregatorConnected
    | SessionBroken
    | MemberSaid
    | Tick
    | QuotasChanged
    | Led
    | StorageLost
    | StorageReturned
    | SubmitJob
    | CancelJob
    | PauseJob
    | ResumeJob
    | RetryJob
    | DeleteJob
    | DrainWorker
    | TermRaised
    | TermRefused
    | RowRead
    | ModelWritten
    | OperationFailed
)
