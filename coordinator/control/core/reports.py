"""What owners of ranges say of their jobs: ranges ready or not, progress, pause, stop, failure."""

from __future__ import annotations

import math
from dataclasses import replace

from coordinator.control.core import ending, hosting, incidents, outages, quarantine, terms, told
from coordinator.control.core.lifecycle import RUNNING
from coordinator.control.core.ownership import live_aggregators
from coordinator.control.core.state import Aggregator, CommitTime, Core, JobRuntime, Worker
from phalanx.tasks import runs_tasks
from phalanx.texts import number_of, verb_for
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView

STORAGE_EVENTS = frozenset(("STORAGE_UNAVAILABLE", "STORAGE_RESTORED"))
CHECKPOINT_EVENTS = frozenset(("CHECKPOINT_CORRUPT", "STEPS_REPLAYED"))
MEMBER_EVENTS = frozenset(
    ("NON_FINITE_REFUSED", "SPECULATION_STARTED", *STORAGE_EVENTS, *CHECKPOINT_EVENTS)
)
"""What members may have written into the event log."""


def ranges_ready(core: Core, aggregator: Aggregator | Worker, message: pb.RangesReady) -> None:
    """Note that an aggregator serves its ranges, or take the checkpoint before if it could not."""
    job = _current(core, aggregator, message.job_id, message.term)
    if job is None:
        return
    if not message.HasField("failure"):
        job.ready_aggregators.add(aggregator.id)
        job.too_small.discard(aggregator.id)
        if core.facts_of(job).ranges[0].aggregator_id == aggregator.id:
            # While it was loading it could not hear of a pause.
            terms.command_pause(core, job)
        return
    failure = message.failure
    memory = failure.code == "AGGREGATOR_MEMORY"
    if memory and _another_may_hold(core, job, aggregator):
        # That says nothing of the checkpoint.
        job.lost_owners.add(aggregator.id)
    elif job.restore is None and core.facts_of(job).restores and not memory:
        # With which checkpoint, the leader before us knew; the next term begins with a known one.
        job.lost_owners.add(aggregator.id)
    elif job.restore is None or memory:
        text = f"{aggregator.id} cannot hold the ranges: {failure.message}"
        ending.fail(core, job, failure.code or "RANGES_NOT_LOADED", text, [failure])
    elif job.restore == core.facts_of(job).continued:
        text = (
            f"the checkpoint at step {job.restore.step} of {job.restore.job_id}, from which it "
            f"goes on, cannot be used: {failure.message}"
        )
        ending.fail(core, job, "START_NOT_USABLE", text, [failure])
    else:
        job.bad_checkpoints.add(job.restore.manifest_sha256)
        job.lost_owners.add(aggregator.id)
        core.emit(
            "CHECKPOINT_CORRUPT",
            f"the checkpoint at step {job.restore.step} cannot be used: {failure.message}; "
            "the one before it is taken",
            job_id=job.job_id,
            incident_id=incidents.of_lost_owners(core, job),
            step=job.restore.step,
            details={"aggregator": aggregator.id, "code": failure.code},
        )
    terms.advance(core, job)


def job_report(core: Core, aggregator: Aggregator | Worker, report: pb.JobReport) -> None:
    """Take in the root's report; any other owner of the current term is believed a failure, and
    with all-reduce who holds the job up."""
    job = _current(core, aggregator, report.job_id, report.term)
    if job is None:
        return
    if job.all_reduce:
        _watch_members(core, job, aggregator.id, report)
    if core.facts_of(job).ranges[0].aggregator_id != aggregator.id:
        if report.outcome == pb.JobReport.OUTCOME_FAILED:
            _failed(core, job, report)
        return
    report = told.report(report)
    previous, job.report = job.report, report
    committed_before, job.commit = job.commit, _commit_of(core, job, report)
    if job.commit is not None:
        if committed_before is not None:
            _measure_steps(job, committed_before, job.commit)
        incidents.committed(core, job, job.commit)
    _announce_checkpoint(core, job, previous, report)
    if not job.all_reduce:
        _watch_late(core, job, report)
    for outvoted in report.outvoted_workers:
        quarantine.outvoted(core, job, outvoted)
    quarantine.watch_verifiers(core, job, report)
    if report.outcome == pb.JobReport.OUTCOME_PAUSED:
        if core.facts_of(job).kept.changed.pause_requested and job.ending is None:
            ending.paused(core, job, report)
            terms.advance_queue(core)  # another one may run in its place
    elif report.outcome == pb.JobReport.OUTCOME_STOPPED:
        # Success is a final checkpoint in storage, after which no term is raised.
        job.stopped = not terms.is_over(core, job)
        terms.advance(core, job)
    elif report.outcome == pb.JobReport.OUTCOME_FAILED:
        _failed(core, job, report)
    else:
        _forget_past_failures(job, report.step)
        hosting.release_keepers(core, job)
        core.publish(job.job_id, job.term_after, progress_only=True)


