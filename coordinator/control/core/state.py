"""Everything that control knows, and the outbox into which decisions are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from google.protobuf.message import Message

from coordinator.control.core import told
from coordinator.control.core.clock import NANOS, Instant
from coordinator.control.core.effects import (
    Answer,
    Close,
    Effect,
    Emit,
    Observe,
    Persist,
    Publish,
    Send,
    SuspectSelf,
)
from coordinator.control.core.facts import Facts, JobFacts
from coordinator.control.core.kinds import Kind
from coordinator.control.core.lifecycle import RUNNING
from coordinator.control.core.placement import Placement
from coordinator.control.core.quotas import Quotas
from coordinator.control.core.speeds import Speed
from phalanx.errors import PhalanxError
from phalanx.specs.parts import all_reduces
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import job_pb2, storage_service_pb2
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.control_journal_pb2 import ControlRecord, RememberedRequest

MEBIBYTE = 1024 * 1024

EPISODES_MAX = 2000
"""More than members are known, so that only names which nobody has are forgotten."""


@dataclass(frozen=True)
class CoreConfig:
    """What an operator may set of the core."""

    heartbeat_interval_s: float = 0.5
    lease_ttl_s: float = 2.0
    range_min_bytes: int = 8 * MEBIBYTE
    storage_address: str = ""
    describe_timeout_s: float = 300.0
    running_jobs_max: int = 64
    """Jobs that share the workers at once; more wait in the queue."""
    ended_jobs_max: int = 1000
    """Ended jobs that are remembered, so that their number never fills journal and disk."""
    quotas: Quotas = field(default_factory=Quotas)


@dataclass
class Progress:
    """What a worker says of one job in its heartbeats."""

    step: int = 0
    leaves_done: int = 0
    examples_per_second: float = 0.0
    changed_s: float = 0.0


@dataclass
class Hosting:
    """What one worker was told to host of one job: shards by tree, as last sent."""

    term: int
    ready: bool = False
    train: set[int] = field(default_factory=set)
    evaluation: set[int] = field(default_factory=set)
    progress: Progress = field(default_factory=Progress)
    since_s: float = 0.0
    """Since when it can deliver: before that it loaded the job, was away, or was set aside."""


@dataclass
class Worker:
    """A worker of this leadership, connected or not."""

    hello: pb.WorkerHello
    session: int
    state: WorkerView.State.ValueType
    join_unix_nanos: int
    heard_s: float
    lease_s: float = 0.0
    """The lease that it was told, with the heartbeats that go with it."""
    reason: str = ""
    resident_bytes: int = 0
    cpu_fraction: float = 0.0
    ended_attempts: dict[tuple[bool, pb.LeafFailed.Kind.ValueType], int] | None = None
    """As it said last: attempts by whether they were calls and how they failed; None: not yet."""
    released: bool = False
    """Whether a draining worker was told that it may leave."""
    foreign: frozenset[tuple[str, int]] = frozenset()
    """Jobs and terms that it held of another history of storage when it joined."""

    @property
    def id(self) -> str:
        """The worker's stable name."""
        return self.hello.worker_id

    @property
    def slots(self) -> int:
        """Leaf processes; what placement is proportional to."""
        return max(1, self.hello.slots)

    @property
    def connected(self) -> bool:
        """Whether it has a session."""
        return self.session != 0


@dataclass
class Aggregator:
    """An aggregator of this leadership, connected or not."""

    hello: pb.AggregatorHello
    session: int
    heard_s: float
    lease_s: float = 0.0
    """The lease that it was told, with the heartbeats that go with it."""
    suspected: bool = False
    foreign: frozenset[tuple[str, int]] = frozenset()
    """As of a worker."""

    @property
    def id(self) -> str:
        """The aggregator's stable name."""
        return self.hello.aggregator_id

    @property
    def connected(self) -> bool:
        """Whether it has a session."""
        return self.session != 0


