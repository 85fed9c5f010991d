"""How incidents are shown: one line each, or the time line of one of them, within 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from phalanx.sdk.values import Event

PHASES = (
    "suspected",
    "fenced",
    "replayed",
    "adopted",
    "redispatched",
    "recomputed",
    "committed",
    "restored",
)
COLUMNS = {
    "SEEN": ("suspected",),
    "FENCED": ("fenced",),
    # A new leader moves no work: it adopts who has it.
    "MOVED": ("redispatched", "adopted"),
    "FILLED": ("recomputed",),
    # While storage is away steps go on: they do not end it.
    "COMMIT": ("committed", "restored"),
}
"""The phases in a table of 80 columns: the first of each that was reached."""

_TIME_WIDTH = 11
_STORAGE_LOST = "storage_lost"
_RECOMPUTED = "recomputed_after_s"


def by_incident(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Return the events of each incident, in order."""
    found: dict[str, list[Event]] = {}
    for event in events:
        if event.incident_id:
            found.setdefault(event.incident_id, []).append(event)
    return found


def summary(events: Sequence[Event]) -> dict[str, Any]:
    """Return what is known of one incident: seconds since it began, for each phase reached.

    Of several jobs that it touched the one that recovered last counts.
    """
    ends = [event for event in events if _ends(event)]
    last = ends[-1].details if ends else {}
    # A take-over is told in parts: its first phases are known before any job has gone on.
    reached = {name: value for event in events[:1] for name, value in event.details.items()}
    reached.update(last)
    causes = [event.details["cause"] for event in events if "cause" in event.details]
    return {
        "incident_id": events[0].incident_id,
        "member": _member(events),
        "cause": last.get("cause") or (causes[-1] if causes else ""),
        "job_ids": sorted({event.job_id for event in events if event.job_id}),
        "began_unix_s": _began(events).timestamp(),
        "recovered": bool(ends),
        **{
            f"{phase}_after_s": float(reached[f"{phase}_after_s"])
            if f"{phase}_after_s" in reached
            else None
            for phase in PHASES
        },
    }


def cells(found: dict[str, Any]) -> list[float | None]:
    """Return the seconds of a summary for a row of `COLUMNS`."""
    return [
        next(
            (found[name] for phase in phases if found[name := f"{phase}_after_s"] is not None), None
        )
        for phases in COLUMNS.values()
    ]


def time_line(events: Sequence[Event], width: int) -> list[str]:
    """Return the story of one incident as lines of at most `width` columns."""
    found, began = summary(events), _began(events)
    lines = [
        f"{found['incident_id']}: {found['cause'] or 'failure'} of {found['member'] or '?'}",
        f"{0:>9.3f} s began at {began:%Y-%m-%d %H:%M:%S.%f}"[:-3],
    ]
    for event in events:
        if _RECOMPUTED in event.details:
            # It has no event of its own: it is heard of together with the commit that it led to.
            lines.append(_head(float(event.details[_RECOMPUTED]), "recomputed", event, width))
            lines += _wrapped("the last contribution of the open step was in", width)
        lines.append(_head((event.time - began).total_seconds(), event.type, event, width))
        lines += _wrapped(event.message, width)
        if _ends(event):
            lines += _wrapped(_phases_text(event), width)
    if not found["recovered"]:
        lines.append(f"{'':>{_TIME_WIDTH}} not recovered yet, or nothing had to be")
    return lines


def _head(after_s: float, what: str, event: Event, width: int) -> str:
    job = f" [{event.job_id}]" if event.job_id else ""
    return f"{max(0.0, after_s):>9.3f} s {what}{job}"[:width]


def _ends(event: Event) -> bool:
    """Whether an event tells the end of its incident, with the seconds of all phases."""
    return event.type == "RECOVERED" or "restored_after_s" in event.details


def _phases_text(event: Event) -> str:
    reached = [
        f"{phase} {float(event.details[f'{phase}_after_s']):.3f}"
        for phase in PHASES
        if f"{phase}_after_s" in event.details
    ]
    return "seconds since it began: " + ", ".join(reached) if reached else ""


def _wrapped(text: str, width: int) -> list[str]:
    indent = " " * (_TIME_WIDTH + 1)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def _member(events: Sequence[Event]) -> str:
    for event in events:
        if event.details.get("cause") == _STORAGE_LOST:
            return "storage"  # whoever tells of it only waits for it
        member = (
            event.worker_id or event.details.get("member") or event.details.get("aggregator", "")
        )
        if member:
            return member
    return ""


def _began(events: Sequence[Event]) -> datetime:
    """When it began: as the recovery tells, else the first event."""
    told = [
        datetime.fromtimestamp(float(event.details["began_unix_s"])).astimezone()
        for event in events
        if "began_unix_s" in event.details
    ]
    return min([*told, events[0].time])
