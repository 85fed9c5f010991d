"""What callers may ask of jobs and workers: each is remembered, journalled, then answered."""

from __future__ import annotations

from dataclasses import replace

from google.protobuf.message import Message

from coordinator.control.core import membership, quotas, terms
from coordinator.control.core.effects import RemoveJob
from coordinator.control.core.eligibility import explain_waiting, group_of, too_large
from coordinator.control.core.events import (
    CancelJob,
    DeleteJob,
    DrainWorker,
    PauseJob,
    ResumeJob,
    RetryJob,
    SubmitJob,
)
from coordinator.control.core.facts import (
    REQUESTS_PER_RECORD,
    RESUMING,
    JobFacts,
    expires_unix_nanos,
)
from coordinator.control.core.lifecycle import (
    CANCELLED,
    ENDED,
    RUNNING,
    Verb,
    next_state,
    state_name,
)
from coordinator.control.core.requests import check_same
from coordinator.control.core.state import Core, Ending, JobRuntime, OperationKind, new_runtime
from coordinator.control.core.views import job_view, worker_view
from phalanx.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    Unavailable,
    no_job,
)
from phalanx.v1.cluster_service_pb2 import DrainWorkerResponse
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.control_journal_pb2 import (
    ControlRecord,
    JobChanged,
    JobRemoved,
    JobSnapshot,
    RememberedRequest,
    WorkerDrained,
)
from phalanx.v1.job_service_pb2 import (
    CancelJobResponse,
    DeleteJobResponse,
    PauseJobResponse,
    ResumeJobResponse,
    RetryJobResponse,
    SubmitJobResponse,
)

_RESPONSES: dict[str, type[Message]] = {
    "CancelJob": CancelJobResponse,
    "PauseJob": PauseJobResponse,
    "ResumeJob": ResumeJobResponse,
    "RetryJob": RetryJobResponse,
}


def first_answer(core: Core, request: RememberedRequest) -> Message | None:
    """Return the answer to a call that was carried out before, None if this one is new.

    Raises AlreadyExists (the id stands for another request) or NotFound (what it made is deleted).
    """
    first = core.facts.requests.find(request, core.now.unix_nanos)
    if first is None:
        return None
    if first.method == "DeleteJob":
        return DeleteJobResponse()
    if first.method == "DrainWorker":
        worker = core.workers.get(first.subject)
        return DrainWorkerResponse(worker=worker_view(core, worker) if worker else None)
    facts = core.facts.jobs.get(first.subject)
    if facts is None:
        raise NotFound(f"request {first.request_id!r} was about {first.subject}, which is deleted")
    if first.method == "SubmitJob":
        return _submitted(facts)
    return _RESPONSES[first.method](
        job=job_view(facts, core.jobs.get(first.subject), core.generation)
    )


def submit(core: Core, event: SubmitJob) -> None:
    """Take a checked job into the queue."""
    submitted, request = event.submitted, event.request
    if submitted.job_id in core.facts.jobs:
        text = f"there is a job {submitted.job_id} already; submit again for another id"
        core.answer(event.token, AlreadyExists(text, reason="JOB_ID_TAKEN"))
        return
    refusal = too_large(core, submitted.worker_bytes)
    if refusal is not None:
        core.answer(event.token, refusal)
        return
    quotas.check(core.config.quotas, core.facts, submitted)
    record = ControlRecord(job_submitted=submitted)
    request.subject = submitted.job_id
    index = core.persist(record, request)
    facts = core.facts.jobs[submitted.job_id]
    job = core.jobs[submitted.job_id] = new_runtime(facts, core.now)
    job.after = index
    core.answer(event.token, _submitted(facts), index)
    core.emit("JOB_QUEUED", f"{facts.spec.name} is queued", job_id=job.job_id, after=index)
    core.publish(job.job_id, index)
    terms.advance_queue(core)


def cancel(core: Core, event: CancelJob) -> None:
    """End a job as cancelled: fenced first, then journalled, then answered."""
    facts, job = _find(core, event.job_id)
    next_state(event.job_id, facts.state, Verb.CANCEL)
    assert job is not None
    if job.stopped:
        text = f"job {event.job_id} has reached its end and is being stored"
        raise FailedPrecondition(text, reason="FINAL_CHECKPOINT")
    event.request.subject = event.job_id
    if job.ending is not None and job.ending.state == CANCELLED:
        _join(job.ending, event)
        return
    if job.ending is not None:
        text = f"job {event.job_id} is failing: {job.ending.message}"
        raise FailedPrecondition(text, reason="WRONG_STATE")
    reason = event.reason or "cancelled by a user"
    job.ending = Ending(
        CANCELLED, "CANCELLED", reason, tokens=[event.token], requests=[event.request]
    )
    core.set_reason(job, "CANCELLING", reason)
    terms.advance(core, job)


