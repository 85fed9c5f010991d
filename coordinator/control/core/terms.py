"""From queue to a running term: describing a job, raising its term, giving its ranges away.

`advance` looks at what a job is and wants and takes the next step; it may be called at any time. At
most one storage operation per job is under way; what must wait for it is taken up when it answers.
"""

from __future__ import annotations

from coordinator.control.core import (
    describing,
    ending,
    hosting,
    incidents,
    members,
    quotas,
    sharing,
)
from coordinator.control.core.effects import RaiseTerm, ReadRow
from coordinator.control.core.eligibility import (
    Group,
    announce_ineligible,
    explain_waiting,
    group_of,
)
from coordinator.control.core.events import OperationFailed, RowRead, TermRaised, TermRefused
from coordinator.control.core.lifecycle import QUEUED, RUNNING
from coordinator.control.core.ownership import Owners, choose_owners, lost_owners, may_be_owned
from coordinator.control.core.state import Core, JobRuntime, OperationKind
from phalanx.errors import Internal
from phalanx.tasks import runs_tasks
from phalanx.texts import number_of, verb_for
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.control_journal_pb2 import ControlRecord, TermStarted
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.training_pb2 import JobPlan


def advance(core: Core, job: JobRuntime) -> None:
    """Take the next step of a job's life, if there is one to take now."""
    if core.jobs.get(job.job_id) is not job or job.operation is not None:
        return
    facts = core.facts_of(job)
    if job.ending is not None:
        _end(core, job)
    elif not job.row_known:
        number = core.operation(job, OperationKind.READ_ROW)
        core.effect(ReadRow(job.job_id, number, job.after))
    elif job.stopped:
        ending.write_model(core, job)
    elif facts.state == QUEUED:
        _dispatch(core, job)
    elif facts.state == RUNNING and _needs_term(core, job):
        _raise_when_possible(core, job)


def advance_queue(core: Core) -> None:
    """Advance every queued job, by priority, which rises as it waits, and then age."""
    waiting = [job for job in core.jobs.values() if core.facts_of(job).state == QUEUED]

    def urgency(job: JobRuntime) -> float:
        kept = core.facts_of(job).kept
        waited_s = core.now.monotonic_s - job.waits_since_s
        return sharing.rank(kept.submitted.spec.priority, waited_s)

    for job in sorted(waiting, key=urgency, reverse=True):
        advance(core, job)


def advance_all(core: Core) -> None:
    """Advance every job, the queued ones by priority and then age."""
    for job in list(core.jobs.values()):
        if core.facts_of(job).state != QUEUED:
            advance(core, job)
    advance_queue(core)


def advance_members(core: Core) -> None:
    """Begin a new term of every running job whose workers own the parameters and are others now."""
    for job in core.running():
        if job.all_reduce:
            advance(core, job)


def is_over(core: Core, job: JobRuntime) -> bool:
    """Whether storage has raised a term beyond the one that the job is in, without its success."""
    return job.final is None and job.storage_term > core.facts_of(job).term


def row_read(core: Core, job: JobRuntime, event: RowRead) -> None:
    """Take in the job's row in storage: a final manifest is success, a higher term makes a new one.

    The leader before us may have raised the term and died before it gave the ranges away.
    """
    job.row_known = True
    job.storage_term = max(job.storage_term, event.term)
    if event.final is not None:
        job.stopped, job.final = True, event.final
        ending.refuse_ending(core, job)
    elif is_over(core, job):
        job.stopped = False  # whoever said so speaks of what storage does not have
    advance(core, job)


def term_refused(core: Core, job: JobRuntime, event: TermRefused) -> None:
    """Try again from the term that storage holds."""
    if event.current_term <= job.storage_term and event.current_term > 0:
        message = f"storage refused term {job.storage_term} and says it is {event.current_term}"
        raise Internal(f"job {job.job_id}: {message}")
    job.storage_term = event.current_term
    advance(core, job)


def term_raised(core: Core, job: JobRuntime, event: TermRaised, kind: OperationKind) -> None:
    """Storage fenced the old term off: end the job, or give its ranges to aggregators.

    A running job may have been paused, and resumed, since it needed the term: if it waits for its
    turn by now, its place is another's.
    """
    job.storage_term = event.term
    if job.ending is not None:
        ending.carry_out(core, job, job.ending)
        advance_queue(core)
    elif core.facts_of(job).state == RUNNING or kind is OperationKind.BEGIN:
        _start(core, job, event)
    else:
        advance_queue(core)  # if it is paused, its next term begins when it is resumed


