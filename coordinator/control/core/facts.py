"""The durable state: built by applying journal records, and by nothing else.

The same class serves the core (which applies a record when it decides) and the readers (which see a
record only once it is durable).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from coordinator.control.core.clock import NANOS
from coordinator.control.core.lifecycle import ENDED, QUEUED, RUNNING
from coordinator.control.core.requests import RequestMemory
from phalanx.errors import DataLoss, FailedPrecondition
from phalanx.v1.control_journal_pb2 import (
    ControlRecord,
    FingerprintChanged,
    JobChanged,
    JobRemoved,
    JobSnapshot,
    RequestsSnapshot,
    SnapshotBegin,
    SnapshotEnd,
    TermStarted,
    WorkerDrained,
    WorkerQuarantined,
)
from phalanx.v1.job_pb2 import Job
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.storage_service_pb2 import CheckpointManifest
from phalanx.v1.training_pb2 import JobPlan, ParameterRange

REQUESTS_PER_RECORD = 1000
QUARANTINES_MAX = 1000
RESUMING = "RESUMING"


class JobFacts:
    """What is durable of one job; `kept` is exactly what a snapshot writes."""

    def __init__(self, kept: JobSnapshot) -> None:
        self.kept = kept

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.kept.submitted.job_id

    @property
    def spec(self) -> JobSpec:
        """The resolved spec."""
        return self.kept.submitted.spec

    @property
    def plan(self) -> JobPlan:
        """The plan of the data plane: complete once a term was started."""
        started = self.kept.HasField("term_started")
        return self.kept.term_started.plan if started else self.kept.submitted.plan

    @property
    def state(self) -> Job.State.ValueType:
        """The job's state."""
        return self.kept.changed.state if self.kept.HasField("changed") else QUEUED

    @property
    def ended(self) -> bool:
        """Whether the state is one that nothing but a retry leaves."""
        return self.state in ENDED

    @property
    def resuming(self) -> bool:
        """Whether the job runs again after a pause but its new term has not started."""
        return self.state == RUNNING and self.kept.changed.reason == RESUMING

    @property
    def waits_to_resume(self) -> bool:
        """Whether the job was resumed after a pause when no more jobs might run."""
        return self.state == QUEUED and self.kept.changed.reason == RESUMING

    @property
    def seal_key(self) -> bytes:
        """With it is sealed what workers are given in the term; empty: nobody asks for it."""
        return self.kept.term_started.seal_key

    @property
    def term(self) -> int:
        """The term that was last started, 0 before the first."""
        return self.kept.term_started.term

    @property
    def restores(self) -> bool:
        """Whether the term that was last started begins with a checkpoint."""
        return self.kept.HasField("term_started") and self.kept.term_started.restore_step >= 0

    @property
    def ranges(self) -> list[ParameterRange]:
        """The ranges of the parameters and their owners in that term."""
        return list(self.kept.term_started.ranges)

    @property
    def fingerprint(self) -> str:
        """The numeric fingerprint that the job's workers must have; empty for any."""
        return self.plan.fingerprint

    @property
    def aggregator_fingerprint(self) -> str:
        """The numeric fingerprint that the owners of the ranges must have; empty before any."""
        submitted = self.kept.submitted.continued.aggregator_fingerprint
        return self.kept.term_started.aggregator_fingerprint or submitted

    @property
    def continued(self) -> CheckpointManifest | None:
        """The checkpoint of another job from which this one goes on."""
        submitted = self.kept.submitted
        return submitted.continued.checkpoint if submitted.HasField("continued") else None

    @property
    def leaf_sha256(self) -> str:
        """The leaf that the job's workers must compute as well; empty for any."""
        return self.kept.term_started.leaf_sha256 if self.bit_identical else ""

    @property
    def bit_identical(self) -> bool:
        """Whether the result is promised to be the same bits again."""
        lost = self.kept.bit_identity_lost or self.kept.submitted.continued.bit_identity_lost
        return self.kept.submitted.plan.bitwise and not lost


