"""Deaths and what follows them, told as a story: lost, shards moved, recovered, with the times."""

from __future__ import annotations

from coordinator.control.core.state import Core, Incident, JobRuntime, seconds_between
from phalanx.v1 import coordination_service_pb2 as pb


def detected(core: Core, cause: str, member_id: str, suspected_s: float) -> Incident:
    """Open an incident and measure how long the death went unnoticed."""
    incident = core.new_incident(cause, member_id, suspected_s)
    silence_s = max(0.0, core.now.monotonic_s - suspected_s)
    core.observe("recovery_seconds", silence_s, cause=cause, phase="detect")
    return incident


def moved(core: Core, incident: Incident) -> None:
    """Note that the work of the dead is handed out again; close the incident if there was none."""
    incident.moved_s = core.now.monotonic_s
    if not incident.jobs:
        del core.incidents[incident.id]


def committed(core: Core, job: JobRuntime, report: pb.JobReport) -> None:
    """Close the incidents of a job whose root has committed a step after the death."""
    for incident in list(core.incidents.values()):
        if job.job_id not in incident.jobs:
            continue
        after_death = report.last_commit_unix_nanos > incident.detected.unix_nanos
        if not after_death or report.step <= 0:
            continue
        took_s = seconds_between(incident.detected, report.last_commit_unix_nanos)
        silence_s = max(0.0, incident.detected.monotonic_s - incident.suspected_s)
        core.observe("recovery_seconds", took_s, cause=incident.cause, phase="commit")
        core.observe("recovery_seconds", took_s + silence_s, cause=incident.cause, phase="total")
        core.emit(
            "RECOVERED",
            f"step {report.step} committed {took_s:.3f} s after the loss of {incident.member_id}",
            job_id=job.job_id,
            incident_id=incident.id,
            step=report.step,
            details={
                "cause": incident.cause,
                "detect_s": f"{silence_s:.6f}",
                "commit_s": f"{took_s:.6f}",
                "committed_unix_s": f"{report.last_commit_unix_nanos / 1e9:.6f}",
            },
        )
        forget(core, job.job_id, incident)


def forget(core: Core, job_id: str, only: Incident | None = None) -> None:
    """Take a job out of its incidents (or one of them); one without jobs is closed."""
    for incident in [only] if only is not None else list(core.incidents.values()):
        incident.jobs.pop(job_id, None)
        if not incident.jobs:
            core.incidents.pop(incident.id, None)
