"""Failures and what follows, told as a story: suspected, fenced, handed out again, committed.

What goes on with one member is one incident, from the first sign until the member is well again or
there anew: shards that come late, suspicion, loss and the moves that follow carry one id.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.control.core.clock import NANOS, Instant
from coordinator.control.core.events import LostLeader
from coordinator.control.core.state import CommitTime, Core, Incident, JobRuntime

CONTROL_LOST = "control_lost"

OPEN_MAX = 200
"""So many are followed at once. A job that waits while workers come and go would open one with each
of them, and close all of them with its next step."""


def suspected(core: Core, member_id: str) -> str:
    """Note the first sign that something is wrong with a member; return the incident's id."""
    return core.episode(member_id).incident_id


def detected(core: Core, cause: str, member_id: str, suspected_s: float) -> Incident:
    """Open an incident and measure how long the failure went unnoticed."""
    incident = _open(core, cause, member_id, suspected_s)
    _observe(core, incident, "detect", core.now.monotonic_s - suspected_s)
    if incident.noticed_s is not None and incident.noticed_s < core.now.monotonic_s:
        _observe(core, incident, "suspect", incident.noticed_s - suspected_s)
    return incident


def moved(core: Core, incident: Incident) -> None:
    """Note that the work is handed out again; close the incident if there was none."""
    incident.moved = core.now
    _observe(core, incident, "redispatch", core.now.monotonic_s - incident.detected.monotonic_s)
    if not incident.jobs:
        core.incidents.pop(incident.id, None)


def took_over(core: Core, lost: LostLeader) -> tuple[Incident, dict[str, str]]:
    """Open the incident of a leader that was lost; return it with what is known so far.

    It has been replaced by now, and the journal replayed. Of the jobs that run each closes it with
    the first step after its members came back.
    """
    incident = _open(core, CONTROL_LOST, lost.control_id, lost.silent_since_s)
    incident.noticed_s = None
    incident.fenced_s = lost.fenced_s
    incident.jobs = {job.job_id: job.step for job in core.running()}
    if not incident.jobs:
        core.incidents.pop(incident.id, None)
    # Another control process of this name is another incident.
    well(core, lost.control_id)
    _observe(core, incident, "detect", lost.fenced_s - lost.silent_since_s)
    _observe(core, incident, "replay", core.now.monotonic_s - lost.fenced_s)
    line = _line_of_take_over(incident)
    return incident, {
        **{f"{phase}_after_s": f"{seconds:.6f}" for phase, seconds in line.items()},
        "cause": CONTROL_LOST,
        "member": lost.control_id,
        "began_unix_s": f"{_began_unix_s(incident):.6f}",
    }


def returned(core: Core, job_ids: Iterable[str]) -> str:
    """Note that a member is back with these jobs in hand; return the incident that this is part of.

    Empty where none is: nobody was away, or the jobs have gone on already.
    """
    back = set(job_ids)
    for incident in core.incidents.values():
        if incident.cause == CONTROL_LOST and back & incident.jobs.keys():
            incident.moved = core.now
            return incident.id
    return ""


def of_owners(core: Core, job: JobRuntime) -> list[Incident]:
    """The open incidents in which a job lost owners of ranges, the newest last."""
    return [
        incident
        for incident in core.incidents.values()
        if job.job_id in incident.jobs and (incident.cause == "aggregator_lost" or job.all_reduce)
    ]


def of_lost_owners(core: Core, job: JobRuntime) -> str:
    """The id of the newest of these; empty: it has lost none."""
    lost = of_owners(core, job)
    return lost[-1].id if lost else ""


def committed(core: Core, job: JobRuntime, commit: CommitTime) -> None:
    """Close the incidents of a job whose root has committed a step after the failure."""
    for incident in list(core.incidents.values()):
        if job.job_id not in incident.jobs:
            continue
        since = incident.detected
        if incident.cause == CONTROL_LOST:
            if not job.hosts:
                continue  # the steps since then needed nobody's leave, and nobody is back yet
            since = incident.moved or since
        if commit.at_s <= since.monotonic_s or commit.step <= 0:
            continue
        _recovered(core, job, incident, commit)
        forget(core, job.job_id, incident)


def well(core: Core, member_id: str) -> None:
    """The member is well, or there anew: what happens to it next is another incident."""
    core.episodes.pop(member_id, None)