class OperationKind(StrEnum):
    """Storage operations that a job waits for, one at a time."""

    READ_ROW = "read row"
    BEGIN = "raise term to leave the queue"
    RAISE_TERM = "raise term"
    END = "raise term to end"
    WRITE_MODEL = "write model"


@dataclass(frozen=True)
class Operation:
    """A storage operation under way; answers with another number are late and ignored."""

    number: int
    kind: OperationKind


@dataclass
class Ending:
    """A wish to end the job (cancel or fail), carried out once its term is fenced off."""

    state: job_pb2.Job.State.ValueType
    reason: str
    message: str
    failures: tuple[job_pb2.Failure, ...] = ()
    tokens: list[int] = field(default_factory=list)
    requests: list[RememberedRequest] = field(default_factory=list)
    """What is remembered of the calls with these tokens."""


@dataclass
class TreePlacement:
    """Who hosts the shards of one tree, and who still keeps some until their new host works."""

    width: int
    owners: dict[int, str] = field(default_factory=dict)
    keepers: dict[int, str] = field(default_factory=dict)
    unit: int = 1
    """Shards that are computed by one worker, and move together."""

    def unit_of(self, shard: int) -> range:
        """Return the shards that move together with one."""
        first = shard - shard % self.unit
        return range(first, min(first + self.unit, self.width))

    def held_by(self, worker_id: str) -> set[int]:
        """Return the shards that a worker owns or still keeps."""
        owned = {shard for shard, owner in self.owners.items() if owner == worker_id}
        return owned | {shard for shard, keeper in self.keepers.items() if keeper == worker_id}

    def held(self) -> dict[str, set[int]]:
        """Return the shards of every worker, those that it still keeps included."""
        held: dict[str, set[int]] = {}
        for placed in (self.owners, self.keepers):
            for shard, worker_id in placed.items():
                held.setdefault(worker_id, set()).add(shard)
        return held

    def forget(self, worker_id: str) -> set[int]:
        """Take a worker out; return the shards that it owned."""
        lost = {shard for shard, owner in self.owners.items() if owner == worker_id}
        for shard in lost:
            del self.owners[shard]
        self.keepers = {
            shard: keeper for shard, keeper in self.keepers.items() if keeper != worker_id
        }
        return lost


@dataclass(frozen=True)
class CommitTime:
    """When a step was committed, by control's monotonic clock, see `reports`."""

    term: int
    step: int
    at_s: float
    filled_s: float | None
    """When the last contribution to it came in, where the root knows."""


@dataclass
class Leveling:
    """Where the placement by measured speed stands, see `balancing`."""

    uneven: bool = False
    """Whether the placement is not that of equal workers."""
    seen_s: float | None = None
    """Since when a better placement is in sight."""
    next_s: float = 0.0
    step_s: float = 0.0
    """Smoothed time between commits, as the root reports them."""
    due: Placement | None = None
    """Where workers own the parameters: a better placement of the shards, for a new term."""
    why: str = ""
    """Why this term has it; empty: it began for another reason."""


