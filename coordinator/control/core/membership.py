"""Who is in the cluster: joining, silence, death, leaving.

A broken stream frees a worker's shards at once; silence does so after a lease. When more than half
of three or more members are silent together, or this process itself was asleep, the fault is more
likely here, and nobody is declared lost for another lease. Members speak at different moments, so
those who fell silent together do not reach their leases together: being suspected is enough.
"""

from __future__ import annotations

from coordinator.control.core import (
    describing,
    foreign,
    hosting,
    incidents,
    kinds,
    quarantine,
    terms,
    told,
)
from coordinator.control.core.eligibility import TAKES_WORK
from coordinator.control.core.facts import JobFacts
from coordinator.control.core.lifecycle import RUNNING
from coordinator.control.core.speeds import Speed
from coordinator.control.core.state import (
    Aggregator,
    Core,
    Hosting,
    JobRuntime,
    Progress,
    TreePlacement,
    Worker,
)
from coordinator.control.core.tree import shards_of
from phalanx.errors import Aborted, FailedPrecondition, InvalidArgument, PhalanxError, Unavailable
from phalanx.given import was_given
from phalanx.ids import is_name
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.control_journal_pb2 import ControlRecord, WorkerDrained

SUSPECTED_AFTER = 0.5
"""Share of a lease of silence after which a worker gets nothing new."""

_OUTCOMES = {
    number: name.removeprefix("KIND_").lower() if number else "done"
    for name, number in pb.LeafFailed.Kind.items()
}

MASS = 3
SLOTS_MAX = 4096
GONE_WORKERS_KEPT = 200


def worker_connected(core: Core, session: int, hello: pb.WorkerHello) -> None:
    """Take a worker in: new, back after a broken stream, or from before a take-over."""
    wrong = _wrong_hello(core, hello.worker_id, hello.incarnation, hello.generation)
    if wrong is None and not 1 <= hello.slots <= SLOTS_MAX:
        wrong = InvalidArgument(f"{hello.worker_id} says it has {number_of(hello.slots, 'slot')}")
    if wrong is not None:
        core.close(session, wrong)
        return
    hello = told.hello(hello)
    old = core.workers.get(hello.worker_id)
    if old is not None and old.connected:
        _replace_worker(core, old, hello)
    same = old is not None and old.hello.incarnation == hello.incarnation
    was_lost = old is not None and old.state == WorkerView.STATE_LOST
    worker = Worker(
        hello=hello,
        session=session,
        state=WorkerView.STATE_READY,
        join_unix_nanos=old.join_unix_nanos if same and old else core.now.unix_nanos,
        heard_s=core.now.monotonic_s,
        ended_attempts=old.ended_attempts if same and old else None,
    )
    core.workers.pop(worker.id, None)
    core.workers[worker.id] = worker
    core.sessions[session] = worker
    worker.lease_s = core.lease_ttl_s()
    worker.foreign = foreign.held_by(core, hello)
    _recall_drain(core, worker)
    quarantine.recall(core, worker)
    _forget_gone(core)
    core.send(session, _welcome(core))
    back = f" with {number_of(len(hello.held_jobs), 'job')} in hand" if hello.held_jobs else ""
    core.emit(
        "WORKER_JOINED",
        f"{worker.id} joined with {number_of(worker.slots, 'slot')}{back}",
        worker_id=worker.id,
        incident_id=incidents.returned(core, [each.job_id for each in hello.held_jobs]),
        details={"incarnation": hello.incarnation, "host": hello.host, "pid": hello.pid},
    )
    incidents.well(core, worker.id)
    if not same:
        _forget_leaves(core, worker)
    _adopt(core, worker)
    for job in list(core.jobs.values()):
        job.set_aside.pop(worker.id, None)
        if not same:
            job.set_aside_before.pop(worker.id, None)
        if not same or was_lost:
            # The leaf in which it was stopped took it that long, and says nothing of the next.
            job.speeds.pop(worker.id, None)
        if worker.id in job.describing:
            # What it was asked got lost with its session.
            terms.describing_worker_gone(core, job, worker.id)
    # One that is back with a job in hand is ready at once: no later word would give it a share.
    _place_everything(core, balance=bool(hello.held_jobs))