def member_event(core: Core, member: Aggregator | Worker, message: pb.MemberEvent) -> None:
    """Write what a member saw into the event log, with the incident that it is part of."""
    if message.type not in MEMBER_EVENTS:
        return
    incident_id, known = "", dict[str, str]()
    job = core.jobs.get(message.job_id)
    if message.type in STORAGE_EVENTS:
        outage = outages.told(core, member, message)
        if outage is None:
            return
        incident_id, known = outage
    elif message.type in CHECKPOINT_EVENTS and job is not None:
        incident_id = incidents.of_lost_owners(core, job)
    worker_id = ""
    if message.type == "SPECULATION_STARTED":
        worker_id = message.details.get("worker_id", "")[:200]
        if job is not None and worker_id in core.workers:
            incident_id = _late(core, job, worker_id)
    places = {name: getattr(message, name) for name in ("shard", "step") if message.HasField(name)}
    core.emit(
        message.type,
        message.message,
        job_id=message.job_id[:200],
        worker_id=worker_id,
        incident_id=incident_id,
        details={**message.details, **known, "member": member.id},
        **places,
    )


def copies_started(core: Core, aggregator: Aggregator | Worker, message: pb.CopiesStarted) -> None:
    """Tell that an aggregator has late shards computed a second time, by others."""
    job = _current(core, aggregator, message.job_id, message.term)
    if job is None:
        return
    message = told.copies(message)
    count = len(message.shards)
    core.observe("redispatches_total", count, cause=message.cause)
    incident_id = ""
    if message.worker_id and message.cause == "late":
        began_s = core.now.monotonic_s - message.waited_s
        incident = incidents.detected(core, "late", message.worker_id, began_s)
        incident.jobs[job.job_id] = job.step
        incident.moved = core.now
        incident_id = _late(core, job, message.worker_id)
    elif message.worker_id:
        # Told after the fact: control was away when it happened.
        incident_id = incidents.suspected(core, message.worker_id)
    what = number_of(count, "evaluation shard" if message.evaluation else "shard")
    are = verb_for(count, "is", "are")
    whose = message.worker_id or "nobody known"
    why = f"nothing came within {message.waited_s:.3f} s (late after {message.patience_s:.3f} s)"
    if message.cause == "lost":
        why = "its stream broke while control was away"
    takers = ", ".join(message.copied_to)
    core.emit(
        "SPECULATION_STARTED",
        f"{what} of {whose} {are} copied by {takers}: {why}",
        job_id=job.job_id,
        worker_id=message.worker_id,
        incident_id=incident_id,
        step=message.step,
        details={
            "aggregator": aggregator.id,
            "cause": message.cause,
            "shards": ",".join(str(shard) for shard in message.shards),
            "workers": takers,
            "waited_s": f"{message.waited_s:.6f}",
            "patience_s": f"{message.patience_s:.6f}",
        },
    )


def _late(core: Core, job: JobRuntime, worker_id: str) -> str:
    """Note that others do a worker's part as well; return the incident's id.

    It is over with the first report that does not name the worker, be it the next one.
    """
    job.late.add(worker_id)
    return incidents.suspected(core, worker_id)


def _another_may_hold(core: Core, job: JobRuntime, aggregator: Aggregator | Worker) -> bool:
    """Note that one has not enough memory for its ranges; it is asked twice only if others may not
    own them."""
    known = aggregator.id in job.too_small
    job.too_small.add(aggregator.id)
    return not known and any(each.id not in job.too_small for each in live_aggregators(core))


def _watch_late(core: Core, job: JobRuntime, report: pb.JobReport) -> None:
    """A worker that is late for a lease loses its shards; one that is not late any more is well.

    Silence is another matter, with its own lease. Nobody is late for longer than he can deliver,
    whatever the root waits for: who comes back, or is tried again, has a lease to show it. Tasks
    may take as long as they do; others run them meanwhile.
    """
    tasks = runs_tasks(core.facts_of(job).spec)
    late = {each.worker_id: each.late_s for each in report.late_workers if each.worker_id}
    late = _not_heard_of(core, job, report) | late
    for worker_id, reported_s in late.items():
        worker, hosted = core.workers.get(worker_id), job.hosts.get(worker_id)
        if worker is None or hosted is None or worker.state == WorkerView.STATE_SUSPECTED:
            continue
        if tasks or not hosted.ready:
            continue
        late_s = min(reported_s, core.now.monotonic_s - hosted.since_s)
        if late_s >= core.lease_ttl_s():
            hosting.set_aside(core, job, worker_id, late_s)
    for worker_id in job.late - late.keys():
        worker = core.workers.get(worker_id)
        ready = worker is not None and worker.state == WorkerView.STATE_READY
        if ready and worker_id not in job.set_aside:
            incidents.well(core, worker_id)
    job.late = set(late)


