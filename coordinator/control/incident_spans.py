"""Spans of incidents, made of the events that tell of their ends, where this process traces."""

from __future__ import annotations

from phalanx.telemetry.tracing import NANOS, Tracing
from phalanx.v1.job_pb2 import Event

_PHASE = "_after_s"
_ENDS = ("RECOVERED", "STORAGE_RESTORED")


def trace_incident(tracing: Tracing, event: Event) -> None:
    """Tell of an incident that is over; other events say nothing."""
    began_unix_s = event.details.get("began_unix_s")
    if event.type not in _ENDS or not began_unix_s:
        return
    phases = {
        name.removesuffix(_PHASE): float(seconds)
        for name, seconds in event.details.items()
        if name.endswith(_PHASE)
    }
    told: dict[str, str | int] = {"incident_id": event.incident_id}
    for name in ("cause", "member"):
        if event.details.get(name):
            told[name] = event.details[name]
    if event.job_id:
        told |= {"job_id": event.job_id, "step": event.step}
    tracing.incident(int(float(began_unix_s) * NANOS), phases, told)