def aggregator_connected(core: Core, session: int, hello: pb.AggregatorHello) -> None:
    """Take an aggregator in; what it does not hold any more is lost for certain."""
    wrong = _wrong_hello(core, hello.aggregator_id, hello.incarnation, hello.generation)
    if wrong is None and not hello.address:
        wrong = InvalidArgument(f"{hello.aggregator_id} does not say where workers reach it")
    if wrong is not None:
        core.close(session, wrong)
        return
    old = core.aggregators.get(hello.aggregator_id)
    if old is not None and old.connected:
        core.sessions.pop(old.session, None)
        core.close(old.session, Aborted("another session of this aggregator was opened"))
    if old is None or old.hello.incarnation != hello.incarnation:
        incidents.well(core, hello.aggregator_id)
    aggregator = Aggregator(hello=hello, session=session, heard_s=core.now.monotonic_s)
    core.aggregators[aggregator.id] = aggregator
    core.sessions[session] = aggregator
    aggregator.lease_s = core.lease_ttl_s()
    core.send(session, _welcome(core))
    aggregator.foreign = foreign.held_by(core, hello)
    held = {
        each.job_id: each
        for each in hello.held_ranges
        if (each.job_id, each.term) not in aggregator.foreign
    }
    for each in hello.held_ranges:
        if each.job_id not in held or not _holds_current(core, aggregator, each):
            message = pb.ReleaseRanges(job_id=each.job_id, term=each.term)
            core.send(session, pb.SessionResponse(release_ranges=message))
    for job in core.running():
        _check_owner(core, job, aggregator, held.get(job.job_id))
    terms.advance_all(core)


def session_broken(core: Core, session: int, reason: str) -> None:
    """A stream ended: a worker's shards are free now, an aggregator has a lease to come back."""
    member = core.sessions.pop(session, None)
    if isinstance(member, Worker):
        member.session = 0
        lose_worker(
            core, member, "worker_lost", reason or "its session broke", core.now.monotonic_s
        )
    elif member is not None:
        member.session = 0
        member.heard_s = core.now.monotonic_s


def takes_part(core: Core, job_id: str, member_id: str, is_worker: bool) -> bool:
    """Whether a job that has not ended is given to a member: shards of it, or ranges."""
    job = core.jobs.get(job_id)
    if job is None:
        return False
    if is_worker and member_id in job.hosts:
        return True
    owners = {each.aggregator_id for each in core.facts_of(job).ranges}
    return is_worker == job.all_reduce and member_id in owners


def heartbeat(core: Core, member: Worker | Aggregator, message: pb.Heartbeat) -> None:
    """Take in what a worker says of its jobs; being heard at all is noted by `heard`."""
    if isinstance(member, Aggregator):
        return
    member.resident_bytes = message.resident_bytes
    member.cpu_fraction = message.cpu_fraction
    _count_attempts(core, member, message)
    for each in message.jobs:
        job = core.jobs.get(each.job_id)
        hosted = job.hosts.get(member.id) if job is not None else None
        if job is None or hosted is None or hosted.term != each.term:
            continue
        past = hosted.progress
        advanced = (each.step, each.leaves_done) > (past.step, past.leaves_done)
        hosted.progress = Progress(
            step=each.step,
            leaves_done=each.leaves_done,
            examples_per_second=each.examples_per_second,
            changed_s=core.now.monotonic_s if each.step > past.step else past.changed_s,
        )
        speed = job.speeds.setdefault(member.id, Speed())
        speed.told(each.train_leaves, each.train_leaf_seconds, core.now.monotonic_s)
        if advanced:
            core.publish(job.job_id, job.term_after, progress_only=True)


def _count_attempts(core: Core, worker: Worker, message: pb.Heartbeat) -> None:
    """Count what has ended since the heartbeat before.

    The first one comes with the session. What it tells of ended under another leader, which has
    counted it; a worker that has just started has nothing to tell.
    """
    ended = {(each.calls, each.failed): each.count for each in message.ended_attempts}
    before, worker.ended_attempts = worker.ended_attempts, ended
    if before is None:
        return
    for (calls, failed), count in ended.items():
        more = count - before.get((calls, failed), 0)
        if more > 0 and failed in _OUTCOMES:
            program = "tasks" if calls else "train"
            core.observe("tasks_total", more, program=program, outcome=_OUTCOMES[failed])


def heard(core: Core, member: Worker | Aggregator) -> None:
    """Note that a member lives."""
    member.heard_s = core.now.monotonic_s
    if isinstance(member, Aggregator):
        if member.suspected:
            member.suspected = False
            terms.advance_all(core)
    elif member.state == WorkerView.STATE_SUSPECTED:
        member.state, member.reason = WorkerView.STATE_READY, ""
        incidents.well(core, member.id)
        _place_everything(core)