@dataclass
class JobRuntime:
    """What is soft of one job that has not ended: rebuilt after a restart, never journalled."""

    job_id: str
    train: TreePlacement
    evaluation: TreePlacement
    all_reduce: bool = False
    """Its workers own the parameters; see `members`."""
    waits_since_s: float = 0.0
    """When it was submitted, by the monotonic clock."""
    hosts: dict[str, Hosting] = field(default_factory=dict)
    placement: int = 0
    reason: str = ""
    message: str = ""
    after: int = 0
    """Index of the newest record about this job: what it caused depends on it."""
    term_after: int = 0
    """Index of the record that commands within the current term depend on."""
    operation: Operation | None = None
    ending: Ending | None = None
    storage_term: int = 0
    row_known: bool = True
    """False for a running job of an earlier leadership until its row in storage was read."""
    adopt_until_s: float = 0.0
    """Until then shards without a known host may have one that has not reconnected."""
    describing: dict[str, float] = field(default_factory=dict)
    """Workers that were asked to build its model, and until when they may take."""
    describe_attempts: int = 0
    descriptions: dict[str, Description] = field(default_factory=dict)
    """What workers answered, of a job that is verified, until enough of them agree."""
    undescribed: dict[str, job_pb2.Failure] = field(default_factory=dict)
    """What failed where its model could not be built, of a job that is not verified."""
    late_describers: set[str] = field(default_factory=set)
    """Workers that were asked so, and did not answer in time."""
    described: pb.JobDescribed | None = None
    described_kind: Kind | None = None
    """That of the worker that described it."""
    owner_incarnations: dict[str, str] = field(default_factory=dict)
    """Aggregators known to hold their ranges of the current term."""
    lost_owners: set[str] = field(default_factory=set)
    ready_aggregators: set[str] = field(default_factory=set)
    too_small: set[str] = field(default_factory=set)
    """Aggregators that had not enough memory for its ranges."""
    restore: storage_service_pb2.CheckpointManifest | None = None
    bad_checkpoints: set[str] = field(default_factory=set)
    report: pb.JobReport | None = None
    commit: CommitTime | None = None
    """The newest commit that the root reported."""
    stopped: bool = False
    final: storage_service_pb2.CheckpointManifest | None = None
    failed_leaves: dict[tuple[bool, int], list[FailedLeaf]] = field(default_factory=dict)
    unprepared: dict[str, Unprepared] = field(default_factory=dict)
    """Workers that could not prepare a set of tasks."""
    skipped_steps: set[int] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    """Workers whose shards others compute, as the root last said."""
    not_heard_of: dict[str, float] = field(default_factory=dict)
    """Workers for whose shards nothing is asked, and since when the root says so."""
    set_aside: dict[str, float] = field(default_factory=dict)
    """Workers that delivered nothing although they live, and until when they get nothing."""
    set_aside_before: dict[str, tuple[int, float]] = field(default_factory=dict)
    """For how many leases each was set aside the last time, and until when that counts."""
    speeds: dict[str, Speed] = field(default_factory=dict)
    leveling: Leveling = field(default_factory=Leveling)
    had: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Who hosted a train shard, the newest first: they may still have its data."""
    keep_until_s: float = 0.0
    keep_step: int = 0
    unmatched_since_s: float | None = None
    owners_may_differ: bool = False
    """`fall_back_after` is over: its ranges may go on on aggregators that give other bits."""
    told_ineligible: dict[str, str] = field(default_factory=dict)
    other_leaves: dict[str, str] = field(default_factory=dict)
    """Hashes of the leaves of workers that give other bits in this very job."""

    @property
    def step(self) -> int:
        """The newest step that the root reported."""
        return self.report.step if self.report is not None else 0


@dataclass(frozen=True)
class Description:
    """What one start of a worker found out about a job by building its model."""

    worker_id: str
    incarnation: str
    kind: Kind
    found: pb.JobDescribed
    result: str
    """What is compared of it, within a kind."""


@dataclass
class Unprepared:
    """A process of a worker that could not prepare a job: how often, and why the last time."""

    incarnation: str
    tries: int = 0
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class FailedLeaf:
    """One failure of a shard's leaf; `reason` is what its worker says, as in the message."""

    worker_id: str
    step: int
    kind: pb.LeafFailed.Kind.ValueType
    message: str
    traceback: str
    first_row: int
    row_count: int
    incarnation: str
    task: int
    """The worker's number for the computation, within its incarnation; 0: it has none."""
    reason: str


@dataclass
class Incident:
    """One failure and what followed, for the time line."""

    id: str
    cause: str
    member_id: str
    suspected_s: float
    """When it began, as far as one can tell: the last sign of life, the opening of the round."""
    detected: Instant
    jobs: dict[str, int] = field(default_factory=dict)
    """Step of each job that it touched, as known at the time."""
    noticed_s: float | None = None
    """When the member was first suspected, where that came before."""
    fenced_s: float | None = None
    """When a lost leader was fenced off; `detected` is when its replacement began."""
    moved: Instant | None = None


