"""The machine: one event and the time in, effects out."""

from __future__ import annotations

from dataclasses import replace

from coordinator.control.core import (
    budgets,
    descriptions,
    ending,
    hosting,
    incidents,
    kinds,
    membership,
    outages,
    reports,
    terms,
    verbs,
)
from coordinator.control.core.clock import NANOS, Instant
from coordinator.control.core.effects import Effect
from coordinator.control.core.eligibility import group_of
from coordinator.control.core.events import (
    AggregatorConnected,
    CancelJob,
    DeleteJob,
    DrainWorker,
    Event,
    Led,
    MemberSaid,
    ModelWritten,
    OperationFailed,
    PauseJob,
    QuotasChanged,
    ResumeJob,
    RetryJob,
    RowRead,
    SessionBroken,
    StorageLost,
    StorageReturned,
    SubmitJob,
    TermRaised,
    TermRefused,
    Tick,
    WorkerConnected,
)
from coordinator.control.core.lifecycle import RUNNING
from coordinator.control.core.ownership import lost_owners
from coordinator.control.core.state import Aggregator, Core, JobRuntime, Worker, new_runtime
from phalanx.errors import PhalanxError
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.control_journal_pb2 import (
    ClockStepped,
    ControlRecord,
    ControlStarted,
    FingerprintChanged,
)

EXPIRE_EVERY_S = 10.0
CLOCK_STEP_S = 60.0
"""By how much the wall clock has to differ from elapsed time for anybody to care."""
AWAY_S = 3600.0
"""How long nobody may have led as far as the wall clock, another machine's maybe, is believed."""

_Request = SubmitJob | CancelJob | PauseJob | ResumeJob | RetryJob | DeleteJob | DrainWorker
_Answered = TermRaised | TermRefused | RowRead | ModelWritten | OperationFailed


def handle(core: Core, event: Event, now: Instant) -> list[Effect]:
    """Decide what one event means. The effects are to be performed in order, see `effects`."""
    before, core.now = core.now, now
    if not isinstance(event, Led):
        elapsed_nanos = int((now.monotonic_s - before.monotonic_s) * NANOS)
        # Small steps add up, so none is forgotten.
        core.clock_off_nanos += now.unix_nanos - before.unix_nanos - elapsed_nanos
        if _notice_clock(core, core.clock_off_nanos, CLOCK_STEP_S):
            core.clock_off_nanos = 0
    match event:
        case Tick():
            _tick(core)
        case MemberSaid():
            _member_said(core, event)
        case WorkerConnected():
            membership.worker_connected(core, event.session, event.hello)
        case AggregatorConnected():
            membership.aggregator_connected(core, event.session, event.hello)
        case SessionBroken():
            membership.session_broken(core, event.session, event.reason)
        case QuotasChanged():
            quotas = replace(core.config.quotas, namespaces=event.namespaces)
            core.config = replace(core.config, quotas=quotas)
            terms.advance_queue(core)
        case Led():
            _led(core, event)
        case StorageLost():
            outages.lost(core, event)
        case StorageReturned():
            outages.returned(core, event)
        case (
            TermRaised()
            | TermRefused()
            | RowRead()
            | ModelWritten()
            | OperationFailed() as answered
        ):
            _operation_answered(core, answered)
        case request:
            _requested(core, request)
    if not _is_routine(event):
        terms.advance_members(core)
    return core.take_effects()


def _is_routine(event: Event) -> bool:
    """Whether an event says nothing about who is there; these are most of all."""
    said = event.message.WhichOneof("message") if isinstance(event, MemberSaid) else None
    return said in ("heartbeat", "job_report")