def worker_ready(core: Core, worker: Worker, message: pb.WorkerJobReady) -> None:
    """A worker holds a job's code and data: it may take its share."""
    job = core.jobs.get(message.job_id)
    if job is None:
        return
    wanted = core.facts_of(job).leaf_sha256
    if wanted and message.leaf_sha256 != wanted and not message.leaf_failed:
        # Whatever term it speaks of: it sets the job up once and tells its leaf once.
        quarantine.set_up_otherwise(core, job, worker, message.leaf_sha256)
        return
    hosted = job.hosts.get(worker.id)
    if hosted is None or hosted.term != message.term:
        return
    job.unprepared.pop(worker.id, None)
    newly, hosted.ready = not hosted.ready, True
    if newly:
        hosted.since_s = core.now.monotonic_s
    hosting.sync(core, job, balance=newly)


def check_silence(core: Core) -> None:
    """Suspect and then lose members that were not heard of."""
    now = core.now.monotonic_s
    _forgive_own_sleep(core)
    core.ticked_s = now
    members = list(core.sessions.values())
    silent = sum(now - m.heard_s >= core.lease_of(m) * SUSPECTED_AFTER for m in members)
    core.mass_silence = len(members) >= MASS and 2 * silent > len(members)
    _suspect(core)
    for member in members:
        if now - member.heard_s >= core.patience_with(member):
            _declare_lost(core, member)


def lose_worker(
    core: Core, worker: Worker, cause: str, why: str, suspected_s: float, *, place: bool = True
) -> None:
    """Take a worker for dead (or gone after a drain) and hand its shards out."""
    left = worker.state == WorkerView.STATE_DRAINING
    worker.state = WorkerView.STATE_LEFT if left else WorkerView.STATE_LOST
    worker.reason = "drained" if left else why
    if left:
        _drain_done(core, worker)
        quarantine.end(core, worker.id)
    touched = _hosted_by(core, worker)
    incident = None
    if not left or touched:
        incident = incidents.detected(core, cause, worker.id, suspected_s)
        held = {job.job_id: job.step for job in touched if job.train.held_by(worker.id)}
        incident.jobs.update(held)
    _tell_of_worker(
        core,
        worker,
        touched,
        "WORKER_LEFT" if left else "WORKER_LOST",
        incident_id=incident.id if incident is not None else "",
        details={"cause": cause, "incarnation": worker.hello.incarnation},
    )
    for job in touched:
        del job.hosts[worker.id]
        freed, freed_evaluation = job.train.forget(worker.id), job.evaluation.forget(worker.id)
        if place:
            hosting.sync(
                core,
                job,
                cause=cause,
                freed=freed,
                freed_evaluation=freed_evaluation,
                incident_id=incident.id if incident is not None else "",
            )
    if incident is not None:
        incidents.moved(core, incident)
    for job in list(core.jobs.values()):
        if worker.id in job.describing:
            terms.describing_worker_gone(core, job, worker.id)


def start_drain(core: Core, worker: Worker, reason: str) -> None:
    """Give a worker nothing new and move away what it has; it leaves when nothing is left."""
    if worker.state not in (*TAKES_WORK, WorkerView.STATE_QUARANTINED):
        return
    worker.state, worker.reason = WorkerView.STATE_DRAINING, reason
    _tell_of_worker(core, worker, _hosted_by(core, worker), "WORKER_DRAINING")
    for job in core.running():
        if worker.id in job.hosts:
            hosting.sync(core, job, cause="drain")
    finish_drain(core, worker)


def finish_drain(core: Core, worker: Worker) -> None:
    """Let a draining worker leave once it hosts nothing any more."""
    busy = any(worker.id in {**job.hosts, **job.describing} for job in core.jobs.values())
    if worker.state == WorkerView.STATE_DRAINING and not busy and not worker.released:
        worker.released = True
        core.send(worker.session, pb.SessionResponse(drain=pb.Drain()))


def _hosted_by(core: Core, worker: Worker) -> list[JobRuntime]:
    return [job for job in core.running() if worker.id in job.hosts]


def _tell_of_worker(
    core: Core, worker: Worker, jobs: list[JobRuntime], type_: str, **fields: object
) -> None:
    """Write one event for each job that the worker hosts, so that their watchers see it."""
    text = f"{worker.id}: {worker.reason}"
    for job_id in [job.job_id for job in jobs] or [""]:
        core.emit(type_, text, job_id=job_id, worker_id=worker.id, **fields)  # type: ignore[arg-type]


