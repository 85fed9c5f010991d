"""How a job ends: fenced off by a term first, then a durable state, then members let go."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.control.core import hosting, incidents, told
from coordinator.control.core.effects import WriteModel
from coordinator.control.core.lifecycle import CANCELLED, ENDED, EVENT_OF, FAILED, Verb, next_state
from coordinator.control.core.state import Core, Ending, JobRuntime, OperationKind
from coordinator.control.core.views import job_view, progress_view
from phalanx.errors import FailedPrecondition
from phalanx.tasks import runs_tasks
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import job_pb2
from phalanx.v1.control_journal_pb2 import ControlRecord, JobChanged, RememberedRequest
from phalanx.v1.job_service_pb2 import CancelJobResponse

FINAL_CHECKPOINT_MISSING = "FINAL_CHECKPOINT_MISSING"

_VERBS = {FAILED: Verb.FAIL, CANCELLED: Verb.CANCEL}


def fail(
    core: Core, job: JobRuntime, reason: str, message: str, failures: Iterable[job_pb2.Failure] = ()
) -> None:
    """Decide that a job has failed; a wish that came earlier stands."""
    if job.ending is None and not job.stopped:
        next_state(job.job_id, core.facts_of(job).state, Verb.FAIL)
        kept = tuple(told.failure(each) for each in failures)
        job.ending = Ending(FAILED, told.name(reason), told.text(message), kept)


def carry_out(core: Core, job: JobRuntime, ending: Ending) -> None:
    """End the job now: nothing of an earlier term can reach storage any more."""
    facts = core.facts_of(job)
    verb = _VERBS[ending.state]
    changed = JobChanged(
        state=next_state(job.job_id, facts.state, verb),
        reason=ending.reason,
        message=ending.message,
        failures=ending.failures,
    )
    after = _persist(core, job, changed, ending.requests)
    for token in ending.tokens:
        core.answer(token, CancelJobResponse(job=job_view(facts, None, core.generation)), after)
    _let_go(core, job, after)


def is_beyond_fencing(kind: OperationKind, code: str) -> bool:
    """Whether a failed operation leaves no term to raise before the job ends.

    Either raising it is what failed, or the final checkpoint is there, after which no term comes.
    """
    stored = kind is OperationKind.WRITE_MODEL and code != FINAL_CHECKPOINT_MISSING
    return stored or kind is OperationKind.END


def end_unfenced(core: Core, job: JobRuntime, code: str, message: str) -> None:
    """End a job for which storage can do nothing more: trying again would go on for ever."""
    job.stopped = False
    fail(core, job, code, message, [job_pb2.Failure(code=code, message=message, shard=-1)])
    assert job.ending is not None
    carry_out(core, job, job.ending)


def succeed(core: Core, job: JobRuntime, result: job_pb2.Result, reason: str) -> None:
    """Record the result of a job whose final checkpoint and model are stored."""
    facts = core.facts_of(job)
    report = job.report
    if report is not None and not result.HasField("best"):
        for name, value in report.metrics.items():
            if name not in result.metrics:
                result.metrics[name] = value
    result.bit_identical = facts.bit_identical
    state = next_state(job.job_id, facts.state, Verb.SUCCEED)
    changed = JobChanged(state=state, reason=reason, result=result)
    if not result.model:
        given_up = int(result.metrics.get("tasks/given_up", 0))
        but = f", {given_up} of them given up" if given_up else ""
        changed.message = f"{number_of(result.steps, 'task')} done{but}"
    else:
        changed.message = f"model {result.model}, parameters {result.parameters_sha256[:16]}…"
        core.emit(
            "MODEL_REGISTERED",
            f"{result.model} is registered",
            job_id=job.job_id,
            details={"model": result.model, "parameters_sha256": result.parameters_sha256},
        )
    _let_go(core, job, _persist(core, job, changed))


def paused(core: Core, job: JobRuntime, report: pb.JobReport) -> None:
    """Record that a job is paused: its checkpoint is complete, nobody holds anything of it."""
    facts = core.facts_of(job)
    changed = JobChanged(
        state=next_state(job.job_id, facts.state, Verb.PAUSE),
        message=f"{report.step} of {number_of(facts.plan.total_steps, 'task')} done"
        if runs_tasks(facts.spec)
        else f"checkpoint at step {report.checkpoint_step or report.step}",
    )
    term = facts.term
    after = _persist(core, job, changed)
    core.emit("JOB_PAUSED", changed.message, job_id=job.job_id, after=after, step=report.step)
    release_members(core, job, term, "the job is paused", after)
    incidents.forget(core, job.job_id)
    job.reason = job.message = ""
    job.report = None


def write_model(core: Core, job: JobRuntime) -> None:
    """Have the model composed from the final checkpoint."""
    number = core.operation(job, OperationKind.WRITE_MODEL)
    facts = core.facts_of(job)
    core.effect(WriteModel(job.job_id, number, facts.bit_identical, job.final, job.after))


def refuse_ending(core: Core, job: JobRuntime) -> None:
    """A final manifest is there: the job has succeeded, whoever wanted to end it comes too late."""
    ending, job.ending = job.ending, None
    for token in ending.tokens if ending is not None else ():
        core.answer(
            token,
            FailedPrecondition(
                f"job {job.job_id} has already succeeded: its final checkpoint is complete",
                reason="FINAL_CHECKPOINT",
            ),
        )


def release_members(core: Core, job: JobRuntime, term: int, reason: str, after: int) -> None:
    """Tell every member to let the job of this term go."""
    for owner in sorted({each.aggregator_id for each in core.facts_of(job).ranges}):
        aggregator = core.aggregators.get(owner)
        if aggregator is not None and aggregator.connected:
            message = pb.SessionResponse(
                release_ranges=pb.ReleaseRanges(job_id=job.job_id, term=term)
            )
            core.send(aggregator.session, message, after)
    for worker_id in sorted(job.hosts):
        hosting.revoke(core, job, worker_id, job.hosts[worker_id].term, reason, after)
    job.hosts.clear()
    for tree in (job.train, job.evaluation):
        tree.owners.clear()
        tree.keepers.clear()
    job.owner_incarnations.clear()
    job.ready_aggregators.clear()


def _persist(
    core: Core, job: JobRuntime, changed: JobChanged, requests: Iterable[RememberedRequest] = ()
) -> int:
    facts = core.facts_of(job)
    changed.job_id = job.job_id
    if job.report is not None:
        progress = progress_view(facts, job)
        del progress.workers[:]
        changed.progress.CopyFrom(progress)
    elif facts.kept.changed.HasField("progress"):
        changed.progress.CopyFrom(facts.kept.changed.progress)
    if changed.HasField("result"):
        # The last report may be from before the end, or lost with whoever heard it.
        changed.progress.step = changed.result.steps
        changed.progress.total_steps = facts.plan.total_steps
        if changed.result.HasField("best"):
            changed.progress.best.CopyFrom(changed.result.best)
    job.after = core.persist(ControlRecord(job_changed=changed), *requests)
    core.publish(job.job_id, job.after)
    return job.after


def _let_go(core: Core, job: JobRuntime, after: int) -> None:
    facts = core.facts_of(job)
    assert facts.state in ENDED
    text = ": ".join(
        part for part in (facts.kept.changed.reason, facts.kept.changed.message) if part
    )
    core.emit(
        EVENT_OF[facts.state],
        text,
        job_id=job.job_id,
        after=after,
        step=facts.kept.changed.progress.step,
        details={"reason": facts.kept.changed.reason},
    )
    release_members(core, job, facts.term, "the job has ended", after)
    incidents.forget(core, job.job_id)
    del core.jobs[job.job_id]
