"""What must be true after every event; tests and the simulator call `check` each time."""

from __future__ import annotations

from functools import lru_cache

from coordinator.control.core import kinds
from coordinator.control.core.eligibility import TAKES_WORK, choose_hosts, group_of
from coordinator.control.core.lifecycle import ENDED, PAUSED, QUEUED, RUNNING
from coordinator.control.core.members import have_changed
from coordinator.control.core.state import Aggregator, Core, JobRuntime, TreePlacement, Worker
from coordinator.control.core.tree import cover, runs
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView


class InvariantBroken(AssertionError):
    """Control is in a state that must not exist."""


def check(core: Core) -> None:
    """Raise InvariantBroken for the first invariant that does not hold."""
    _sessions(core)
    _jobs(core)
    for job in core.running():
        _ranges(core, job)
        if core.facts_of(job).term > 0:
            _hosts(core, job)
            _tree(job, job.train)
            _tree(job, job.evaluation)
            _coverage(core, job)
    _incidents(core)


def _sessions(core: Core) -> None:
    members: list[Worker | Aggregator] = [*core.workers.values(), *core.aggregators.values()]
    for member in members:
        if member.connected and core.sessions.get(member.session) is not member:
            raise InvariantBroken(f"{member.id}: foreign session")
    for session, member in core.sessions.items():
        if member.session != session:
            raise InvariantBroken(f"session {session} leads to {member.id}, which left it")
    for worker in core.workers.values():
        gone = worker.state in (WorkerView.STATE_LOST, WorkerView.STATE_LEFT)
        if gone == worker.connected:
            raise InvariantBroken(f"{worker.id} is {worker.state} with a session or without")


def _jobs(core: Core) -> None:
    for job_id, facts in core.facts.jobs.items():
        state = facts.state
        if (job_id in core.jobs) != (state not in ENDED):
            raise InvariantBroken(f"{job_id}: runtime of an ended job")
        if facts.kept.changed.pause_requested and state != RUNNING:
            raise InvariantBroken(f"{job_id} wants to pause but does not run")
        if state == RUNNING and facts.term <= 0:
            raise InvariantBroken(f"{job_id} runs without a term")
    for job in core.jobs.values():
        if job.job_id not in core.facts.jobs:
            raise InvariantBroken(f"{job.job_id} has no facts")
        facts = core.facts_of(job)
        if job.storage_term < facts.term:
            raise InvariantBroken(f"{job.job_id}: term {facts.term} was never raised")
        if job.hosts and facts.state in (QUEUED, PAUSED):
            raise InvariantBroken(f"{job.job_id} is hosted and does not run")


def _ranges(core: Core, job: JobRuntime) -> None:
    facts = core.facts_of(job)
    first, ranges = 0, facts.kept.term_started.ranges
    for index, each in enumerate(ranges):
        if each.index != index or each.first_element != first:
            raise InvariantBroken(f"{job.job_id}: gap in ranges")
        if not each.aggregator_id or not each.address:
            raise InvariantBroken(f"{job.job_id}: range without owner")
        first += each.element_count
    if first != facts.plan.layout.element_count:
        raise InvariantBroken(f"{job.job_id}: ranges are not the whole vector")
    if len(ranges) != facts.plan.range_count:
        raise InvariantBroken(f"{job.job_id}: number of ranges changed")


def _hosts(core: Core, job: JobRuntime) -> None:
    facts = core.facts_of(job)
    kind, term = kinds.of_plan(facts, facts.plan), facts.term
    for worker_id, hosting in job.hosts.items():
        worker = core.workers.get(worker_id)
        if worker is None or not worker.connected:
            raise InvariantBroken(f"{job.job_id} is hosted by {worker_id}, which is gone")
        if worker.state == WorkerView.STATE_QUARANTINED:
            raise InvariantBroken(f"{job.job_id} is hosted by {worker_id}, which is quarantined")
        if hosting.term > term:
            raise InvariantBroken(f"{worker_id} was told a term that does not exist")
        if worker.state in TAKES_WORK and kinds.difference(kind, worker.hello):
            raise InvariantBroken(f"{worker_id} hosts {job.job_id} with other bits")
        if not (
            _made_of_nodes(hosting.train, job.train.width)
            and _made_of_nodes(hosting.evaluation, job.evaluation.width)
        ):
            raise InvariantBroken(f"{worker_id}: nodes are not its shards")


def _made_of_nodes(told: set[int], width: int) -> bool:
    """Whether the nodes that a worker was told have exactly these shards below them."""
    return _nodes_hold(frozenset(told), width)  # few sets, looked at after every event


@lru_cache(maxsize=4096)
def _nodes_hold(told: frozenset[int], width: int) -> bool:
    below = [
        shard
        for run in runs(told)
        for first, span in cover(*run, width)
        for shard in range(first, min(first + span, width))
    ]
    return below == sorted(told)


def _tree(job: JobRuntime, tree: TreePlacement) -> None:
    hosts, width = job.hosts, tree.width
    for placed in (tree.owners, tree.keepers):
        for shard, owner in placed.items():
            if not 0 <= shard < width:
                raise InvariantBroken(f"{job.job_id}: shard {shard} does not exist")
            if owner not in hosts:
                raise InvariantBroken(
                    f"{job.job_id}: shard {shard} is at {owner}, which hosts nothing"
                )


def _coverage(core: Core, job: JobRuntime) -> None:
    """Every shard has a host that was told so, unless nobody is there or somebody may be back."""
    if core.facts_of(job).resuming or job.adopt_until_s > 0 or job.ending is not None:
        return
    if job.all_reduce and have_changed(core, job):
        return  # a new term is on its way
    hosts = job.hosts
    for shard, owner in job.train.owners.items():
        if shard not in hosts[owner].train:
            raise InvariantBroken(f"{owner} was not told of train shard {shard}")
    for shard, owner in job.evaluation.owners.items():
        if shard not in hosts[owner].evaluation:
            raise InvariantBroken(f"{owner} was not told of shard {shard}")
    for tree, name in ((job.train, "train"), (job.evaluation, "evaluation")):
        if len(tree.owners) == tree.width:
            continue  # every shard exists, see `_tree`
        missing = sorted(set(range(tree.width)) - set(tree.owners))
        if missing and choose_hosts(core, job, group_of(core, job)):
            raise InvariantBroken(f"{job.job_id}: nobody hosts {name} shards {missing}")


def _incidents(core: Core) -> None:
    for incident in core.incidents.values():
        for job_id in incident.jobs:
            facts = core.facts.jobs.get(job_id)
            if facts is None or facts.state != RUNNING:
                raise InvariantBroken(f"{incident.id} waits for {job_id}, which does not run")
        if not incident.jobs and isinstance(core.workers.get(incident.member_id), Worker):
            raise InvariantBroken(f"{incident.id} is about nothing")