def operation_failed(core: Core, job: JobRuntime, event: OperationFailed) -> None:
    """A storage operation cannot succeed: the job fails with what storage said."""
    job.stopped = False
    failure = Failure(code=event.code, message=event.message, shard=-1)
    ending.fail(core, job, event.code, event.message, [failure])
    advance(core, job)


def describing_worker_gone(core: Core, job: JobRuntime, worker_id: str) -> None:
    """Ask another worker; a worker's death is nothing that the job did."""
    del job.describing[worker_id]
    advance(core, job)


def assign_ranges(core: Core, job: JobRuntime, aggregator_id: str) -> None:
    """Tell an aggregator which ranges of the current term are its own."""
    facts = core.facts_of(job)
    message = pb.AssignRanges(
        plan=hosting.job_plan(core, job),
        term=facts.term,
        ranges=facts.ranges,
        seal_key=facts.seal_key,
        secret=facts.kept.submitted.secret,
    )
    if job.restore is not None:
        message.restore.CopyFrom(job.restore)
    message.reached_step = job.step
    aggregator = core.aggregators[aggregator_id]
    core.send(aggregator.session, pb.SessionResponse(assign_ranges=message), job.term_after)
    job.owner_incarnations[aggregator_id] = aggregator.hello.incarnation


def command_pause(core: Core, job: JobRuntime) -> None:
    """Tell the root to pause at the next step boundary; it may be told more than once."""
    facts = core.facts_of(job)
    owners = core.workers if job.all_reduce else core.aggregators
    root = owners.get(facts.ranges[0].aggregator_id) if facts.ranges else None
    if root is not None and root.connected and facts.kept.changed.pause_requested:
        command = pb.JobCommand(
            job_id=job.job_id,
            term=facts.term,
            kind=pb.JobCommand.KIND_PAUSE,
            reason="PAUSE_REQUESTED",
        )
        core.send(root.session, pb.SessionResponse(job_command=command), job.after)


def _end(core: Core, job: JobRuntime) -> None:
    assert job.ending is not None
    if max(job.storage_term, core.facts_of(job).term) == 0:
        ending.carry_out(core, job, job.ending)
        advance_queue(core)
    else:
        _raise(core, job, OperationKind.END)


def _raise(core: Core, job: JobRuntime, kind: OperationKind) -> None:
    number = core.operation(job, kind)
    core.effect(RaiseTerm(job.job_id, number, job.storage_term, job.after))


def _needs_term(core: Core, job: JobRuntime) -> bool:
    """Whether a running job cannot go on in its term, or is to go on with other members.

    Of a term that storage has raised it takes nothing any more, even if nobody heard that it did
    and what the term was raised for is over by now.
    """
    if job.all_reduce and core.now.monotonic_s < job.adopt_until_s:
        return False  # its members may be about to come back, with all that it has
    if is_over(core, job):
        return True
    return members.have_changed(core, job) if job.all_reduce else bool(lost_owners(core, job))


def _may_start(core: Core, job: JobRuntime) -> bool:
    """Whether somebody is there to own the ranges of a new term; sets the reason if not."""
    return members.may_be_chosen(core, job) if job.all_reduce else may_be_owned(core, job)


def _raise_when_possible(core: Core, job: JobRuntime) -> None:
    if _may_start(core, job):
        core.set_reason(job, "RECOVERING", "the ranges of its parameters get a new owner")
        _raise(core, job, OperationKind.RAISE_TERM)


def _dispatch(core: Core, job: JobRuntime) -> None:
    facts = core.facts_of(job)
    if _has_to_wait(core, job):
        return
    group, wanted = group_of(core, job), max(1, facts.spec.resources.min_workers)
    if len(group.workers) < wanted and _forget_description(core, job, group):
        group = group_of(core, job)
    announce_ineligible(core, job, group)
    if len(group.workers) < wanted:
        core.set_reason(job, *explain_waiting(core, job, group))
    elif not _may_start(core, job):
        return
    elif job.described is not None or facts.plan.layout.element_count > 0:
        core.set_reason(job, "STARTING")
        _raise(core, job, OperationKind.BEGIN)
    else:
        describing.ask(core, job, group)


def _forget_description(core: Core, job: JobRuntime, group: Group) -> bool:
    """Have others describe a job that lacks workers which give the bits of its description.

    Nothing of it is computed before its first term, so it waits for none of these.
    """
    if job.described is None or not group.unmatched or core.facts_of(job).fingerprint:
        return False
    job.described = job.described_kind = None
    return True


def _has_to_wait(core: Core, job: JobRuntime) -> bool:
    """Whether as many jobs run as may, of all or of the job's namespace; sets the reason if so."""
    reason, text = why_to_wait(core, core.facts_of(job).spec.namespace)
    if reason:
        core.set_reason(job, reason, text)
    return bool(reason)


