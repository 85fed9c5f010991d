"""What every part of Phalanx knows of tasks: their limits, and where their results stand.

A job of tasks is a set of independent calls of the user's function, or a program: its tasks are
functions of Phalanx that get the results of other tasks (see `phalanx.programs`).
"""

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

PROGRAMS = ("forest", "evaluate", "predict", "cascade", "sweep")
"""Members of the choice of `JobSpec.program` whose tasks are functions of Phalanx."""

PROGRAM_TIMEOUT_S = 24 * 3600
TASKS_DONE = "TASKS_DONE"
"""Why a job of tasks has ended that has succeeded."""

KEPT = "kept-"
"""How the names of those begin, within a job, who hold what only its running tasks need."""

OUTCOME = "outcome"
"""Where the final manifest of a program names the blob of its last task's result."""


def journal_stream(job_id: str) -> str:
    """Return the journal stream with the results of a job."""
    return f"tasks/{job_id}"


def pins_holder(job_id: str, attempt: int | str) -> str:
    """Return who holds the blob of a large result until the job is deleted."""
    return f"{job_id}/{attempt}"


def kept_holder(job_id: str, record: str) -> str:
    """Return who holds what tasks have kept for others, until the job has ended: a record of their
    journal, by its term and its place."""
    return pins_holder(job_id, f"{KEPT}{record}")


def is_task_set(spec: JobSpec) -> bool:
    """Whether a job is a set of independent tasks, which reads no data set and leaves results."""
    return spec.WhichOneof("program") == "tasks"


def is_program(spec: JobSpec) -> bool:
    """Whether a job's tasks are functions of Phalanx, and lead to one outcome."""
    return spec.WhichOneof("program") in PROGRAMS


def runs_tasks(spec: JobSpec) -> bool:
    """Whether a job is handed out task by task, by a dispatcher, instead of step by step."""
    return is_task_set(spec) or is_program(spec)


def timeout_s(spec: JobSpec) -> float:
    """Return after how long a task is killed."""
    if is_program(spec):
        return PROGRAM_TIMEOUT_S
    return spec.tasks.timeout.seconds + spec.tasks.timeout.nanos * 1e-9


def attempts_max(spec: JobSpec) -> int:
    """Return after how many failures a task is given up."""
    return ATTEMPTS if is_program(spec) else spec.tasks.attempts


def failures_max(spec: JobSpec) -> int | None:
    """Return how many tasks may be given up before the job fails; None: any number."""
    if is_program(spec):
        return 0
    action = spec.tasks.on_failure
    if action.WhichOneof("action") != "go_on":
        return 0
    return action.go_on.max_tasks or None