def pause(core: Core, event: PauseJob) -> None:
    """Note the wish to pause and tell the root; the job is paused at its next step boundary."""
    facts, job = _find(core, event.job_id)
    if job is not None and (job.ending is not None or job.stopped):
        text = f"job {event.job_id} is ending and cannot be paused"
        raise FailedPrecondition(text, reason="WRONG_STATE")
    if job is not None and facts.waits_to_resume:
        _stay_paused(core, facts, job, event)
        return
    state = next_state(event.job_id, facts.state, Verb.REQUEST_PAUSE)
    assert job is not None
    changed = JobChanged(
        job_id=event.job_id,
        state=state,
        reason="PAUSING",
        message="at the next step boundary",
        pause_requested=True,
    )
    _carry_over(facts, changed)
    event.request.subject = event.job_id
    job.after = core.persist(ControlRecord(job_changed=changed), event.request)
    core.answer(event.token, PauseJobResponse(job=job_view(facts, job, core.generation)), job.after)
    core.publish(job.job_id, job.after)
    terms.command_pause(core, job)
    if job.reason == "WAITING_FOR_WORKERS":
        core.set_reason(job, *explain_waiting(core, job, group_of(core, job)))


def _stay_paused(core: Core, facts: JobFacts, job: JobRuntime, event: PauseJob) -> None:
    """Take a job that waits to be resumed out of the queue again: nobody runs anything of it.

    A term that storage is raising for it by now is none to begin with, see `terms.term_raised`.
    """
    if job.operation is not None and job.operation.kind is OperationKind.BEGIN:
        job.operation = replace(job.operation, kind=OperationKind.RAISE_TERM)
    state = next_state(event.job_id, facts.state, Verb.PAUSE)
    changed = JobChanged(job_id=event.job_id, state=state, message="it had not been resumed yet")
    _carry_over(facts, changed)
    event.request.subject = event.job_id
    job.after = core.persist(ControlRecord(job_changed=changed), event.request)
    job.reason = job.message = ""
    core.answer(event.token, PauseJobResponse(job=job_view(facts, job, core.generation)), job.after)
    core.emit("JOB_PAUSED", changed.message, job_id=job.job_id, after=job.after)
    core.publish(job.job_id, job.after)
    terms.advance_queue(core)


def resume(core: Core, event: ResumeJob) -> None:
    """Let a paused job run again, from the checkpoint that the pause took.

    Where as many run as may it waits in the queue, like any other: who only asked again and again
    would find that each place went to a job that waits.
    """
    facts, job = _find(core, event.job_id)
    if facts.state == RUNNING and facts.kept.changed.pause_requested:
        text = f"job {event.job_id} is still pausing; resume it when it is PAUSED"
        raise FailedPrecondition(text, reason="STILL_PAUSING")
    state = next_state(event.job_id, facts.state, Verb.RESUME)
    assert job is not None
    if job.ending is not None:
        text = f"job {event.job_id} is ending and cannot be resumed"
        raise FailedPrecondition(text, reason="WRONG_STATE")
    namespace = facts.spec.namespace
    if terms.why_to_wait(core, namespace)[0]:
        quotas.check_queued(core.config.quotas, core.facts, namespace)
        state = next_state(event.job_id, facts.state, Verb.QUEUE_AGAIN)
        job.waits_since_s = core.now.monotonic_s
    changed = JobChanged(job_id=event.job_id, state=state, reason=RESUMING)
    _carry_over(facts, changed)
    event.request.subject = event.job_id
    job.after = core.persist(ControlRecord(job_changed=changed), event.request)
    job.lost_owners.update(each.aggregator_id for each in facts.ranges)
    core.answer(
        event.token, ResumeJobResponse(job=job_view(facts, job, core.generation)), job.after
    )
    if facts.waits_to_resume:
        core.emit("JOB_QUEUED", "resumed by a user", job_id=job.job_id, after=job.after)
    core.publish(job.job_id, job.after)
    terms.advance(core, job)