def _led(core: Core, event: Led) -> None:
    """Begin to lead: rebuild what is soft from the facts, and find out what ended meanwhile."""
    core.led_s = core.now.monotonic_s
    if core.facts.told_unix_nanos:
        away_nanos = core.now.unix_nanos - core.facts.told_unix_nanos
        believed_nanos = min(max(0, away_nanos), int(AWAY_S * NANOS))
        _notice_clock(core, away_nanos - believed_nanos, CLOCK_STEP_S)
    core.persist(ControlRecord(control_started=ControlStarted(control_id=event.control_id)))
    for facts in core.facts.jobs.values():
        if facts.ended:
            continue
        job = core.jobs[facts.job_id] = new_runtime(facts, core.now)
        if facts.state == RUNNING:
            job.row_known = False
            job.adopt_until_s = core.led_s + core.lease_ttl_s()
        if facts.resuming:
            job.lost_owners.update(each.aggregator_id for each in facts.ranges)
    _tell_take_over(core, event)
    terms.advance_all(core)


def _notice_clock(core: Core, step_nanos: int, limit_s: float) -> bool:
    """Keep what is kept for a time for that time, although the wall clock was moved; return
    whether it was moved by so much."""
    if abs(step_nanos) < limit_s * NANOS:
        return False
    core.persist(ControlRecord(clock_stepped=ClockStepped(nanos=step_nanos)))
    return True


def _tell_take_over(core: Core, event: Led) -> None:
    text = f"{event.control_id} leads generation {core.generation}"
    incident_id, details = "", dict[str, str]()
    if event.lost is not None:
        incident, details = incidents.took_over(core, event.lost)
        text += f" in the place of {event.lost.control_id}, which was lost"
        incident_id = incident.id
    core.emit("CONTROL_TOOK_OVER", text, incident_id=incident_id, details=details)


def _tick(core: Core) -> None:
    membership.check_silence(core)
    now = core.now.monotonic_s
    for job in list(core.jobs.values()):
        descriptions.check_deadline(core, job)
        _watch_fingerprint(core, job)
    for job in core.running():
        if job.adopt_until_s and now >= job.adopt_until_s:
            job.adopt_until_s = 0.0
            hosting.sync(core, job, cause="take_over", balance=True)
        hosting.release_keepers(core, job)
        hosting.end_set_aside(core, job)
        hosting.level(core, job)
        _watch_owners(core, job)
    for worker in core.workers.values():
        if worker.state == WorkerView.STATE_DRAINING and worker.connected:
            membership.finish_drain(core, worker)
    if now - core.expired_s >= EXPIRE_EVERY_S:
        core.expired_s = now
        verbs.expire(core)


def _watch_owners(core: Core, job: JobRuntime) -> None:
    """Take ranges whose owner has been silent for too long."""
    for owner in sorted(lost_owners(core, job) - job.lost_owners):
        job.lost_owners.add(owner)
        membership.tell_aggregator_lost(core, job, owner, "no sign of life for a lease")
    terms.advance(core, job)


def _watch_fingerprint(core: Core, job: JobRuntime) -> None:
    """After `fall_back_after` without members of the right fingerprint, go on with others."""
    if job.reason != "WAITING_FOR_FINGERPRINT":
        job.unmatched_since_s = None
        return
    now = core.now.monotonic_s
    if job.unmatched_since_s is None:
        job.unmatched_since_s = now
    bitwise = core.facts_of(job).spec.reproducibility.bitwise
    if not bitwise.HasField("fall_back_after"):
        return
    patience = bitwise.fall_back_after.seconds + bitwise.fall_back_after.nanos * 1e-9
    if now - job.unmatched_since_s < patience:
        return
    group = group_of(core, job)
    if group.workers:
        # It is an aggregator that is missing.
        job.owners_may_differ = True
        terms.advance(core, job)
        return
    if not group.unmatched:
        return
    facts, hello = core.facts_of(job), core.workers[group.unmatched[0]].hello
    kind = kinds.of_worker(facts, hello)
    changed = FingerprintChanged(
        job_id=job.job_id, fingerprint=kind.fingerprint, equipment=kind.equipment()
    )
    job.after = job.term_after = core.persist(ControlRecord(fingerprint_changed=changed))
    core.emit(
        "BIT_IDENTITY_LOST",
        "the job goes on on workers that may give other bits",
        job_id=job.job_id,
        after=job.after,
        step=job.step,
        details={"fingerprint": kind.fingerprint},
    )
    job.told_ineligible.clear()
    hosting.sync(core, job, cause="fall_back")
    terms.advance(core, job)