class Facts:
    """All durable state of control."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobFacts] = {}
        self.requests = RequestMemory()
        self.drains: dict[str, str] = {}
        self.quarantines: dict[str, WorkerQuarantined] = {}
        self.generation = 0
        self.told_unix_nanos = 0
        """When the newest fact was told, on the wall clock of who told it; 0: not known."""
        self.removing: dict[str, None] = {}
        """Removed jobs of which storage may still keep something, oldest first."""
        self._unfinished: Facts | None = None

    def apply(self, record: ControlRecord) -> None:
        """Take in one record. Records come in the order of the journal."""
        kind = record.WhichOneof("fact")
        if kind == "snapshot_begin":
            self._unfinished = Facts()
        elif kind == "snapshot_end":
            self._finish_snapshot()
        elif kind in ("job_snapshot", "requests_snapshot"):
            if self._unfinished is not None:
                _take_snapshot(self._unfinished, record)
        else:
            self._unfinished = None  # the writer died in the middle of a snapshot
            self._apply_fact(kind, record)
        self.generation = max(self.generation, record.generation)
        self.told_unix_nanos = record.time_unix_nanos or self.told_unix_nanos

    def job(self, job_id: str) -> JobFacts:
        """Return a job. Raises DataLoss: a record names a job that no record made."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise DataLoss(
                f"the journal of control tells of job {job_id}, which was never submitted",
                reason="JOURNAL_INCOMPLETE",
            ) from None

    def snapshot(self) -> Iterator[ControlRecord]:
        """Yield the records that stand for the whole state; the generation is left empty."""
        # Before it begins: what is no part of a snapshot would end it.
        for job_id in self.removing:
            yield ControlRecord(job_removed=JobRemoved(job_id=job_id))
        yield ControlRecord(snapshot_begin=SnapshotBegin())
        for job in self.jobs.values():
            yield ControlRecord(job_snapshot=job.kept)
        drains = [WorkerDrained(worker_id=key, incarnation=self.drains[key]) for key in self.drains]
        quarantines = self.quarantines.values()
        snapshot = RequestsSnapshot(drains=drains, quarantines=quarantines)
        yield ControlRecord(requests_snapshot=snapshot)
        remembered = list(self.requests)
        for first in range(0, len(remembered), REQUESTS_PER_RECORD):
            part = remembered[first : first + REQUESTS_PER_RECORD]
            yield ControlRecord(requests_snapshot=RequestsSnapshot(requests=part))
        yield ControlRecord(time_unix_nanos=self.told_unix_nanos, snapshot_end=SnapshotEnd())

    def digest(self) -> str:
        """Return a hash of the whole state, to compare a replay with what lived."""
        hashed = hashlib.sha256()
        for job_id in sorted(self.jobs):
            hashed.update(self.jobs[job_id].kept.SerializeToString(deterministic=True))
        for request in self.requests:
            hashed.update(request.SerializeToString(deterministic=True))
        hashed.update(repr(sorted(self.drains.items())).encode())
        for worker_id in sorted(self.quarantines):
            hashed.update(self.quarantines[worker_id].SerializeToString(deterministic=True))
        return hashed.hexdigest()

    def _apply_fact(self, kind: str | None, record: ControlRecord) -> None:
        now = record.time_unix_nanos
        if record.HasField("request") and record.request.request_id:
            self.requests.remember(record.request, now)
        for request in record.joined_requests:
            self.requests.remember(request, now)
        match kind:
            case "job_submitted":
                kept = JobSnapshot(submitted=record.job_submitted, submit_unix_nanos=now)
                self.jobs[record.job_submitted.job_id] = JobFacts(kept)
            case "term_started":
                self._start_term(record.term_started, now)
            case "job_changed":
                self._change(record.job_changed, now)
            case "job_removed":
                self.jobs.pop(record.job_removed.job_id, None)
                self.removing[record.job_removed.job_id] = None
            case "fingerprint_changed":
                self._change_fingerprint(record.fingerprint_changed)
            case "worker_drained":
                self._drain(record.worker_drained)
            case "worker_quarantined":
                self._quarantine(record.worker_quarantined)
            case "clock_stepped":
                self._step_clock(record.clock_stepped.nanos)
            case "control_started":
                pass  # it says only who leads, and that is in every record
            case _:
                # To pass over it would be to forget what somebody was told.
                raise FailedPrecondition(
                    "the journal of control holds a record of a kind that this version does not "
                    "know: a newer Phalanx wrote it. Start that one; nothing is lost",
                    reason="JOURNAL_TOO_NEW",
                )

    def _start_term(self, started: TermStarted, now: int) -> None:
        kept = self.job(started.job_id).kept
        kept.term_started.CopyFrom(started)
        kept.start_unix_nanos = kept.start_unix_nanos or now
        kept.changed.job_id = started.job_id
        kept.changed.state = RUNNING
        kept.changed.reason = kept.changed.message = ""

    def _change(self, changed: JobChanged, now: int) -> None:
        kept = self.job(changed.job_id).kept
        kept.changed.CopyFrom(changed)
        kept.end_unix_nanos = now if changed.state in ENDED else 0
        kept.clock_steps_nanos = 0

    def _change_fingerprint(self, changed: FingerprintChanged) -> None:
        kept = self.job(changed.job_id).kept
        # Before its started term only a job that goes on from another one is bound to bits.
        started = kept.HasField("term_started")
        plan = kept.term_started.plan if started else kept.submitted.plan
        plan.fingerprint = changed.fingerprint
        plan.ClearField("equipment")
        if changed.HasField("equipment"):
            plan.equipment.CopyFrom(changed.equipment)
        kept.bit_identity_lost = True

    def _step_clock(self, nanos: int) -> None:
        self.requests.step(nanos)
        for job in self.jobs.values():
            if job.ended:
                job.kept.clock_steps_nanos += nanos

    def _drain(self, drained: WorkerDrained) -> None:
        if drained.done:
            self.drains.pop(drained.worker_id, None)
        else:
            self.drains[drained.worker_id] = drained.incarnation

    def _quarantine(self, quarantined: WorkerQuarantined) -> None:
        if quarantined.done:
            self.quarantines.pop(quarantined.worker_id, None)
        else:
            self.quarantines.pop(quarantined.worker_id, None)
            self.quarantines[quarantined.worker_id] = quarantined
        # Workers with new names in each start never come back.
        for worker_id in list(self.quarantines)[:-QUARANTINES_MAX]:
            del self.quarantines[worker_id]

    def _finish_snapshot(self) -> None:
        if self._unfinished is None:
            return
        whole, self._unfinished = self._unfinished, None
        self.jobs, self.requests, self.drains = whole.jobs, whole.requests, whole.drains
        self.quarantines = whole.quarantines


def _take_snapshot(facts: Facts, record: ControlRecord) -> None:
    """Take one record of a snapshot into the state that the snapshot stands for."""
    if record.WhichOneof("fact") == "job_snapshot":
        kept = JobSnapshot()
        kept.CopyFrom(record.job_snapshot)
        facts.jobs[kept.submitted.job_id] = JobFacts(kept)
        return
    for request in record.requests_snapshot.requests:
        facts.requests.remember(request, request.time_unix_nanos)
    for drained in record.requests_snapshot.drains:
        facts.drains[drained.worker_id] = drained.incarnation
    for quarantined in record.requests_snapshot.quarantines:
        facts.quarantines[quarantined.worker_id] = quarantined


def expires_unix_nanos(job: JobFacts) -> int:
    """Return when an ended job may be forgotten."""
    retain = job.spec.retain
    ended = job.kept.end_unix_nanos + job.kept.clock_steps_nanos
    return int(ended + retain.seconds * NANOS + retain.nanos)