def _wrong_hello(
    core: Core, member_id: str, incarnation: str, generation: int
) -> PhalanxError | None:
    if not is_name(member_id) or not incarnation or len(incarnation) > 128:
        return InvalidArgument(f"{member_id[:80]!r} is no name of a member, or has no incarnation")
    if generation > core.generation:
        core.suspect_self(generation)
        return Unavailable(
            f"this control process has generation {core.generation}, the member knows {generation}",
            reason="STALE_GENERATION",
        )
    return None


def _replace_worker(core: Core, old: Worker, hello: pb.WorkerHello) -> None:
    """A worker is here again although its old session is still open."""
    core.sessions.pop(old.session, None)
    core.close(old.session, Aborted("another session of this worker was opened"))
    old.session = 0
    if _what_it_is(old.hello) != _what_it_is(hello):
        why = "it was started again, or has other libraries or GPUs"
        lose_worker(core, old, "worker_lost", why, core.now.monotonic_s)


def _what_it_is(hello: pb.WorkerHello) -> tuple[str, str, dict[str, str], list[str]]:
    libraries, gpus = dict(hello.libraries), list(hello.gpu_kinds)
    return hello.incarnation, hello.fingerprint, libraries, gpus


def _recall_drain(core: Core, worker: Worker) -> None:
    """A drain survives a control restart, but not a new start of the worker."""
    drained = core.facts.drains.get(worker.id)
    if drained == worker.hello.incarnation:
        worker.state, worker.reason = WorkerView.STATE_DRAINING, "asked to drain"
    elif drained is not None:
        _drain_done(core, worker)


def _drain_done(core: Core, worker: Worker) -> None:
    if worker.id in core.facts.drains:
        done = WorkerDrained(worker_id=worker.id, done=True)
        core.persist(ControlRecord(worker_drained=done))


def _forget_gone(core: Core) -> None:
    """Keep the newest of the workers that are gone, for people to look at."""
    gone = [worker for worker in core.workers.values() if not worker.connected]
    for worker in gone[: max(0, len(gone) - GONE_WORKERS_KEPT)]:
        del core.workers[worker.id]
        incidents.well(core, worker.id)


def _welcome(core: Core) -> pb.SessionResponse:
    return pb.SessionResponse(
        welcome=pb.Welcome(
            heartbeat_interval_s=core.config.heartbeat_interval_s * core.crowding(),
            lease_ttl_s=core.lease_ttl_s(),
            storage_address=core.config.storage_address,
            answers_heartbeats=True,
            history=core.history,
        )
    )


def _adopt(core: Core, worker: Worker) -> None:
    """Believe what a worker says it hosts, as far as the job still runs in that term."""
    held = {each.job_id: each for each in worker.hello.held_jobs}
    for each in held.values():
        job = core.jobs.get(each.job_id)
        facts = core.facts_of(job) if job is not None else None
        if job is not None and facts is not None and _has_other_leaf(worker, facts, each):
            quarantine.set_up_otherwise(core, job, worker, each.leaf_sha256)
        if job is None or facts is None or not _may_hold(job, facts, worker, each):
            revoke = pb.RevokeJob(
                job_id=each.job_id, term=each.term, reason="the job does not run here in this term"
            )
            core.send(worker.session, pb.SessionResponse(revoke_job=revoke))
            continue
        hosted = job.hosts[worker.id] = Hosting(
            term=each.term, ready=each.ready, since_s=core.now.monotonic_s
        )
        hosted.train = _claim(job.train, worker, each.train_nodes)
        hosted.evaluation = _claim(job.evaluation, worker, each.evaluation_nodes)
        job.placement = max(job.placement, each.placement)
    for job in core.running():
        if worker.id in job.hosts and job.job_id not in held:
            del job.hosts[worker.id]  # what it was told got lost on the way; it is told again


def _has_other_leaf(worker: Worker, facts: JobFacts, held: pb.HeldWorkerJob) -> bool:
    """One that tells none is either setting the job up, or it failed or is older, and stays."""
    if (held.job_id, held.term) in worker.foreign:
        return False
    return bool(facts.leaf_sha256 and held.leaf_sha256 not in ("", facts.leaf_sha256))


def _forget_leaves(core: Core, worker: Worker) -> None:
    """A new start of a worker may have other libraries: its leaves are compared anew."""
    for job in core.jobs.values():
        if job.other_leaves.pop(worker.id, None) is not None:
            job.told_ineligible.pop(worker.id, None)
        describing.forget(job, worker.id)