@dataclass
class Episode:
    """What goes on with one member: all events of it carry one incident id."""

    incident_id: str
    noticed_s: float


@dataclass(frozen=True)
class Waiter:
    """Who waits for storage: an owner of ranges of a job in one term, or control (no fields)."""

    member_id: str = ""
    incarnation: str = ""
    job_id: str = ""
    term: int = 0


@dataclass
class Outage:
    """Storage is away: an incident that no step of a job ends."""

    incident_id: str
    noticed: Instant
    silence_s: float
    """How long it had not answered by then."""
    waiters: set[Waiter] = field(default_factory=set)


class Core:
    """The state of control. The modules beside this one are its decisions; `machine` calls them."""

    def __init__(
        self, config: CoreConfig, generation: int, facts: Facts, history: int | None = None
    ) -> None:
        self.config = config
        self.generation = generation
        self.history = history
        """Which history of storage the facts are of; None: not known."""
        self.facts = facts
        self.workers: dict[str, Worker] = {}
        self.aggregators: dict[str, Aggregator] = {}
        self.sessions: dict[int, Worker | Aggregator] = {}
        self.jobs: dict[str, JobRuntime] = {}
        self.incidents: dict[str, Incident] = {}
        self.episodes: dict[str, Episode] = {}
        self.outage: Outage | None = None
        self.now = Instant(0.0, 0)
        self.led_s = 0.0
        self.clock_off_nanos = 0
        """By how much the wall clock was set since the last step that is a fact."""
        self.ticked_s: float | None = None
        self.expired_s = 0.0
        self.mass_silence = False
        """Whether so many are not heard of at once that the fault is rather here."""
        self._effects: list[Effect] = []
        self._records = 0
        self._operations = 0
        self._incidents = 0

    def take_effects(self) -> list[Effect]:
        """Return what was decided since the last call."""
        effects, self._effects = self._effects, []
        return effects

    @property
    def last_record(self) -> int:
        """Index of the newest record."""
        return self._records

    def persist(self, record: ControlRecord, *requests: RememberedRequest | None) -> int:
        """Decide a fact: it holds now for the core, for others once durable. Return its index.

        `requests`: the calls that led to it, to be remembered with it.
        """
        record.time_unix_nanos = self.now.unix_nanos
        record.generation = self.generation
        named = [each for each in requests if each is not None and each.request_id]
        for request in named:
            request.time_unix_nanos = self.now.unix_nanos
        if named:
            record.request.CopyFrom(named[0])
            record.joined_requests.extend(named[1:])
        self.facts.apply(record)
        self._records += 1
        self._effects.append(Persist(self._records, record))
        return self._records

    def send(self, session: int, message: pb.SessionResponse, after: int = 0) -> None:
        """Send a message to a member; a member without a session hears it when it reconnects."""
        if session:
            message.generation = self.generation
            self._effects.append(Send(session, message, after))

    def close(self, session: int, error: PhalanxError) -> None:
        """End a session."""
        self._effects.append(Close(session, error))

    def answer(self, token: int, response: Message | PhalanxError, after: int = 0) -> None:
        """Answer a caller."""
        self._effects.append(Answer(token, response, after))

    def emit(
        self, type_: str, message: str, *, job_id: str = "", after: int = 0, **fields: object
    ) -> None:
        """Write an event; further fields are those of Event, `details` a mapping of texts."""
        event = job_pb2.Event(
            type=type_, message=told.text(message), job_id=job_id, generation=self.generation
        )
        event.time.FromNanoseconds(self.now.unix_nanos)
        details = fields.pop("details", {})
        assert isinstance(details, dict)
        event.details.update(told.details(details))
        for name, value in fields.items():
            setattr(event, name, value)
        self._effects.append(Emit(event, after))

    def publish(self, job_id: str, after: int = 0, *, progress_only: bool = False) -> None:
        """Show watchers of the job what is new."""
        self._effects.append(Publish(job_id, after, progress_only))

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Add to a metric."""
        self._effects.append(Observe(metric, value, tuple(sorted(labels.items()))))

    def effect(self, effect: Effect) -> None:
        """Decide any other effect."""
        self._effects.append(effect)

    def suspect_self(self, generation: int) -> None:
        """Somebody knows a higher generation than ours."""
        self._effects.append(SuspectSelf(generation))

    def operation(self, job: JobRuntime, kind: OperationKind) -> int:
        """Note that a storage operation of the job starts; return its number."""
        self._operations += 1
        job.operation = Operation(self._operations, kind)
        return self._operations

    def episode(self, member_id: str) -> Episode:
        """Return what goes on with a member."""
        episode = self.episodes.get(member_id)
        if episode is None:
            episode = Episode(self.new_incident_id(), self.now.monotonic_s)
            self.episodes[member_id] = episode
            while len(self.episodes) > EPISODES_MAX:
                del self.episodes[next(iter(self.episodes))]
        return episode

    def new_incident_id(self) -> str:
        """Return the id of another incident; it says which leadership saw it."""
        self._incidents += 1
        return f"incident-{self.generation}-{self._incidents}"

    def lease_ttl_s(self) -> float:
        """Return the lease, which grows with the size of the cluster, as heartbeats do."""
        return self.config.lease_ttl_s * self.crowding()

    def lease_of(self, member: Worker | Aggregator) -> float:
        """Return the silence after which a member is lost.

        It keeps the slow heartbeats of a large cluster also when most of the others have left.
        """
        return max(self.lease_ttl_s(), member.lease_s)

    def patience_with(self, member: Worker | Aggregator | None) -> float:
        """Return the silence that is believed: a lease, and another one under mass silence."""
        lease = self.lease_ttl_s() if member is None else self.lease_of(member)
        return 2 * lease if self.mass_silence else lease

    def crowding(self) -> float:
        """Return by how much intervals are stretched: 1 up to 100 members."""
        return max(1.0, len(self.sessions) / 100)

    def facts_of(self, job: JobRuntime) -> JobFacts:
        """Return the durable part of a job."""
        return self.facts.jobs[job.job_id]

    def running(self) -> Iterator[JobRuntime]:
        """Yield the jobs that run, oldest first."""
        for job in list(self.jobs.values()):
            if job.job_id in self.facts.jobs and self.facts_of(job).state == RUNNING:
                yield job

    def set_reason(self, job: JobRuntime, reason: str, message: str = "") -> None:
        """Say why a job is as it is; an event tells when it begins to wait."""
        if (job.reason, job.message) == (reason, message):
            return
        begins = reason.startswith("WAITING") and job.reason != reason
        job.reason, job.message = reason, message
        if begins:
            self.emit(
                "JOB_WAITING",
                message,
                job_id=job.job_id,
                details={"reason": reason},
                after=job.after,
            )
        self.publish(job.job_id, job.after)


def new_runtime(facts: JobFacts, now: Instant) -> JobRuntime:
    """Return the soft state of a job about which nothing is known yet.

    For how long it had waited under another leader only wall clocks tell; from now on it is the
    monotonic one.
    """
    waited_s = max(0.0, (now.unix_nanos - facts.kept.submit_unix_nanos) / NANOS)
    return JobRuntime(
        job_id=facts.job_id,
        train=TreePlacement(facts.plan.shards, unit=max(1, facts.plan.unit_span)),
        evaluation=TreePlacement(facts.plan.evaluation_shards),
        all_reduce=all_reduces(facts.spec.train),
        storage_term=facts.term,
        waits_since_s=now.monotonic_s - waited_s,
    )
