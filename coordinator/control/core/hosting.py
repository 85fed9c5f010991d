"""Keeping the shards of a running job on workers: who hosts, who gets what, who lets go.

`sync` compares what should be with what each worker was last told and sends the difference; it may
be called at any time. Shards move make-before-break: the old host keeps a shard until the new one
works.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.control.core import balancing, incidents, members, placement, told
from coordinator.control.core.eligibility import (
    announce_ineligible,
    choose_hosts,
    explain_waiting,
    group_of,
)
from coordinator.control.core.lifecycle import RUNNING
from coordinator.control.core.state import Core, Hosting, JobRuntime, TreePlacement, Worker
from coordinator.control.core.tree import nodes_of
from phalanx.given import sealed
from phalanx.privacy.secret import sampler_key
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.training_pb2 import GivenNodes, JobPlan


@dataclass(frozen=True)
class _Wish:
    """What a caller wants of the placement of one tree."""

    freed: frozenset[int]
    avoided: frozenset[str]
    balance: bool


@dataclass(frozen=True)
class _Moves:
    """Workers that got shards of one tree: those that nobody hosted, and those of slower hosts."""

    placed: list[str]
    balanced: list[str]


SET_ASIDE_LEASES, SET_ASIDE_LEASES_MAX = 1, 8
"""Leases for which a worker that delivered nothing hosts nothing of the job: the first time, and
at most, since they double as long as it is the same again soon after."""

HAD_MAX = 4
"""Former hosts of a shard that are remembered."""

WAITS = frozenset(("WAITING_FOR_WORKERS", "WAITING_FOR_FINGERPRINT"))


def sync(
    core: Core,
    job: JobRuntime,
    *,
    cause: str = "",
    freed: Iterable[int] = (),
    freed_evaluation: Iterable[int] = (),
    avoided: frozenset[str] = frozenset(),
    incident_id: str = "",
    balance: bool = False,
) -> None:
    """Bring the placement of a running job in line with the workers that are there.

    `freed` are shards known to have no host any more (others may still be claimed by a worker that
    has not reconnected after a take-over); workers in `avoided` get them only if there is no other.
    `cause` names the re-dispatch in metrics and events.
    """
    facts = core.facts_of(job)
    if facts.state != RUNNING or facts.resuming or job.ending is not None:
        return
    group = group_of(core, job)
    announce_ineligible(core, job, group)
    hosts = choose_hosts(core, job, group)
    _wait_or_not(core, job, bool(hosts))
    if job.all_reduce:
        _sync_members(core, job, hosts)
        return
    train = _place(core, job, job.train, hosts, _Wish(frozenset(freed), avoided, balance))
    wish = _Wish(frozenset(freed_evaluation), avoided, balance)
    evaluation = _place(core, job, job.evaluation, hosts, wish)
    _send_differences(core, job, hosts)
    _revoke_strangers(core, job, hosts)
    if cause and (train.placed or evaluation.placed):
        core.observe("redispatches_total", len(train.placed) + len(evaluation.placed), cause=cause)
        _tell(core, job, train.placed, evaluation.placed, cause, incident_id)
    if train.balanced or evaluation.balanced:
        _tell(core, job, train.balanced, evaluation.balanced, "balance", "")


def level(core: Core, job: JobRuntime) -> None:
    """Move shards to where they are computed sooner, if that has been clear for a while."""
    facts = core.facts_of(job)
    if facts.resuming or job.ending is not None or core.now.monotonic_s < job.adopt_until_s:
        return
    found = balancing.decide(core, job) if balancing.watch(core, job) else None
    if found is None:
        return
    if job.all_reduce:
        job.leveling.due = found.train.placement  # shards stay where they are for a term
        return
    train = _take_over(core, job, job.train, found.train.placement)
    evaluation = _take_over(core, job, job.evaluation, found.evaluation.placement)
    # Whoever takes over works on the job already, so one step less is waited for. As long as the
    # old host keeps its shards it computes all of them, those first that others have by now.
    job.keep_step -= 1
    _send_differences(core, job, {key: core.workers[key] for key in job.hosts})
    _tell(core, job, train, evaluation, "speed", "", found.train.placement.reason)


def set_aside(core: Core, job: JobRuntime, worker_id: str, late_s: float) -> None:
    """Move the shards of a worker that lives and delivers nothing: it hangs, or its line does."""
    if worker_id in job.set_aside or worker_id not in job.hosts:
        return
    leases, until_s = job.set_aside_before.get(worker_id, (0, 0.0))
    if core.now.monotonic_s >= until_s:
        leases = 0
    leases = min(2 * leases, SET_ASIDE_LEASES_MAX) or SET_ASIDE_LEASES
    over_s = core.now.monotonic_s + leases * core.lease_ttl_s()
    job.set_aside[worker_id] = over_s
    # Whoever keeps well for so long begins anew.
    job.set_aside_before[worker_id] = leases, over_s + SET_ASIDE_LEASES_MAX * core.lease_ttl_s()
    incident = incidents.detected(core, "hang", worker_id, core.now.monotonic_s - late_s)
    incident.jobs[job.job_id] = job.step
    core.emit(
        "WORKER_SUSPECTED",
        f"{worker_id} delivers nothing for {late_s:.1f} s although its heartbeats go on",
        job_id=job.job_id,
        worker_id=worker_id,
        incident_id=incident.id,
        step=job.step,
        details={"cause": "hang", "late_s": f"{late_s:.3f}"},
    )
    sync(core, job, cause="hang", incident_id=incident.id)
    incidents.moved(core, incident)


def leave_out(core: Core, job: JobRuntime, worker_id: str, leaf_sha256: str) -> None:
    """Take the job from a worker whose own leaf has other bits than the one it began with.

    It has computed nothing of the job, so it keeps nothing until others take over.
    """
    job.other_leaves[worker_id] = told.name(leaf_sha256)
    why = "the worker gives other bits in this job"
    take_away(core, job, worker_id, why, "fingerprint")


def take_away(core: Core, job: JobRuntime, worker_id: str, why: str, cause: str) -> None:
    """Take the job at once from a worker whose results do not count."""
    hosting = job.hosts.pop(worker_id, None)
    if hosting is None:
        return
    revoke(core, job, worker_id, hosting.term, why, job.term_after)
    freed, freed_evaluation = job.train.forget(worker_id), job.evaluation.forget(worker_id)
    sync(core, job, cause=cause, freed=freed, freed_evaluation=freed_evaluation)


def end_set_aside(core: Core, job: JobRuntime) -> None:
    """Try again, after a while, those that delivered nothing."""
    over = [key for key, until_s in job.set_aside.items() if core.now.monotonic_s >= until_s]
    for worker_id in over:
        del job.set_aside[worker_id]
        incidents.well(core, worker_id)
        if worker_id in job.hosts:  # it still kept shards for others
            job.hosts[worker_id].since_s = core.now.monotonic_s
    if over:
        sync(core, job, balance=True)


def job_plan(core: Core, job: JobRuntime) -> JobPlan:
    """Return the plan as members get it: with the spec, which the journal keeps only once, and in
    private jobs with what rows are drawn by."""
    facts = core.facts_of(job)
    plan = JobPlan()
    plan.CopyFrom(facts.plan)
    plan.spec = facts.spec.SerializeToString(deterministic=True)
    secret = facts.kept.submitted.secret
    if secret:
        plan.sampler_key = sampler_key(secret)
    return plan


def release_keepers(core: Core, job: JobRuntime) -> None:
    """Let old hosts go once their successors have worked through a step, or a lease has passed."""
    if not job.train.keepers and not job.evaluation.keepers:
        return
    if job.step >= job.keep_step + 2 or core.now.monotonic_s >= job.keep_until_s:
        job.train.keepers.clear()
        job.evaluation.keepers.clear()
        sync(core, job)


def revoke(core: Core, job: JobRuntime, worker_id: str, term: int, reason: str, after: int) -> None:
    """Tell a worker to let the job go."""
    worker = core.workers.get(worker_id)
    if worker is not None and worker.connected:
        message = pb.SessionResponse(
            revoke_job=pb.RevokeJob(job_id=job.job_id, term=term, reason=reason)
        )
        core.send(worker.session, message, after)


def resend(core: Core, job: JobRuntime, worker_id: str) -> None:
    """Tell a worker its nodes again under a new placement: it computes the open round anew."""
    hosting, worker = job.hosts.get(worker_id), core.workers.get(worker_id)
    if hosting is not None and worker is not None:
        job.placement += 1
        _send(core, job, worker, hosting)


def _wait_or_not(core: Core, job: JobRuntime, hosted: bool) -> None:
    if hosted and job.reason in WAITS:
        core.set_reason(job, "")
    elif not hosted and core.now.monotonic_s >= job.adopt_until_s:
        core.set_reason(job, *explain_waiting(core, job, group_of(core, job)))


def _place(
    core: Core, job: JobRuntime, tree: TreePlacement, hosts: dict[str, Worker], wish: _Wish
) -> _Moves:
    """Place one tree: first what nobody hosts, then, if wished, more evenly."""
    staying = balancing.weights(core, job, hosts.values())
    ready = {key: staying[key] for key in staying if key in job.hosts and job.hosts[key].ready}
    adopting = core.now.monotonic_s < job.adopt_until_s
    _hand_over(core, job, tree, staying)
    orphans = set(range(tree.width)) - set(tree.owners)
    if adopting:
        orphans &= wish.freed
    takers = ready or staying
    if len(orphans) == tree.width and not tree.keepers and not wish.avoided:
        result = placement.place_first(tree.width, staying, tree.unit)
    else:
        avoided = dict.fromkeys(wish.freed, wish.avoided)
        result = placement.place_orphans(
            tree.owners, orphans, tree.width, takers, tree.keepers, avoided, tree.unit
        )
    tree.owners = result.owners
    placed = [result.owners[shard] for shard in sorted(result.moved)]
    balanced = []
    if wish.balance and not adopting and not placed:
        balanced = _balance(core, job, tree, staying, takers)
    return _Moves(placed, balanced)


def _sync_members(core: Core, job: JobRuntime, hosts: dict[str, Worker]) -> None:
    """Shards stay where the term has placed them; whoever else may host the job prepares for it.

    A member that is to leave keeps what it has until a new term begins. If there will be none, as
    nobody else is there or may be about to come back, it lets go of it; but where the members are
    to pause the job, and can, only then: a pause loses nothing.
    """
    staying = dict(hosts)
    others = bool(hosts) or core.now.monotonic_s < job.adopt_until_s or _pauses(core, job)
    for worker_id in sorted(set(members.current(core, job)) & job.hosts.keys()):
        worker = core.workers[worker_id]
        if others or worker.state != WorkerView.STATE_DRAINING:
            staying[worker_id] = worker
        else:
            job.train.forget(worker_id)
            job.evaluation.forget(worker_id)
    _send_differences(core, job, staying)
    _revoke_strangers(core, job, staying)


def _pauses(core: Core, job: JobRuntime) -> bool:
    """Whether all members are there to take the checkpoint of a pause that was asked for."""
    return core.facts_of(job).kept.changed.pause_requested and all(
        members.takes_part(core, job, each) and core.workers[each].connected
        for each in members.current(core, job)
    )


def _hand_over(core: Core, job: JobRuntime, tree: TreePlacement, staying: dict[str, float]) -> None:
    """Free the shards of workers that may not host any more; one that lives keeps them for now."""
    for shard, owner in list(tree.owners.items()):
        if owner in staying:
            continue
        del tree.owners[shard]
        if staying and core.workers[owner].connected and owner in job.hosts:
            tree.keepers[shard] = owner
            _keep(core, job)
    if not staying:
        tree.keepers.clear()


def _balance(
    core: Core,
    job: JobRuntime,
    tree: TreePlacement,
    staying: dict[str, float],
    takers: dict[str, float],
) -> list[str]:
    result = placement.rebalance(tree.owners, tree.width, staying, takers, tree.unit)
    return _take_over(core, job, tree, result)


def _take_over(
    core: Core, job: JobRuntime, tree: TreePlacement, result: placement.Placement
) -> list[str]:
    """Move shards between hosts: the old ones keep them until the new ones work."""
    for shard in result.moved:
        tree.keepers[shard] = tree.owners[shard]
    if result.moved:
        _keep(core, job)
    tree.owners = result.owners
    return [result.owners[shard] for shard in sorted(result.moved)]


def _keep(core: Core, job: JobRuntime) -> None:
    job.keep_step = job.step
    job.keep_until_s = core.now.monotonic_s + core.lease_ttl_s()


def _send_differences(core: Core, job: JobRuntime, hosts: dict[str, Worker]) -> None:
    """Tell every host whose shards, or term, differ from what it was last told; takers first."""
    term = core.facts_of(job).term
    changed: list[tuple[bool, Worker, Hosting]] = []
    train_held, evaluation_held = job.train.held(), job.evaluation.held()
    for worker_id in {**hosts, **_keeping(core, job)}:
        train = train_held.get(worker_id, set())
        evaluation = evaluation_held.get(worker_id, set())
        hosting = job.hosts.get(worker_id)
        if hosting is None:
            hosting = job.hosts[worker_id] = Hosting(term=0)
        if (hosting.term, hosting.train, hosting.evaluation) == (term, train, evaluation):
            continue
        for shard in train - hosting.train:
            others = (each for each in job.had.get(shard, ()) if each != worker_id)
            job.had[shard] = (worker_id, *others)[:HAD_MAX]
        gains = bool(train - hosting.train)
        hosting.term, hosting.train, hosting.evaluation = term, train, evaluation
        changed.append((not gains, core.workers[worker_id], hosting))
    if changed:
        job.placement += 1
    for _, worker, hosting in sorted(changed, key=lambda each: (each[0], each[1].id)):
        _send(core, job, worker, hosting)


def _keeping(core: Core, job: JobRuntime) -> dict[str, Worker]:
    keepers = {*job.train.keepers.values(), *job.evaluation.keepers.values()}
    return {key: core.workers[key] for key in sorted(keepers) if core.workers[key].connected}


def _send(core: Core, job: JobRuntime, worker: Worker, hosting: Hosting) -> None:
    facts = core.facts_of(job)
    assign = pb.AssignJob(
        plan=job_plan(core, job),
        term=hosting.term,
        ranges=facts.ranges,
        placement=job.placement,
        train_nodes=nodes_of(hosting.train, job.train.width),
        evaluation_nodes=nodes_of(hosting.evaluation, job.evaluation.width),
        leaf_sha256=facts.leaf_sha256,
    )
    given = GivenNodes(
        job_id=job.job_id,
        term=hosting.term,
        worker_id=worker.id,
        train_nodes=assign.train_nodes,
        evaluation_nodes=assign.evaluation_nodes,
    )
    shown = sealed(facts.seal_key, given)
    if shown is not None:
        assign.given.CopyFrom(shown)
    if job.all_reduce:
        if any(each.aggregator_id == worker.id for each in facts.ranges):
            assign.seal_key = facts.seal_key  # one that only prepares is no member yet
        assign.reached_step = job.step
        if job.restore is not None:
            assign.restore.CopyFrom(job.restore)
    core.send(worker.session, pb.SessionResponse(assign_job=assign), job.term_after)


def _revoke_strangers(core: Core, job: JobRuntime, hosts: dict[str, Worker]) -> None:
    """Let go of workers that host the job and neither should nor keep anything for others."""
    keeping = _keeping(core, job)
    for worker_id in list(job.hosts):
        if worker_id not in hosts and worker_id not in keeping:
            hosting = job.hosts.pop(worker_id)
            why = "the worker does not host this job"
            # Never before what it was told of this term, which may still wait to be durable.
            revoke(core, job, worker_id, hosting.term, why, job.term_after)


def _tell(
    core: Core,
    job: JobRuntime,
    train: list[str],
    evaluation: list[str],
    cause: str,
    incident_id: str,
    why: str = "",
) -> None:
    takers = ", ".join(sorted({*train, *evaluation}))
    also = f" and {number_of(len(evaluation), 'evaluation shard')}" if evaluation else ""
    core.emit(
        "SHARDS_MOVED",
        f"{number_of(len(train), 'shard')}{also} moved to {takers}" + (why and f": {why}"),
        job_id=job.job_id,
        after=job.term_after,
        incident_id=incident_id,
        step=job.step,
        details={
            "shards": len(train),
            "evaluation_shards": len(evaluation),
            "workers": takers,
            "cause": cause,
        },
    )