def retry(core: Core, event: RetryJob) -> None:
    """Put a failed job back into the queue; it goes on from its last checkpoint."""
    facts, _ = _find(core, event.job_id)
    state = next_state(event.job_id, facts.state, Verb.RETRY)
    quotas.check(core.config.quotas, core.facts, facts.kept.submitted)
    changed = JobChanged(job_id=event.job_id, state=state, reason="RETRYING")
    _carry_over(facts, changed)
    event.request.subject = event.job_id
    index = core.persist(ControlRecord(job_changed=changed), event.request)
    job = core.jobs[event.job_id] = new_runtime(facts, core.now)
    job.after = index
    core.answer(event.token, RetryJobResponse(job=job_view(facts, job, core.generation)), index)
    core.emit("JOB_QUEUED", "queued again by a user", job_id=job.job_id, after=index)
    core.publish(job.job_id, index)
    terms.advance_queue(core)


def delete(core: Core, event: DeleteJob) -> None:
    """Forget an ended job; its models stay."""
    facts, _ = _find(core, event.job_id)
    if facts.state not in ENDED:
        text = f"job {event.job_id} is {state_name(facts.state)}; cancel it before you delete it"
        raise FailedPrecondition(text, reason="WRONG_STATE")
    event.request.subject = event.job_id
    index = _remove(core, event.job_id, event.request)
    core.answer(event.token, DeleteJobResponse(), index)


def drain(core: Core, event: DrainWorker) -> None:
    """Have a worker finish and leave."""
    worker = core.workers.get(event.worker_id)
    if worker is None:
        text = f"there is no worker {event.worker_id}; `phalanx workers` shows what there is"
        raise NotFound(text, reason="WORKER_NOT_FOUND")
    if not worker.connected:
        state = WorkerView.State.Name(worker.state).removeprefix("STATE_")
        text = f"worker {event.worker_id} is {state}: there is nothing to drain"
        raise FailedPrecondition(text, reason="WRONG_STATE")
    event.request.subject = event.worker_id
    drained = WorkerDrained(worker_id=worker.id, incarnation=worker.hello.incarnation)
    index = core.persist(ControlRecord(worker_drained=drained), event.request)
    membership.start_drain(core, worker, "asked to drain")
    core.answer(event.token, DrainWorkerResponse(worker=worker_view(core, worker)), index)


def expire(core: Core) -> None:
    """Forget ended jobs whose `retain` is over, and the oldest of those that are too many."""
    ended = [facts for facts in core.facts.jobs.values() if facts.ended]
    ended.sort(key=lambda facts: (-facts.kept.end_unix_nanos, facts.job_id))
    for position, facts in enumerate(ended):
        too_many = position >= core.config.ended_jobs_max
        if too_many or expires_unix_nanos(facts) <= core.now.unix_nanos:
            _remove(core, facts.job_id, None)


def _join(ending: Ending, event: CancelJob) -> None:
    """Have a job that is being cancelled answer one more caller, who is remembered with the first.

    Raises AlreadyExists (the id stands for another request) or Unavailable (there are too many).
    """
    request = event.request
    for each in ending.requests if request.request_id else ():
        if each.request_id == request.request_id:
            check_same(each, request)
            ending.tokens.append(event.token)
            return
    if len(ending.requests) >= REQUESTS_PER_RECORD:
        text = (
            f"job {event.job_id} is being cancelled, and too many wait for that already; look at it"
        )
        raise Unavailable(text, reason="CANCELLING", retry_after_s=1.0)
    ending.tokens.append(event.token)
    ending.requests.append(request)


def _find(core: Core, job_id: str) -> tuple[JobFacts, JobRuntime | None]:
    facts = core.facts.jobs.get(job_id)
    if facts is None:
        raise no_job(job_id)
    return facts, core.jobs.get(job_id)


def _remove(core: Core, job_id: str, request: RememberedRequest | None) -> int:
    index = core.persist(ControlRecord(job_removed=JobRemoved(job_id=job_id)), request)
    core.effect(RemoveJob(job_id, index))
    core.publish(job_id, index)
    return index


def _carry_over(facts: JobFacts, changed: JobChanged) -> None:
    """Keep how far the job was: people look at it while it waits."""
    if facts.kept.changed.HasField("progress"):
        changed.progress.CopyFrom(facts.kept.changed.progress)


def _submitted(facts: JobFacts) -> SubmitJobResponse:
    """The answer to a submission, the same whatever became of the job since."""
    kept = JobSnapshot(
        submitted=facts.kept.submitted, submit_unix_nanos=facts.kept.submit_unix_nanos
    )
    return SubmitJobResponse(
        job=job_view(JobFacts(kept), None), plan=facts.kept.submitted.announced_plan
    )