def _member_said(core: Core, event: MemberSaid) -> None:
    member = core.sessions.get(event.session)
    if member is None:
        return  # the session was closed meanwhile
    membership.heard(core, member)
    kind = event.message.WhichOneof("message")
    if kind == "heartbeat":
        membership.heartbeat(core, member, event.message.heartbeat)
    elif kind == "member_event":
        reports.member_event(core, member, event.message.member_event)
    elif isinstance(member, Worker):
        _worker_said(core, member, kind, event)
    else:
        _aggregator_said(core, member, kind, event)


def _worker_said(core: Core, worker: Worker, kind: str | None, event: MemberSaid) -> None:
    message = event.message
    if kind == "job_described":
        job = core.jobs.get(message.job_described.job_id)
        if job is not None:
            descriptions.described(core, job, worker, message.job_described)
    elif kind == "worker_job_ready":
        membership.worker_ready(core, worker, message.worker_job_ready)
    elif kind == "leaf_failed":
        budgets.leaf_failed(core, worker, message.leaf_failed)
    elif kind == "drain_requested":
        membership.start_drain(core, worker, "it is being stopped")
    elif kind == "worker_job_released":
        membership.finish_drain(core, worker)
    elif kind == "job_report":
        reports.job_report(core, worker, message.job_report)
    elif kind == "ranges_ready":
        reports.ranges_ready(core, worker, message.ranges_ready)
    elif kind == "copies_started":
        reports.copies_started(core, worker, message.copies_started)


def _aggregator_said(
    core: Core, aggregator: Aggregator, kind: str | None, event: MemberSaid
) -> None:
    if kind == "job_report":
        reports.job_report(core, aggregator, event.message.job_report)
    elif kind == "ranges_ready":
        reports.ranges_ready(core, aggregator, event.message.ranges_ready)
    elif kind == "copies_started":
        reports.copies_started(core, aggregator, event.message.copies_started)


def _operation_answered(core: Core, event: _Answered) -> None:
    job = core.jobs.get(event.job_id)
    if job is None or job.operation is None or job.operation.number != event.operation:
        return  # late: the job ended, or another operation took its place
    kind, job.operation = job.operation.kind, None
    match event:
        case TermRaised():
            terms.term_raised(core, job, event, kind)
        case TermRefused():
            terms.term_refused(core, job, event)
        case RowRead():
            terms.row_read(core, job, event)
        case ModelWritten():
            ending.succeed(core, job, event.result, event.reason)
            terms.advance_queue(core)
        case OperationFailed() if ending.is_beyond_fencing(kind, event.code):
            ending.end_unfenced(core, job, event.code, event.message)
            terms.advance_queue(core)
        case OperationFailed():
            terms.operation_failed(core, job, event)


def _requested(core: Core, event: _Request) -> None:
    """Carry a call out, or answer as the first time, or refuse it."""
    try:
        answer = verbs.first_answer(core, event.request)
        if answer is not None:
            # The first call's fact may still be on its way to the journal.
            core.answer(event.token, answer, core.last_record)
            return
        match event:
            case SubmitJob():
                verbs.submit(core, event)
            case CancelJob():
                verbs.cancel(core, event)
            case PauseJob():
                verbs.pause(core, event)
            case ResumeJob():
                verbs.resume(core, event)
            case RetryJob():
                verbs.retry(core, event)
            case DeleteJob():
                verbs.delete(core, event)
            case DrainWorker():
                verbs.drain(core, event)
    except PhalanxError as error:
        core.answer(event.token, error)
