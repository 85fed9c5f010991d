"""When the measured speeds of workers move shards, and what a move has to bring.

Shards must not dance: what a busy machine does for a moment moves nothing. So a better placement
has to be in sight for several heartbeats, has to make a step clearly shorter, and the next move
waits until this one has shown in the measures. While all workers are equally fast, placement is by
slots alone, and nothing here acts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.control.core import levels, sharing, speeds
from coordinator.control.core.eligibility import weight_of
from coordinator.control.core.placement import Owners, loads
from coordinator.control.core.state import Core, JobRuntime, Worker
from phalanx.layouts import ITEM_BYTES
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView

SEEN_HEARTBEATS = 3
"""Heartbeats for which a better placement has to be in sight."""

NEW_ROUNDS, CLEARLY_SLOWER, BUSY_PART = 3, 2.0, 0.25
"""A worker with so few rounds of leaves behind it was placed before anything was known of it. Where
it takes so many times as long as need be, the first look is believed; but how long steps take is
not known by then, so leaves have to take at least such a part of its time."""

REST_LEASES, LOOK_AGAIN_S = 2.0, 5.0
"""No other move for so many leases after one; no other search for so long after one in vain."""

WIRE_BYTES_PER_S = 500e6
"""What one stream of vectors carries, adding them up included: of the order of what is measured on
one machine (`python -m bench exchange`); 10 Gbit/s are a little more."""

MOVE_LEAVES = 4
"""A moved shard costs its new host so many leaves: it reads rows that the old one has cached."""

PAYS_WITHIN_S, PAYS_WITHIN_STEPS = 30.0, 20
"""A move has to pay within the longer of these."""

STEP_SHARE_LEAST = 0.1
"""Part of a step, as it is, that a move has to save: where steps take their time with other things
than leaves, nothing is to be gained."""


@dataclass(frozen=True)
class Levels:
    """New placements of a job's two trees."""

    train: levels.Level
    evaluation: levels.Level


def weights(core: Core, job: JobRuntime, workers: Iterable[Worker]) -> dict[str, float]:
    """Return what placement is proportional to: slots, times measured speed and the job's part of
    the worker's time where they differ."""
    slots = {worker.id: worker.slots for worker in workers}
    found = _factors(core, job, slots)
    return {key: count if found[key] == 1 else count * found[key] for key, count in slots.items()}


def watch(core: Core, job: JobRuntime) -> bool:
    """Return whether a better placement has been in sight for long enough to look for it."""
    now_s, leveling = core.now.monotonic_s, job.leveling
    if now_s < leveling.next_s:
        return False
    sight = _in_sight(core, job)
    if not sight.better:
        leveling.seen_s = None
        return False
    if leveling.seen_s is None:
        leveling.seen_s = now_s
    heartbeats = 0 if sight.new_and_clear else SEEN_HEARTBEATS
    seen_s = heartbeats * core.config.heartbeat_interval_s * core.crowding()
    return now_s - leveling.seen_s >= seen_s


def decide(core: Core, job: JobRuntime) -> Levels | None:
    """Look for a better placement; None: there is none, or it does not pay."""
    now_s, leveling, facts = core.now.monotonic_s, job.leveling, core.facts_of(job)
    slots = _slots(core, job)
    factors = _factors(core, job, slots)
    leaf_s = speeds.usual_leaf_s(job.speeds, slots)
    leveling.seen_s = None
    leveling.next_s = now_s + LOOK_AGAIN_S
    unit_travels = facts.plan.unit_span > 0 or facts.plan.asynchronous
    layout = facts.plan.layout
    vector_s = layout.element_count * ITEM_BYTES.get(layout.dtype, 4) / WIRE_BYTES_PER_S
    pace = levels.Pace(slots, factors, vector_s / leaf_s)
    tree = job.train
    step_s = leaf_s * levels.slowest(
        tree.owners, tree.width, pace, tree.unit, unit_travels=unit_travels
    )
    step_s = max(step_s, leveling.step_s)
    pays_within_s = max(PAYS_WITHIN_S, PAYS_WITHIN_STEPS * step_s)
    pace = levels.Pace(slots, factors, pace.vector, MOVE_LEAVES * step_s / pays_within_s)
    train = levels.level(
        tree.owners,
        tree.width,
        pace,
        tree.unit,
        unit_travels=unit_travels,
        had=job.had,
        all_have_some=job.all_reduce,
    )
    if (train.before - train.after) * leaf_s < STEP_SHARE_LEAST * step_s:
        return None
    leveling.next_s = now_s + REST_LEASES * core.lease_ttl_s()
    leveling.uneven = any(factor != 1 for factor in factors.values())
    # Sums of an evaluation are a few numbers; its leaves are not measured, and much alike.
    pace = levels.Pace(slots, factors)
    return Levels(train, levels.level(job.evaluation.owners, job.evaluation.width, pace))


