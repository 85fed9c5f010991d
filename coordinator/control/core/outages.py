"""Storage that is away, told as one incident: from its last answer until nobody waits any more.

Control notices by itself. Owners of ranges say so while a checkpoint of theirs waits, sometimes
before control does or after it has storage again. Training goes on meanwhile, so no step ends it.
Incidents are of one leadership: one that lasts under the next is told there again, by whoever still
waits, from its true beginning.
"""

from __future__ import annotations

import math

from coordinator.control.core.clock import NANOS
from coordinator.control.core.events import StorageLost, StorageReturned
from coordinator.control.core.lifecycle import RUNNING
from coordinator.control.core.state import Aggregator, Core, Outage, Waiter, Worker
from phalanx.v1 import coordination_service_pb2 as pb

STORAGE_LOST = "storage_lost"
_CONTROL = Waiter()


def lost(core: Core, event: StorageLost) -> None:
    """Tell that storage does not answer control."""
    incident_id, details = began(core, _CONTROL, event.answered_s)
    core.emit(
        "STORAGE_UNAVAILABLE",
        "storage does not answer; training goes on, decisions wait",
        incident_id=incident_id,
        details=details,
    )


def returned(core: Core, event: StorageReturned) -> None:
    """Tell that storage answers control again."""
    incident_id, details = ended(core, _CONTROL, event.lost_s)
    core.emit(
        "STORAGE_RESTORED",
        f"storage answers again after {core.now.monotonic_s - event.lost_s:.1f} s",
        incident_id=incident_id,
        details={"dropped_events": event.dropped_events, **details},
    )


def told(
    core: Core, member: Aggregator | Worker, message: pb.MemberEvent
) -> tuple[str, dict[str, str]] | None:
    """An owner of ranges waits for storage, or does not any more: return incident and details.

    None where it was told before: an owner says that it waits on each session anew.
    """
    facts = core.facts.jobs.get(message.job_id)
    term = facts.term if facts is not None else 0
    waiter = Waiter(member.id, member.hello.incarnation, message.job_id, term)
    began_s = core.now.monotonic_s - _waited_s(message)
    if message.type != "STORAGE_UNAVAILABLE":
        return ended(core, waiter, began_s)
    if core.outage is not None and waiter in core.outage.waiters:
        return None
    return began(core, waiter, began_s)


def began(core: Core, waiter: Waiter, answered_s: float) -> tuple[str, dict[str, str]]:
    """Somebody waits for storage, which answered last at this time; the first opens the incident.

    Return its id, and what an event tells of it.
    """
    outage = core.outage
    if outage is not None:
        outage.waiters = {each for each in outage.waiters if _waits(core, each)}
    if outage is None or not outage.waiters:
        outage = _opened(core, answered_s)
        _observe(core, "detect", outage.silence_s)
    outage.waiters.add(waiter)
    return outage.incident_id, _details(outage)


def ended(core: Core, waiter: Waiter, began_s: float) -> tuple[str, dict[str, str]]:
    """Somebody has waited for storage since then, and does no more; the last one closes the
    incident. That may be the first that this leadership hears of it."""
    outage = core.outage
    others = outage is not None and any(_waits(core, each) for each in outage.waiters)
    if outage is None or not (others or waiter in outage.waiters):
        outage = _opened(core, began_s)
    outage.waiters.discard(waiter)
    details = _details(outage)
    if not any(_waits(core, each) for each in outage.waiters):
        away_s = outage.silence_s + core.now.monotonic_s - outage.noticed.monotonic_s
        details["restored_after_s"] = f"{away_s:.6f}"
        _observe(core, "total", away_s)
        core.outage = None
    return outage.incident_id, details


def _opened(core: Core, since_s: float) -> Outage:
    silence_s = max(0.0, core.now.monotonic_s - since_s)
    core.outage = Outage(core.new_incident_id(), core.now, silence_s)
    return core.outage


def _waited_s(message: pb.MemberEvent) -> float:
    try:
        waited_s = float(message.details.get("waited_s", ""))
    except ValueError:
        return 0.0
    return waited_s if 0.0 < waited_s < math.inf else 0.0


def _waits(core: Core, waiter: Waiter) -> bool:
    """Whether it can still say that it waits no more; it cannot once it is gone, or its term is."""
    if waiter == _CONTROL:
        return True
    member = core.aggregators.get(waiter.member_id) or core.workers.get(waiter.member_id)
    facts = core.facts.jobs.get(waiter.job_id)
    if member is None or member.hello.incarnation != waiter.incarnation or facts is None:
        return False
    return facts.state == RUNNING and facts.term == waiter.term


def _details(outage: Outage) -> dict[str, str]:
    began_unix_s = outage.noticed.unix_nanos / NANOS - outage.silence_s
    return {
        "cause": STORAGE_LOST,
        "began_unix_s": f"{began_unix_s:.6f}",
        "suspected_after_s": f"{outage.silence_s:.6f}",
    }


def _observe(core: Core, phase: str, seconds: float) -> None:
    core.observe("recovery_seconds", seconds, cause=STORAGE_LOST, phase=phase)