def forget(core: Core, job_id: str, only: Incident | None = None) -> None:
    """Take a job out of its incidents (or one of them); one without jobs is closed."""
    for incident in [only] if only is not None else list(core.incidents.values()):
        incident.jobs.pop(job_id, None)
        if not incident.jobs:
            core.incidents.pop(incident.id, None)


def _open(core: Core, cause: str, member_id: str, suspected_s: float) -> Incident:
    """Open an incident, or a new phase of the one that the member is in already; where there are
    too many, the oldest one is followed no more."""
    episode = core.episode(member_id)
    incident = Incident(episode.incident_id, cause, member_id, suspected_s, core.now)
    incident.noticed_s = episode.noticed_s
    known = core.incidents.pop(incident.id, None)
    if known is not None:
        incident.jobs.update(known.jobs)
    core.incidents[incident.id] = incident
    while len(core.incidents) > OPEN_MAX:
        del core.incidents[next(iter(core.incidents))]
    return incident


def _recovered(core: Core, job: JobRuntime, incident: Incident, commit: CommitTime) -> None:
    """Tell the whole story, with the seconds of each phase since the failure began."""
    took_s = commit.at_s - incident.detected.monotonic_s
    silence_s = max(0.0, incident.detected.monotonic_s - incident.suspected_s)
    line = {"fenced": silence_s}
    if incident.cause == CONTROL_LOST:
        line = _line_of_take_over(incident)
        if incident.moved is not None:
            adopted_s = incident.moved.monotonic_s - incident.detected.monotonic_s
            _observe(core, incident, "adopt", adopted_s)
    elif incident.noticed_s is not None and incident.noticed_s < incident.detected.monotonic_s:
        line["suspected"] = max(0.0, incident.noticed_s - incident.suspected_s)
    if incident.moved is not None and incident.cause != CONTROL_LOST:
        line["redispatched"] = max(0.0, incident.moved.monotonic_s - incident.suspected_s)
        if commit.filled_s is not None and commit.filled_s > incident.detected.monotonic_s:
            filled_s = commit.filled_s - incident.detected.monotonic_s
            line["recomputed"] = silence_s + filled_s
            _observe(core, incident, "recompute", commit.filled_s - incident.moved.monotonic_s)
    line["committed"] = silence_s + took_s
    _observe(core, incident, "commit", took_s)
    _observe(core, incident, "total", took_s + silence_s)
    details = {f"{phase}_after_s": f"{seconds:.6f}" for phase, seconds in line.items()}
    core.emit(
        "RECOVERED",
        f"step {commit.step} committed {took_s:.3f} s after {_what(incident)}",
        job_id=job.job_id,
        incident_id=incident.id,
        step=commit.step,
        details={
            **details,
            "cause": incident.cause,
            "member": incident.member_id,
            "began_unix_s": f"{_began_unix_s(incident):.6f}",
            "detect_s": f"{silence_s:.6f}",
            "commit_s": f"{took_s:.6f}",
            "committed_unix_s": f"{_unix_s(core.now, commit.at_s):.6f}",
        },
    )


def _what(incident: Incident) -> str:
    if incident.cause == "late":
        return "copies were asked for"
    if incident.cause == CONTROL_LOST:
        return f"control was taken over from {incident.member_id}"
    return f"the loss of {incident.member_id}"


def _line_of_take_over(incident: Incident) -> dict[str, float]:
    """Seconds since the last sign of life of a leader until what is known of its replacement."""
    assert incident.fenced_s is not None
    line = {
        "fenced": incident.fenced_s - incident.suspected_s,
        "replayed": incident.detected.monotonic_s - incident.suspected_s,
    }
    if incident.moved is not None:
        line["adopted"] = incident.moved.monotonic_s - incident.suspected_s
    return {phase: max(0.0, seconds) for phase, seconds in line.items()}


def _began_unix_s(incident: Incident) -> float:
    began_s = min(incident.suspected_s, incident.detected.monotonic_s)
    return _unix_s(incident.detected, began_s)


def _unix_s(known: Instant, monotonic_s: float) -> float:
    """What the wall clock showed at a time, if it has run on evenly until one that is known."""
    return known.unix_nanos / NANOS - (known.monotonic_s - monotonic_s)


def _observe(core: Core, incident: Incident, phase: str, seconds: float) -> None:
    core.observe("recovery_seconds", max(0.0, seconds), cause=incident.cause, phase=phase)
