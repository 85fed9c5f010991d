"""What must be true after every event; tests and the simulator call `check` each time."""

from __future__ import annotations

from coordinator.control.core.eligibility import TAKES_WORK, choose_hosts, group_of
from coordinator.control.core.lifecycle import ENDED, PAUSED, QUEUED, RUNNING
from coordinator.control.core.state import Aggregator, Core, JobRuntime, TreePlacement, Worker
from coordinator.control.core.tree import nodes_of, shards_of
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


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantBroken(message)


def _sessions(core: Core) -> None:
    members: list[Worker | Aggregator] = [*core.workers.values(), *core.aggregators.values()]
    for member in members:
        if member.connected:
            _demand(core.sessions.get(member.session) is member, f"{member.id}: foreign session")
    for session, member in core.sessions.items():
        _demand(member.session == session, f"session {session} leads to {member.id}, which left it")
    for worker in core.workers.values():
        gone = worker.state in (WorkerView.STATE_LOST, WorkerView.STATE_LEFT)
        _demand(
            gone != worker.connected, f"{worker.id} is {worker.state} with a session or without"
        )


def _jobs(core: Core) -> None:
    for job_id, facts in core.facts.jobs.items():
        _demand(
            (job_id in core.jobs) == (facts.state not in ENDED),
            f"{job_id}: runtime of an ended job",
        )
        pausing = facts.kept.changed.pause_requested
        _demand(not pausing or facts.state == RUNNING, f"{job_id} wants to pause but does not run")
        _demand(facts.state != RUNNING or facts.term > 0, f"{job_id} runs without a term")
    for job in core.jobs.values():
        _demand(job.job_id in core.facts.jobs, f"{job.job_id} has no facts")
        facts = core.facts_of(job)
        _demand(job.storage_term >= facts.term, f"{job.job_id}: term {facts.term} was never raised")
        if facts.state in (QUEUED, PAUSED):
            _demand(not job.hosts, f"{job.job_id} is hosted and does not run")


def _ranges(core: Core, job: JobRuntime) -> None:
    facts = core.facts_of(job)
    first = 0
    for index, each in enumerate(facts.ranges):
        _demand(each.index == index and each.first_element == first, f"{job.job_id}: gap in ranges")
        _demand(bool(each.aggregator_id and each.address), f"{job.job_id}: range without owner")
        first += each.element_count
    _demand(
        first == facts.plan.layout.element_count, f"{job.job_id}: ranges are not the whole vector"
    )
    _demand(len(facts.ranges) == facts.plan.range_count, f"{job.job_id}: number of ranges changed")


def _hosts(core: Core, job: JobRuntime) -> None:
    facts = core.facts_of(job)
    for worker_id, hosting in job.hosts.items():
        worker = core.workers.get(worker_id)
        if worker is None or not worker.connected:
            raise InvariantBroken(f"{job.job_id} is hosted by {worker_id}, which is gone")
        _demand(hosting.term <= facts.term, f"{worker_id} was told a term that does not exist")
        if facts.plan.bitwise and worker.state in TAKES_WORK:
            same = worker.hello.fingerprint == facts.fingerprint
            _demand(same, f"{worker_id} hosts {job.job_id} with other bits")
        for told, tree in ((hosting.train, job.train), (hosting.evaluation, job.evaluation)):
            nodes = nodes_of(told, tree.width)
            _demand(shards_of(nodes, tree.width) == told, f"{worker_id}: nodes are not its shards")


def _tree(job: JobRuntime, tree: TreePlacement) -> None:
    for shard, owner in [*tree.owners.items(), *tree.keepers.items()]:
        _demand(0 <= shard < tree.width, f"{job.job_id}: shard {shard} does not exist")
        _demand(
            owner in job.hosts, f"{job.job_id}: shard {shard} is at {owner}, which hosts nothing"
        )


def _coverage(core: Core, job: JobRuntime) -> None:
    """Every shard has a host that was told so, unless nobody is there or somebody may be back."""
    if core.facts_of(job).resuming or job.adopt_until_s > 0 or job.ending is not None:
        return
    if not choose_hosts(core, job, group_of(core, job)):
        return
    for tree, name in ((job.train, "train"), (job.evaluation, "evaluation")):
        missing = set(range(tree.width)) - set(tree.owners)
        _demand(not missing, f"{job.job_id}: nobody hosts {name} shards {sorted(missing)}")
    for shard, owner in job.train.owners.items():
        _demand(shard in job.hosts[owner].train, f"{owner} was not told of train shard {shard}")
    for shard, owner in job.evaluation.owners.items():
        _demand(shard in job.hosts[owner].evaluation, f"{owner} was not told of shard {shard}")


def _incidents(core: Core) -> None:
    for incident in core.incidents.values():
        for job_id in incident.jobs:
            facts = core.facts.jobs.get(job_id)
            running = facts is not None and facts.state == RUNNING
            _demand(running, f"{incident.id} waits for {job_id}, which does not run")
        member = core.workers.get(incident.member_id)
        _demand(
            not isinstance(member, Worker) or bool(incident.jobs), f"{incident.id} is about nothing"
        )
