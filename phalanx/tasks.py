"""What every part of Phalanx knows of independent tasks: their limits, and where results stand."""

from __future__ import annotations

from phalanx.v1.job_spec_pb2 import JobSpec

TASKS_MAX = 50_000
ARGUMENTS_BYTES_MAX = 1024 * 1024
"""Members are told all of them in one message."""

ATTEMPTS = 3
ATTEMPTS_MAX = 100
TIMEOUT_S = 3600
INLINE_BYTES = 16 * 1024
"""A longer result is stored as a blob, and its digest in its place."""

VALUE_BYTES_MAX = 32 * 1024 * 1024


def journal_stream(job_id: str) -> str:
    """Return the journal stream with the results of a job."""
    return f"tasks/{job_id}"


def pins_holder(job_id: str, attempt: int) -> str:
    """Return who holds the blob of a large result until the job is deleted."""
    return f"{job_id}/{attempt}"


def is_task_set(spec: JobSpec) -> bool:
    """Whether a job is a set of independent tasks."""
    return spec.WhichOneof("program") == "tasks"


def failures_max(spec: JobSpec) -> int | None:
    """Return how many tasks may be given up before the job fails; None: any number."""
    action = spec.tasks.on_failure
    if action.WhichOneof("action") != "go_on":
        return 0
    return action.go_on.max_tasks or None