def why_to_wait(core: Core, namespace: str) -> tuple[str, str]:
    """Return the reason, and its text, why no job of a namespace may begin; empty: one may."""
    going = [*core.running(), *_beginning(core)]
    if len(going) >= core.config.running_jobs_max:
        are = verb_for(len(going), "is", "are")
        return "QUEUED_BEHIND_OTHERS", f"{number_of(len(going), 'job')} {are} running"
    of_it = sum(core.facts_of(job).spec.namespace == namespace for job in going)
    why = quotas.why_it_waits(core.config.quotas, namespace, of_it)
    return ("QUEUED_BY_QUOTA", why) if why else ("", "")


def _beginning(core: Core) -> list[JobRuntime]:
    """Return the queued jobs whose next term storage is being asked for: each runs soon."""
    return [
        job
        for job in core.jobs.values()
        if job.operation is not None and job.operation.kind is OperationKind.BEGIN
    ]


def _start(core: Core, job: JobRuntime, event: TermRaised) -> None:
    """Journal the new term with its owners, then tell everybody."""
    facts = core.facts_of(job)
    if facts.plan.bitwise and not facts.fingerprint:
        group = group_of(core, job)
        if not group.workers and _forget_description(core, job, group):
            advance_queue(core)
            return
    plan = _complete_plan(core, job)
    choose = members.choose if job.all_reduce else choose_owners
    owners = choose(core, job, plan)
    if owners is None and job.all_reduce and facts.state == QUEUED:
        # Who described it gives other bits than those who would take part now.
        job.described = None
        advance(core, job)
    if owners is None:
        return  # the reason is set; an aggregator that joins raises the term once more
    remain = _remaining(core, job, owners)
    restore = _newest_good(job, event.checkpoints) or facts.continued
    if not remain:
        _miss_checkpoint(core, job, restore)
    started = TermStarted(
        job_id=job.job_id,
        term=event.term,
        plan=plan,
        ranges=owners.ranges,
        aggregator_fingerprint=owners.fingerprint,
        restore_step=restore.step if restore is not None else -1,
        leaf_sha256=_leaf_of(core, job),
        workers_own=job.all_reduce,
        seal_key=event.seal_key,
    )
    before, old_term, first = job.step, facts.term, facts.state == QUEUED
    resumed = facts.resuming or facts.waits_to_resume
    former = {each.aggregator_id for each in facts.ranges}
    if first and not facts.kept.start_unix_nanos:
        core.observe("job_queue_seconds", core.now.monotonic_s - job.waits_since_s)
    job.after = job.term_after = core.persist(ControlRecord(term_started=started))
    job.restore, job.lost_owners = restore, set()
    job.adopt_until_s = 0.0  # nobody can come back with shards of a term that has just begun
    job.owner_incarnations, job.ready_aggregators, job.failed_leaves = {}, set(), {}
    core.set_reason(job, "")
    core.publish(job.job_id, job.after)
    lost, incident_id = incidents.of_owners(core, job), incidents.of_lost_owners(core, job)
    if remain:
        _tell_members(core, job, remain, incident_id)
    elif first or resumed:
        _tell_start(core, job, resumed=resumed)
    else:
        _tell_again(core, job, before, incident_id)
    new_owners = {each.aggregator_id for each in owners.ranges}
    for owner in sorted(former - new_owners):
        _release(core, job, owner, old_term)
    for owner in sorted(new_owners) if not job.all_reduce else ():
        assign_ranges(core, job, owner)
    command_pause(core, job)
    hosting.sync(core, job)
    for incident in lost:
        incidents.moved(core, incident)


def _leaf_of(core: Core, job: JobRuntime) -> str:
    """The leaf that the job's workers must compute as well; a job that goes on has one already."""
    kept = core.facts_of(job).kept
    described = job.described.leaf_sha256 if job.described else kept.term_started.leaf_sha256
    return kept.submitted.continued.leaf_sha256 or described


def _first_step(job: JobRuntime) -> int:
    return job.restore.step if job.restore is not None else 0


def _origin(core: Core, job: JobRuntime) -> str:
    facts = core.facts_of(job)
    if runs_tasks(facts.spec):
        return f"of {number_of(facts.plan.total_steps, 'task')}"
    if job.restore is None:
        return "from the start"
    whose = f" of {job.restore.job_id}" if job.restore == facts.continued else ""
    return f"from the checkpoint at step {job.restore.step}{whose}"