def _may_hold(job: JobRuntime, facts: JobFacts, worker: Worker, held: pb.HeldWorkerJob) -> bool:
    same_bits = not kinds.difference(kinds.of_plan(facts, facts.plan), worker.hello)
    if facts.leaf_sha256 and worker.id in job.other_leaves:
        same_bits = False
    if (held.job_id, held.term) in worker.foreign:
        return False
    takes_work = worker.state != WorkerView.STATE_QUARANTINED
    believed = facts.term == held.term and was_given(facts.seal_key, worker.id, held)
    return facts.state == RUNNING and believed and same_bits and takes_work


def _claim(tree: TreePlacement, worker: Worker, nodes: object) -> set[int]:
    """Give the worker the shards that it hosts, unless another one has them by now."""
    shards = shards_of(nodes, tree.width)  # type: ignore[arg-type]
    for shard in shards:
        tree.owners.setdefault(shard, worker.id)
    return shards


def _place_everything(core: Core, *, balance: bool = False) -> None:
    for job in core.running():
        hosting.sync(core, job, balance=balance)
    terms.advance_queue(core)


def _holds_current(core: Core, aggregator: Aggregator, held: pb.HeldRanges) -> bool:
    facts = core.facts.jobs.get(held.job_id)
    if facts is None or facts.state != RUNNING or facts.term != held.term:
        return False
    return any(each.aggregator_id == aggregator.id for each in facts.ranges)


def _check_owner(
    core: Core, job: JobRuntime, aggregator: Aggregator, held: pb.HeldRanges | None
) -> None:
    """See whether an aggregator that is back still holds its ranges of a running job."""
    if job.all_reduce:
        return
    facts = core.facts_of(job)
    mine = {each.index for each in facts.ranges if each.aggregator_id == aggregator.id}
    if not mine:
        return
    incarnation = aggregator.hello.incarnation
    if held is not None and held.term == facts.term and mine <= set(held.range_indexes):
        job.owner_incarnations[aggregator.id] = incarnation
        incidents.returned(core, [job.job_id])
        terms.command_pause(core, job)
        return
    told = job.owner_incarnations.get(aggregator.id) == incarnation
    if told and aggregator.id not in job.ready_aggregators:
        terms.assign_ranges(core, job, aggregator.id)  # it was told on the session that broke
        return
    if aggregator.id not in job.lost_owners:
        job.lost_owners.add(aggregator.id)
        tell_aggregator_lost(core, job, aggregator.id, "it came back without its ranges")


def tell_aggregator_lost(core: Core, job: JobRuntime, aggregator_id: str, why: str) -> None:
    """Open an incident for a job whose ranges have to be loaded again."""
    incident = incidents.detected(core, "aggregator_lost", aggregator_id, core.now.monotonic_s)
    incident.jobs[job.job_id] = job.step
    core.emit(
        "AGGREGATOR_LOST",
        f"{aggregator_id}: {why}; its ranges go back to the last checkpoint",
        job_id=job.job_id,
        incident_id=incident.id,
        step=job.step,
        details={"aggregator": aggregator_id},
    )


def _forgive_own_sleep(core: Core) -> None:
    """If no tick came for long, this process slept; members were not silent, we were deaf."""
    slept = core.now.monotonic_s - core.ticked_s if core.ticked_s is not None else 0.0
    if slept > core.lease_ttl_s() * SUSPECTED_AFTER:
        for member in core.sessions.values():
            member.heard_s = min(member.heard_s + slept, core.now.monotonic_s)


def _suspect(core: Core) -> None:
    now = core.now.monotonic_s
    for member in core.sessions.values():
        if now - member.heard_s < core.lease_of(member) * SUSPECTED_AFTER:
            continue
        if isinstance(member, Aggregator):
            member.suspected = True
        elif member.state == WorkerView.STATE_READY:
            member.state = WorkerView.STATE_SUSPECTED
            member.reason = f"not heard of for {now - member.heard_s:.1f} s"
            _tell_of_worker(
                core,
                member,
                _hosted_by(core, member),
                "WORKER_SUSPECTED",
                incident_id=incidents.suspected(core, member.id),
            )


def _declare_lost(core: Core, member: Worker | Aggregator) -> None:
    session, silence = member.session, core.now.monotonic_s - member.heard_s
    core.sessions.pop(session, None)
    member.session = 0
    why = f"no heartbeat for {silence:.1f} s"
    core.close(
        session, FailedPrecondition(f"{member.id} counts as lost: {why}", reason="LEASE_EXPIRED")
    )
    if isinstance(member, Worker):
        lose_worker(core, member, "worker_silent", why, member.heard_s)
