"""Which aggregators own a job's ranges, and when an owner counts as lost: a last resort."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.control.core.state import Aggregator, Core, JobRuntime
from phalanx.frames import BLOCK_ELEMENTS, split_ranges
from phalanx.layouts import size_bytes
from phalanx.specs.parts import needs_one_range
from phalanx.v1.control_journal_pb2 import ControlRecord, FingerprintChanged
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan, ParameterRange

_NO_AGGREGATOR = ("WAITING_FOR_AGGREGATORS", "no aggregator is there to own its ranges")
_NO_FINGERPRINT = (
    "WAITING_FOR_FINGERPRINT",
    (
        "no aggregator gives the bits that the job started with "
        "(set reproducibility.bitwise.fall_back_after to go on with others)"
    ),
)


@dataclass(frozen=True)
class Owners:
    """The ranges of a term with their owners, who all have one numeric fingerprint."""

    ranges: tuple[ParameterRange, ...]
    fingerprint: str


def live_aggregators(core: Core) -> list[Aggregator]:
    """Return the aggregators that can be given ranges, by name."""
    return [
        each
        for _, each in sorted(core.aggregators.items())
        if each.connected and not each.suspected
    ]


def lost_owners(core: Core, job: JobRuntime) -> set[str]:
    """Return the owners that hold nothing for certain, or are silent and taken for dead.

    That takes a lease of silence, no worker that reports progress with them, and no take-over just
    before. Where workers own the ranges, `members` says when they need others.
    """
    if job.all_reduce:
        return set()
    owners = {each.aggregator_id for each in core.facts_of(job).ranges}
    return {owner for owner in owners if owner in job.lost_owners or _silent(core, job, owner)}


def may_be_owned(core: Core, job: JobRuntime) -> bool:
    """Whether an aggregator is there that may own the job's ranges; sets the reason if not.

    Asked before a term is raised, so that waiting costs storage nothing.
    """
    facts, candidates = core.facts_of(job), live_aggregators(core)
    if not candidates:
        core.set_reason(job, *_NO_AGGREGATOR)
        return False
    fingerprint = facts.aggregator_fingerprint
    same = any(each.hello.fingerprint == fingerprint for each in candidates)
    if facts.plan.bitwise and fingerprint and not same and not job.owners_may_differ:
        core.set_reason(job, *_NO_FINGERPRINT)
        return False
    return True


def choose_owners(core: Core, job: JobRuntime, plan: JobPlan) -> Owners | None:
    """Return the ranges of a new term; None (with the reason set) if no aggregator may own them.

    The number of ranges is fixed with the first term. Owners that are there keep what they have.
    """
    facts = core.facts_of(job)
    candidates = live_aggregators(core)
    fingerprint = facts.aggregator_fingerprint
    if plan.bitwise and candidates:
        fingerprint = fingerprint or _commonest(candidates)
        same = [each for each in candidates if each.hello.fingerprint == fingerprint]
        if not same and job.owners_may_differ:
            fingerprint = _fall_back(core, job, plan, candidates)
            same = [each for each in candidates if each.hello.fingerprint == fingerprint]
        if not same:
            core.set_reason(job, *_NO_FINGERPRINT)
            return None
        candidates = same
    if not candidates:
        core.set_reason(job, *_NO_AGGREGATOR)
        return None
    job.owners_may_differ = False
    count = plan.range_count or _range_count(core, plan, core.facts_of(job).spec, len(candidates))
    plan.range_count = count
    return Owners(tuple(_distribute(core, job, plan, candidates)), fingerprint)


def _silent(core: Core, job: JobRuntime, owner: str) -> bool:
    now, aggregator = core.now.monotonic_s, core.aggregators.get(owner)
    patience = core.patience_with(aggregator)
    heard_s = aggregator.heard_s if aggregator is not None else core.led_s
    if now - max(heard_s, core.led_s) < patience:
        return False
    # Steps need every owner: a worker that gets further proves that ours is the broken line.
    return all(now - hosting.progress.changed_s >= patience for hosting in job.hosts.values())


def _commonest(aggregators: list[Aggregator]) -> str:
    counted: dict[str, int] = {}
    for each in aggregators:
        counted[each.hello.fingerprint] = counted.get(each.hello.fingerprint, 0) + 1
    return min(counted, key=lambda each: (-counted[each], each))


def _fall_back(core: Core, job: JobRuntime, plan: JobPlan, candidates: list[Aggregator]) -> str:
    changed = FingerprintChanged(job_id=job.job_id, fingerprint=plan.fingerprint)
    if plan.HasField("equipment"):
        changed.equipment.CopyFrom(plan.equipment)
    job.after = core.persist(ControlRecord(fingerprint_changed=changed))
    core.emit(
        "BIT_IDENTITY_LOST",
        "the ranges go on on aggregators that may give other bits",
        job_id=job.job_id,
        after=job.after,
    )
    return _commonest(candidates)


def _range_count(core: Core, plan: JobPlan, spec: JobSpec, aggregators: int) -> int:
    if needs_one_range(spec):
        return 1
    wanted = size_bytes(plan.layout) // core.config.range_min_bytes
    blocks = -(-plan.layout.element_count // BLOCK_ELEMENTS)
    return max(1, min(wanted, aggregators, blocks))


def _distribute(
    core: Core, job: JobRuntime, plan: JobPlan, candidates: list[Aggregator]
) -> list[ParameterRange]:
    former = {each.index: each.aggregator_id for each in core.facts_of(job).ranges}
    live = {each.id: each for each in candidates if each.id not in job.lost_owners}
    load = dict.fromkeys((each.id for each in candidates), 0)
    for other in core.running():
        for each in core.facts_of(other).ranges:
            if other is not job and each.aggregator_id in load:
                load[each.aggregator_id] += 1
    ranges = []
    by_id = {each.id: each for each in candidates}
    for index, (first, count) in enumerate(
        split_ranges(plan.layout.element_count, plan.range_count)
    ):
        owner = former.get(index, "")
        if owner not in live:
            owner = min(load, key=lambda each: (each in job.too_small, load[each], each))
        load[owner] += 1
        ranges.append(
            ParameterRange(
                index=index,
                first_element=first,
                element_count=count,
                aggregator_id=owner,
                address=by_id[owner].hello.address,
            )
        )
    return ranges
