"""A cluster of scripted members around the real core of control, in virtual time.

`Cluster` hands events to the core and plays the runtime: it makes records durable, answers storage
operations, keeps what was sent to whom, and checks the invariants after every event.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core import invariants
from coordinator.control.core.clock import NANOS, Instant
from coordinator.control.core.facts import Facts
from coordinator.control.core.machine import handle
from coordinator.control.core.state import Core, CoreConfig
from coordinator.control.core.tree import shards_of
from coordinator.control.core.views import job_view
from coordinator.control.model_writer import stop_reason
from phalanx.errors import PhalanxError
from phalanx.specs import job_plan, plan, prepare
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import job_pb2, storage_service_pb2
from phalanx.v1.control_journal_pb2 import ControlRecord, JobSubmitted, RememberedRequest
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout, TensorSpec

DATASET = Dataset(
    namespace="default",
    name="digits",
    version=1,
    manifest_digest="ab" * 32,
    rows={"train": 4096, "test": 1024},
    features=64,
    task="classification",
    classes=[str(each) for each in range(10)],
    format="dense",
    size_bytes=4096 * 260,
    target="label",
)


@dataclass
class Cluster:
    """The core and all around it; `storage_up = False` holds records and operations back."""

    config: CoreConfig = field(default_factory=CoreConfig)
    journal: list[ControlRecord] = field(default_factory=list)
    storage_up: bool = True
    auto: bool = True
    """Whether aggregators say RangesReady and workers say they are ready by themselves."""
    parameters: int = 640
    """Of the model that workers describe."""
    history: int | None = None
    """Of storage; None: it tells none."""
    seal_key: bytes = b""
    """What is drawn for each term, where callers prove who they are."""

    def __post_init__(self) -> None:
        self.time_s = 100.0
        self.generation = 0
        self.terms: dict[str, int] = {}
        self.finals: dict[str, storage_service_pb2.CheckpointManifest] = {}
        self.checkpoints: dict[str, list[storage_service_pb2.CheckpointManifest]] = {}
        self.removed: list[str] = []
        #: What storage has written the model of, by what the final checkpoint says.
        self.written: job_pb2.Result | None = None
        self.arriving: list[ev.Event] = []
        self._tokens = itertools.count(1)
        self._sessions = itertools.count(1)
        self.lead()

    # -- the leadership ---------------------------------------------------------------------

    def lead(self, lost: ev.LostLeader | None = None) -> None:
        """Start a control process over the journal, as after a crash; members are gone from it."""
        self.generation += 1
        facts = Facts()
        for record in self.journal:
            facts.apply(record)
        self.core = Core(self.config, self.generation, facts, self.history)
        self.durable = Facts()
        for record in self.journal:
            self.durable.apply(record)
        self.waiting: list[fx.Effect] = []
        self.durable_index = 0
        self.sent: dict[int, list[pb.SessionResponse]] = {}
        self.closed: dict[int, PhalanxError] = {}
        self.answers: dict[int, Any] = {}
        self.events: list[job_pb2.Event] = []
        self.observed: list[fx.Observe] = []
        self.operations: list[fx.Effect] = []
        self.sessions: dict[str, int] = {}
        self.feed(ev.Led("control-1", lost))

    @property
    def now(self) -> Instant:
        return Instant(self.time_s, int(self.time_s * NANOS) + 10**18)

    def feed(self, event: ev.Event) -> None:
        """Hand one event, and all that follow from it, to the core."""
        self.arriving.append(event)
        if len(self.arriving) > 1:
            return  # it follows from one that is being handled
        while self.arriving:
            effects = handle(self.core, self.arriving[0], self.now)
            invariants.check(self.core)
            self.waiting.extend(effects)
            self.perform()
            self.arriving.pop(0)

    def perform(self) -> None:
        """Perform what may be performed: effects whose record is durable, and records."""
        progress = True
        while progress:
            progress = False
            for effect in list(self.waiting):
                if isinstance(effect, fx.Persist):
                    if not self.storage_up:
                        continue
                    self.waiting.remove(effect)
                    self.journal.append(effect.record)
                    self.durable.apply(effect.record)
                    self.durable_index = effect.index
                    progress = True
                elif effect.after <= self.durable_index:
                    self.waiting.remove(effect)
                    self._perform(effect)
                    progress = True
                    break

    def _perform(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Send():
                self.sent.setdefault(effect.session, []).append(effect.message)
                if self.auto:
                    self._react(effect)
            case fx.Close():
                self.closed[effect.session] = effect.error
            case fx.Answer():
                self.answers[effect.token] = effect.response
            case fx.Emit():
                self.events.append(effect.event)
            case fx.Observe():
                self.observed.append(effect)
            case fx.RemoveJob():
                self.removed.append(effect.job_id)
                self.terms.pop(effect.job_id, None)
                self.finals.pop(effect.job_id, None)
                self.checkpoints.pop(effect.job_id, None)
            case fx.RaiseTerm() | fx.ReadRow() | fx.WriteModel():
                self.operations.append(effect)
                if self.storage_up:
                    self.run_operations()
            case _:
                pass

    def run_operations(self) -> None:
        """Let storage answer what was asked of it."""
        while self.operations:
            self.feed(self._answer_operation(self.operations.pop(0)))

    def _answer_operation(self, effect: fx.Effect) -> ev.Event:
        assert isinstance(effect, fx.RaiseTerm | fx.ReadRow | fx.WriteModel)
        job_id, number = effect.job_id, effect.operation
        term, final = self.terms.get(job_id, 0), self.finals.get(job_id)
        if isinstance(effect, fx.WriteModel):
            result = job_pb2.Result(model=f"{job_id}@1", parameters_sha256="cd" * 32, steps=9)
            result.MergeFrom(self.written or job_pb2.Result())
            return ev.ModelWritten(job_id, number, result, stop_reason(final) if final else "")
        if isinstance(effect, fx.ReadRow) or final is not None:
            return ev.RowRead(job_id, number, term, final)
        if effect.expected_term != term:
            return ev.TermRefused(job_id, number, term)
        self.terms[job_id] = term + 1
        checkpoints = tuple(self.checkpoints.get(job_id, []))
        return ev.TermRaised(job_id, number, term + 1, checkpoints, self.seal_key)

    def _react(self, effect: fx.Send) -> None:
        kind = effect.message.WhichOneof("message")
        if kind == "assign_ranges":
            message = effect.message.assign_ranges
            ready = pb.RangesReady(job_id=message.plan.job_id, term=message.term)
            self.say(effect.session, ranges_ready=ready)
        elif kind == "assign_job":
            assign = effect.message.assign_job
            ready_job = pb.WorkerJobReady(job_id=assign.plan.job_id, term=assign.term)
            self.say(effect.session, worker_job_ready=ready_job)
        elif kind == "describe_job":
            self.describe(effect.session, effect.message.describe_job.plan.job_id)
        elif kind == "revoke_job":
            revoke = effect.message.revoke_job
            released = pb.WorkerJobReleased(job_id=revoke.job_id, term=revoke.term)
            self.say(effect.session, worker_job_released=released)

    # -- members ----------------------------------------------------------------------------

    def worker(self, name: str, *, slots: int = 2, fingerprint: str = "f", **hello: Any) -> int:
        """Connect a worker; return its session."""
        session = next(self._sessions)
        self.sessions[name] = session
        hello.setdefault("incarnation", f"{name}-1")
        hello.setdefault("memory_bytes", 8 * 10**9)
        message = pb.WorkerHello(worker_id=name, slots=slots, fingerprint=fingerprint, **hello)
        self.feed(ev.WorkerConnected(session, message))
        return session

    def aggregator(self, name: str = "a1", *, fingerprint: str = "f", **hello: Any) -> int:
        """Connect an aggregator; return its session."""
        session = next(self._sessions)
        self.sessions[name] = session
        hello.setdefault("incarnation", f"{name}-1")
        message = pb.AggregatorHello(
            aggregator_id=name,
            address=f"127.0.0.1:{7000 + session}",
            fingerprint=fingerprint,
            **hello,
        )
        self.feed(ev.AggregatorConnected(session, message))
        return session

    def say(self, session: int, **message: Any) -> None:
        """Let a member say something."""
        self.feed(ev.MemberSaid(session, pb.SessionRequest(**message)))

    def describe(self, session: int, job_id: str, **fields: Any) -> None:
        """Let a worker answer DescribeJob with a model of one tensor."""
        layout = Layout(
            tensors=[TensorSpec(name="w", shape=[self.parameters // 10, 10], decay=True)],
            dtype="float32",
            element_count=self.parameters,
        )
        fields = fields or {"layout": layout, "evaluation_sums": ["loss", "correct"]}
        self.say(session, job_described=pb.JobDescribed(job_id=job_id, **fields))

    def kill(self, name: str) -> None:
        """Break a member's session, as `kill -9` does."""
        self.feed(ev.SessionBroken(self.sessions[name], "connection reset"))

    def report(self, job_id: str, step: int, owner: str = "a1", **fields: Any) -> None:
        """Let the root report."""
        fields.setdefault("outcome", pb.JobReport.OUTCOME_RUNNING)
        fields.setdefault("since_commit_s", 0.0)
        fields.setdefault("term", self.core.facts.jobs[job_id].term)
        report = pb.JobReport(job_id=job_id, step=step, **fields)
        self.say(self.sessions[owner], job_report=report)

    def heartbeats(self, *names: str) -> None:
        """Let these members (or all that are connected) send an empty heartbeat."""
        for name in names or [each.id for each in self.core.sessions.values()]:
            self.say(self.sessions[name], heartbeat=pb.Heartbeat())

    def advance(self, seconds: float, *, alive: bool = True, tick_s: float = 0.25) -> None:
        """Let time pass in ticks; with `alive` every connected member sends heartbeats."""
        end = self.time_s + seconds
        while self.time_s < end - 1e-9:
            self.time_s = min(end, self.time_s + tick_s)
            if alive:
                self.heartbeats()
            self.feed(ev.Tick())

    # -- callers ----------------------------------------------------------------------------

    def submit(
        self,
        job_id: str = "job-1",
        request_id: str = "",
        edit: Callable[[JobSpec], None] | None = None,
        change: Callable[[JobSubmitted], None] | None = None,
    ) -> int:
        """Submit a small job of 16 shards; return the token of the call."""
        spec = JobSpec(name="job")
        spec.data.name = "digits"
        spec.data.shards = 16
        spec.train.model.mlp.hidden.append(8)
        spec.train.batch_size = 1024
        if edit is not None:
            edit(spec)
        return self.submit_spec(spec, DATASET, job_id, request_id, change)

    def submit_tasks(self, count: int, job_id: str = "job-1") -> int:
        """Submit a set of independent tasks; return the token of the call."""
        spec = JobSpec(name="calls")
        spec.tasks.entrypoint = "calls:add"
        for _ in range(count):
            spec.tasks.arguments.add()
        return self.submit_spec(spec, None, job_id)

    def submit_spec(
        self,
        spec: JobSpec,
        dataset: Dataset | None,
        job_id: str,
        request_id: str = "",
        change: Callable[[JobSubmitted], None] | None = None,
    ) -> int:
        """Submit a job of this spec; return the token of the call."""
        resolved = prepare(spec, dataset)
        bare = job_plan(resolved, dataset, job_id)
        bare.spec = b""
        submitted = JobSubmitted(
            job_id=job_id,
            spec=resolved,
            plan=bare,
            announced_plan=plan(resolved, dataset, 1),
            worker_bytes=plan(resolved, dataset, 1).worker_bytes,
        )
        if change is not None:
            change(submitted)
        token = next(self._tokens)
        request = self.request("SubmitJob", request_id, resolved.SerializeToString().hex())
        self.feed(ev.SubmitJob(token, submitted, request))
        return token

    def request(self, method: str, request_id: str, digest: str = "") -> RememberedRequest:
        return RememberedRequest(request_id=request_id, method=method, digest=digest)

    def call(self, kind: Any, subject: str, request_id: str = "", **fields: Any) -> int:
        """Make another call (`ev.CancelJob`, …); return its token."""
        token = next(self._tokens)
        self.feed(kind(token, subject, self.request(kind.__name__, request_id, subject), **fields))
        return token

    # -- looking ----------------------------------------------------------------------------

    def job(self, job_id: str = "job-1") -> job_pb2.Job:
        return job_view(self.core.facts.jobs[job_id], self.core.jobs.get(job_id))

    def state(self, job_id: str = "job-1") -> str:
        return job_pb2.Job.State.Name(self.job(job_id).state).removeprefix("STATE_")

    def told(self, name: str, kind: str) -> list[Any]:
        """Return the messages of one kind that a member was sent on its present session."""
        messages = self.sent.get(self.sessions[name], [])
        return [getattr(each, kind) for each in messages if each.WhichOneof("message") == kind]

    def shards(self, name: str, job_id: str = "job-1", tree: str = "train") -> set[int]:
        """Return the shards that a worker was last told to host."""
        assigned = [each for each in self.told(name, "assign_job") if each.plan.job_id == job_id]
        if not assigned:
            return set()
        width = assigned[-1].plan.shards if tree == "train" else assigned[-1].plan.evaluation_shards
        return shards_of(getattr(assigned[-1], f"{tree}_nodes"), width)

    def types(self) -> list[str]:
        return [event.type for event in self.events]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster without members; after the test the replayed journal equals what lived."""
    made = Cluster()
    yield made
    replayed = Facts()
    for record in made.journal:
        replayed.apply(record)
    assert replayed.digest() == made.durable.digest()


@pytest.fixture
def make_cluster() -> type[Cluster]:
    """The class, for tests that configure it."""
    return Cluster


@pytest.fixture
def running(cluster: Cluster) -> Cluster:
    """Three workers, one aggregator and a job that runs on them."""
    cluster.aggregator()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)
    cluster.submit()
    assert cluster.state() == "RUNNING"
    return cluster


@pytest.fixture
def dataset() -> Dataset:
    """The data set of every submitted job."""
    return DATASET
