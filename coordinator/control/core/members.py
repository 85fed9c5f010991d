"""Members of an all-reduce job: the workers that own its parameters and reduce among themselves.

Each member owns a range of the parameters and hosts shards, both fixed for a term, so whoever
joins, leaves or dies makes a new term. A worker that is no member yet only prepares, and becomes
one once it is ready. A member that dies takes nothing with it, since all hold everything.

Members own blocks as evenly as they can be shared; with more members than blocks the last own empty
ranges. The host of shard 0 is the root.
"""

from __future__ import annotations

from coordinator.control.core import balancing, kinds, placement
from coordinator.control.core.eligibility import choose_hosts, group_of
from coordinator.control.core.ownership import Owners
from coordinator.control.core.state import Core, JobRuntime, Worker
from phalanx.frames import BLOCK_ELEMENTS, split_ranges
from phalanx.v1.training_pb2 import JobPlan, ParameterRange


def current(core: Core, job: JobRuntime) -> list[str]:
    """Return the members of the term, that of range 0 first."""
    return [each.aggregator_id for each in core.facts_of(job).ranges]


def have_changed(core: Core, job: JobRuntime) -> bool:
    """Whether a running job needs other members: one is gone, there would be more of them, or
    their shards are to be placed by measured speed.

    Not every worker gets shards where there are few, and a term that only put one in the place of
    another would be followed by the next.
    """
    facts = core.facts_of(job)
    wanted = set(_placed(core, job, facts.plan).values())
    members = current(core, job)
    if not wanted or job.lost_owners & set(members):
        return bool(wanted)
    able = _able(core, job, facts.plan)
    gone = any(each not in able or not takes_part(core, job, each) for each in members)
    return gone or len(wanted) > len(members) or job.leveling.due is not None


def may_be_chosen(core: Core, job: JobRuntime) -> bool:
    """Whether there is a worker that may be a member."""
    return bool(_placed(core, job, core.facts_of(job).plan))


def choose(core: Core, job: JobRuntime, plan: JobPlan) -> Owners | None:
    """Place the shards for a new term and return their hosts' ranges; None: there is nobody."""
    owners = _placed(core, job, plan)
    if not owners:
        return None
    due, job.leveling.due, job.leveling.why = job.leveling.due, None, ""
    if due is not None and set(due.owners.values()) == set(owners.values()):
        owners, job.leveling.why = due.owners, due.reason
    else:
        owners = balancing.leveled(core, job, owners)
    members = list(dict.fromkeys(owners[shard] for shard in sorted(owners)))
    slots = {member: core.workers[member].slots for member in members}
    job.train.owners = owners
    job.evaluation.owners = placement.place_first(job.evaluation.width, slots).owners
    job.train.keepers.clear()
    job.evaluation.keepers.clear()
    plan.range_count = len(members)
    return Owners(tuple(_ranges(core, plan.layout.element_count, members)), "")


def _placed(core: Core, job: JobRuntime, plan: JobPlan) -> placement.Owners:
    """Where the shards would be in a term that began now: with members that are there and whoever
    is ready, or, if none of either is, with all that may host the job."""
    able = _able(core, job, plan)
    members = [
        key
        for key in current(core, job)
        if key in able and takes_part(core, job, key) and key not in job.lost_owners
    ]
    ready = [key for key in able if key in job.hosts and job.hosts[key].ready]
    chosen = list(dict.fromkeys((*members, *ready))) or list(able)
    slots = {key: able[key].slots for key in chosen}
    return placement.place_members(job.train.width, slots, job.train.unit)


def _able(core: Core, job: JobRuntime, plan: JobPlan) -> dict[str, Worker]:
    """Workers that may be members: they give the same bits."""
    hosts = choose_hosts(core, job, group_of(core, job))
    kind = kinds.of_plan(core.facts_of(job), plan)
    return {
        key: worker for key, worker in hosts.items() if not kinds.difference(kind, worker.hello)
    }


def takes_part(core: Core, job: JobRuntime, worker_id: str) -> bool:
    """Whether a member of the term is there as what it was: one that was started again is not."""
    hosting = job.hosts.get(worker_id)
    return hosting is not None and hosting.term == core.facts_of(job).term and bool(hosting.train)


def _ranges(core: Core, element_count: int, members: list[str]) -> list[ParameterRange]:
    blocks = -(-element_count // BLOCK_ELEMENTS)
    cuts = split_ranges(element_count, min(blocks, len(members)))
    cuts += [(element_count, 0)] * (len(members) - len(cuts))
    return [
        ParameterRange(
            index=index,
            first_element=first,
            element_count=count,
            aggregator_id=member,
            address=core.workers[member].hello.address,
        )
        for index, (member, (first, count)) in enumerate(zip(members, cuts, strict=True))
    ]