def leveled(core: Core, job: JobRuntime, owners: Owners) -> Owners:
    """Return a new placement on some workers by what was measured of them, each with a shard."""
    slots = {key: core.workers[key].slots for key in dict.fromkeys(owners.values())}
    pace = levels.Pace(slots, _factors(core, job, slots))
    job.leveling.uneven = any(factor != 1 for factor in pace.factors.values())
    if not job.leveling.uneven:
        return owners
    found = levels.level(owners, job.train.width, pace, job.train.unit, all_have_some=True)
    return found.placement.owners


@dataclass(frozen=True)
class _Sight:
    """Whether some worker takes clearly longer than a perfect placement would, and whether that is
    beyond doubt for one of which nothing was known."""

    better: bool
    new_and_clear: bool = False


_NOTHING = _Sight(False)


def _in_sight(core: Core, job: JobRuntime) -> _Sight:
    """Look, which is cheap, whether there may be a better placement."""
    tree = job.train
    if tree.keepers or job.evaluation.keepers:
        return _NOTHING
    slots = _slots(core, job)
    factors = _factors(core, job, slots)
    if not job.leveling.uneven and all(factor == 1 for factor in factors.values()):
        return _NOTHING
    counted = loads(tree.owners, slots)
    others = loads(job.evaluation.owners, slots)
    if sum(counted.values()) < tree.width or sum(others.values()) < job.evaluation.width:
        return _NOTHING  # somebody has shards who is not heard of, or not ready, or nobody has
    if any(count and not _measured(job, key) for key, count in counted.items()):
        return _NOTHING
    pace = levels.Pace(slots, factors)
    slowest_s, slowest = max((pace.time(key, count, 0), key) for key, count in counted.items())
    least_s = pace.least(tree.width)
    clear = counted[slowest] > 0 and slowest_s > CLEARLY_SLOWER * least_s
    if clear:
        speed = job.speeds[slowest]
        clear = speed.leaves <= NEW_ROUNDS * counted[slowest]
        clear = clear and speed.is_busy(BUSY_PART, core.now.monotonic_s)
    return _Sight(slowest_s * (1 - levels.GAIN_LEAST) > least_s, clear)


def _slots(core: Core, job: JobRuntime) -> dict[str, int]:
    """Slots of the hosts that compute."""
    ready = sorted(key for key, hosted in job.hosts.items() if hosted.ready)
    if job.all_reduce:
        ready = [key for key in ready if job.hosts[key].train]  # others are no members
    workers = [core.workers[key] for key in ready if key not in job.set_aside]
    return {each.id: each.slots for each in workers if each.state == WorkerView.STATE_READY}


def _factors(core: Core, job: JobRuntime, slots: dict[str, int]) -> dict[str, float]:
    found = speeds.factors(job.speeds, slots, core.now.monotonic_s)
    others = [each for each in core.running() if each is not job]
    limited = [each for each in others if _is_limited(core, each)]
    if limited:
        own = weight_of(core, job)
        everywhere = sum(weight_of(core, each) for each in others if each not in limited)
        there = {
            key: sum(weight_of(core, each) for each in limited if key in each.hosts)
            for key in slots
        }
        parts = sharing.parts(own, everywhere, there)
        found = {key: factor * parts[key] for key, factor in found.items()}
    return found


def _is_limited(core: Core, job: JobRuntime) -> bool:
    """Whether a job is on some workers only: others are taken to be on all of them, since who is
    there first, or last, for a moment must not move a shard."""
    resources = core.facts_of(job).spec.resources
    return resources.max_workers > 0 or bool(resources.worker_labels)


def _measured(job: JobRuntime, worker_id: str) -> bool:
    return worker_id in job.speeds and job.speeds[worker_id].known