def _watch_members(core: Core, job: JobRuntime, teller: str, report: pb.JobReport) -> None:
    """A member for which another one waits for a lease takes no part any more: a new term begins.

    Those that have not loaded the job yet are members again once they have. Of others it is one at
    a time, since it may be all that is wrong; who hears of nobody is the one to leave. Silence is
    another matter, with its own lease.
    """
    lease_s = core.lease_ttl_s()
    waited = {
        each.worker_id: each.late_s
        for each in report.late_workers
        if each.worker_id in job.hosts and each.late_s >= lease_s
    }
    loading = {key for key in waited if not job.hosts[key].ready}
    hanging = {key: late_s for key, late_s in waited.items() if key not in loading}
    if len(hanging) > 1 and 2 * len(hanging) > len(core.facts_of(job).ranges) - 1:
        hanging = {teller: max(hanging.values())}
    due = sorted((late_s, key) for key, late_s in hanging.items() if _is_heard(core, key))
    changing = job.operation is not None or job.set_aside.keys() & job.hosts.keys()
    if changing or not (loading or due):
        return
    job.lost_owners |= loading
    if due:
        late_s, worker_id = due[-1]
        hosting.set_aside(core, job, worker_id, late_s)
    terms.advance(core, job)


def _is_heard(core: Core, worker_id: str) -> bool:
    worker = core.workers.get(worker_id)
    return worker is not None and worker.state != WorkerView.STATE_SUSPECTED


def _not_heard_of(core: Core, job: JobRuntime, report: pb.JobReport) -> dict[str, float]:
    """Workers that are ready for shards of which the root hears nothing; since when it says so.

    It does not know who they are, nor that a shard has just been moved.
    """
    shards = {shard for each in report.late_workers for shard in each.shards}
    now_s = core.now.monotonic_s
    job.not_heard_of = {
        worker_id: job.not_heard_of.get(worker_id, now_s)
        for worker_id, hosted in job.hosts.items()
        if hosted.ready and not hosted.train.isdisjoint(shards)
    }
    return {worker_id: now_s - since_s for worker_id, since_s in job.not_heard_of.items()}


def _commit_of(core: Core, job: JobRuntime, report: pb.JobReport) -> CommitTime | None:
    """Return when the newest step was committed: the root says how long ago that was.

    That is too late by the time for which the report was under way, so of several reports of one
    step the earliest time is the best.
    """
    if not report.HasField("since_commit_s") or not math.isfinite(report.since_commit_s):
        return None
    at_s = core.now.monotonic_s - max(0.0, report.since_commit_s)
    filled_s = None
    if report.HasField("since_contribution_s") and math.isfinite(report.since_contribution_s):
        filled_s = min(at_s, core.now.monotonic_s - report.since_contribution_s)
    known = job.commit
    if known is not None and (known.term, known.step) == (report.term, report.step):
        return known if known.at_s <= at_s else replace(known, at_s=at_s, filled_s=filled_s)
    return CommitTime(report.term, report.step, at_s, filled_s)


def _measure_steps(job: JobRuntime, before: CommitTime, after: CommitTime) -> None:
    steps, took_s = after.step - before.step, after.at_s - before.at_s
    if before.term == after.term and steps > 0 and took_s > 0:
        known_s = job.leveling.step_s or took_s / steps
        job.leveling.step_s = (known_s + took_s / steps) / 2


def _failed(core: Core, job: JobRuntime, report: pb.JobReport) -> None:
    failures = [report.failure] if report.HasField("failure") else []
    ending.fail(core, job, report.reason or "FAILED", report.message, failures)
    terms.advance(core, job)


def _current(
    core: Core, aggregator: Aggregator | Worker, job_id: str, term: int
) -> JobRuntime | None:
    """The running job if the sender speaks of its current term; else the sender must let it go."""
    job = core.jobs.get(job_id)
    if job is not None:
        facts = core.facts_of(job)
        # A worker may have the name of an aggregator.
        owns = isinstance(aggregator, Worker) == job.all_reduce
        owns = owns and any(each.aggregator_id == aggregator.id for each in facts.ranges)
        owns = owns and (job_id, term) not in aggregator.foreign
        if facts.state == RUNNING and facts.term == term and owns:
            return job
    if isinstance(aggregator, Worker):
        return None  # it is told of each term that it is to know of
    message = pb.ReleaseRanges(job_id=job_id, term=term)
    core.send(aggregator.session, pb.SessionResponse(release_ranges=message))
    return None


def _announce_checkpoint(
    core: Core, job: JobRuntime, previous: pb.JobReport | None, report: pb.JobReport
) -> None:
    known = previous.checkpoint_step if previous is not None else 0
    if report.checkpoint_step > known:
        core.emit(
            "CHECKPOINT_COMMITTED",
            f"step {report.checkpoint_step} is durable",
            job_id=job.job_id,
            step=report.checkpoint_step,
        )


def _forget_past_failures(job: JobRuntime, step: int) -> None:
    """A shard whose step has been committed has proved itself."""
    for key, failures in list(job.failed_leaves.items()):
        if all(each.step < step for each in failures):
            del job.failed_leaves[key]