def _tell_start(core: Core, job: JobRuntime, *, resumed: bool) -> None:
    facts = core.facts_of(job)
    owners = sorted({each.aggregator_id for each in facts.ranges})
    core.emit(
        "JOB_RESUMED" if resumed else "JOB_STARTED",
        f"term {facts.term} {_origin(core, job)}, {number_of(len(facts.ranges), 'range')} "
        f"on {', '.join(owners)}",
        job_id=job.job_id,
        after=job.after,
        step=_first_step(job),
        details={"term": facts.term, "fingerprint": facts.fingerprint},
    )


def _tell_again(core: Core, job: JobRuntime, before: int, incident_id: str) -> None:
    """Tell what a job goes on from that has lost its owners.

    `before` is what the root said last. It may have done more since then, or have left a checkpoint
    that is newer: who has lost something is told so even if no step is known to be lost.
    """
    facts, step = core.facts_of(job), _first_step(job)
    origin, replayed = _origin(core, job), max(0, before - step)
    are = verb_for(replayed, "is", "are")
    if runs_tasks(facts.spec):
        type_, step, details = "JOB_RESUMED", before, {"term": facts.term}
        text = f"term {facts.term} {origin}: what has a result keeps it"
    elif replayed or incident_id or job.all_reduce:
        type_, details = "STEPS_REPLAYED", {"steps": replayed, "term": facts.term}
        text = f"{number_of(replayed, 'step')} {are} computed again {origin}, in term {facts.term}"
    else:
        return
    core.emit(
        type_,
        text,
        job_id=job.job_id,
        after=job.after,
        step=step,
        incident_id=incident_id,
        details=details,
    )


def _remaining(core: Core, job: JobRuntime, owners: Owners) -> set[str]:
    """Members of the term before that are in the new one as well, with all that the job has."""
    if not job.all_reduce or core.facts_of(job).resuming:
        return set()
    new = {each.aggregator_id for each in owners.ranges}
    before = new & set(members.current(core, job))
    return {key for key in before if members.takes_part(core, job, key)}


def _tell_members(core: Core, job: JobRuntime, remain: set[str], incident_id: str) -> None:
    """Tell who reduces from now on. Nothing is rolled back: one that is left knows everything."""
    facts = core.facts_of(job)
    workers, why = ", ".join(members.current(core, job)), job.leveling.why
    core.emit(
        "SHARDS_MOVED",
        f"term {facts.term}: the open step is computed again by {workers}" + (why and f"; {why}"),
        job_id=job.job_id,
        after=job.after,
        incident_id=incident_id,
        step=job.step,
        details={
            "cause": "speed" if why else "members",
            "workers": workers,
            "term": facts.term,
            "remaining": ",".join(sorted(remain)),
        },
    )


def _release(core: Core, job: JobRuntime, owner: str, term: int) -> None:
    aggregator = core.aggregators.get(owner)
    if aggregator is not None and aggregator.connected:
        message = pb.ReleaseRanges(job_id=job.job_id, term=term)
        core.send(aggregator.session, pb.SessionResponse(release_ranges=message), job.after)


def _newest_good(
    job: JobRuntime, checkpoints: tuple[storage_pb.CheckpointManifest, ...]
) -> storage_pb.CheckpointManifest | None:
    for manifest in checkpoints:
        if manifest.manifest_sha256 not in job.bad_checkpoints:
            return manifest
    return None


def _miss_checkpoint(
    core: Core, job: JobRuntime, restore: storage_pb.CheckpointManifest | None
) -> None:
    """Say so where storage does not list a checkpoint that was complete: it is damaged there."""
    known = job.report.checkpoint_step if job.report is not None else 0
    newest = restore.step if restore is not None else 0
    if known > newest and not job.bad_checkpoints:
        origin = "the one before it is taken" if restore is not None else "the job starts anew"
        core.emit(
            "CHECKPOINT_CORRUPT",
            f"storage has no whole checkpoint at step {known} any more; {origin}",
            job_id=job.job_id,
            after=job.after,
            incident_id=incidents.of_lost_owners(core, job),
            step=known,
            details={"code": "CHECKPOINT_NOT_LISTED", "taken_step": newest},
        )


def _complete_plan(core: Core, job: JobRuntime) -> JobPlan:
    """The plan with what only a worker could tell and what is chosen at first dispatch."""
    facts = core.facts_of(job)
    plan = JobPlan()
    plan.CopyFrom(facts.plan)
    if job.described is not None:
        plan.layout.CopyFrom(job.described.layout)
        del plan.evaluation_sums[:]
        plan.evaluation_sums.extend(job.described.evaluation_sums)
    if plan.bitwise and not plan.fingerprint and job.described_kind is not None:
        job.described_kind.write(plan)
    return plan
