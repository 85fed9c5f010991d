"""Spans of incidents, made of the events that tell of their ends, where this process traces."""

from __future__ import annotations

from phalanx.telemetry.tracing import NANOS, Tracing
from phalanx.v1.job_pb2 import Event

_PHASE = "_after_s"
_IN_ORDER = ("suspected", "fenced", "redispatched", "recomputed", "committed", "restored")
_ENDS = ("RECOVERED", "STORAGE_RESTORED")


def trace_incident(tracing: Tracing, event: Event) -> None:
    """Tell of an incident that is over; other events say nothing."""
    began_unix_s = event.details.get("began_unix_s")
    if event.type not in _ENDS or not began_unix_s:
        return
    # Those that took no time at all are still one after the other.
    phases = {
        phase: float(event.details[phase + _PHASE])
        for phase in _IN_ORDER
        if phase + _PHASE in event.details
    }
    told: dict[str, str | int] = {"incident_id": event.incident_id}
    for name in ("cause", "member"):
        if event.details.get(name):
            told[name] = event.details[name]
    if event.job_id:
        told |= {"job_id": event.job_id, "step": event.step}
    tracing.incident(int(float(began_unix_s) * NANOS), phases, told)
