"""Job files of independent tasks: what they may say, their defaults, their plan."""

from __future__ import annotations

import math
from collections.abc import Iterator

from google.protobuf.struct_pb2 import ListValue, Struct

from phalanx.errors import Violation
from phalanx.specs.canonical import spec_sha256
from phalanx.specs.fields import is_set
from phalanx.tasks import ARGUMENTS_BYTES_MAX, ATTEMPTS, ATTEMPTS_MAX, TASKS_MAX, TIMEOUT_S
from phalanx.texts import number_of, verb_for
from phalanx.v1 import job_pb2, training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec

_REFUSED = {
    "data": "is not read by tasks; leave it out, and let the function read what it needs",
    "seed": "is not handed to tasks; write one into the arguments",
    "output": "is for models; leave it out and read the results with `phalanx results`",
    "reproducibility.bitwise": (
        "cannot be promised of calls that return what they like; leave it out"
    ),
}


def violations(spec: JobSpec) -> Iterator[Violation]:
    """Yield what is wrong with a set of tasks; of raw as well as resolved specs."""
    for path, why in _REFUSED.items():
        if is_set(spec, path) and not (path == "seed" and spec.seed == 0):
            yield Violation(path, why)
    tasks = spec.tasks
    count = len(tasks.arguments)
    if not count:
        message = "is missing; give one mapping of keyword arguments for each call, as [{x: 1}]"
        yield Violation("tasks.arguments", message)
    elif count > TASKS_MAX:
        message = f"{number_of(count, 'task')} are given; at most {TASKS_MAX} are allowed"
        yield Violation("tasks.arguments", f"{message}: give a call more to do, or submit two jobs")
    for index, each in enumerate(tasks.arguments):
        if not _is_finite(each):
            yield Violation(f"tasks.arguments[{index}]", "has a number that is not finite")
    size = sum(each.ByteSize() for each in tasks.arguments)
    if size > ARGUMENTS_BYTES_MAX:
        message = f"{size} bytes are above {ARGUMENTS_BYTES_MAX}"
        yield Violation("tasks.arguments", f"{message}; let the function read what is large")
    if tasks.HasField("attempts") and not 1 <= tasks.attempts <= ATTEMPTS_MAX:
        message = f"must be at least 1 and at most {ATTEMPTS_MAX}, not {tasks.attempts}"
        yield Violation("tasks.attempts", message)
    if tasks.on_failure.go_on.max_tasks < 0:
        message = f"must be at least 0, not {tasks.on_failure.go_on.max_tasks}"
        yield Violation("tasks.on_failure.go_on.max_tasks", message)


def _is_finite(value: Struct | ListValue) -> bool:
    """Whether all numbers of an argument are; there may be very many arguments."""
    values = value.fields.values() if isinstance(value, Struct) else value.values
    for each in values:
        kind = each.WhichOneof("kind")
        if kind == "number_value" and not math.isfinite(each.number_value):
            return False
        if kind in ("struct_value", "list_value") and not _is_finite(getattr(each, kind)):
            return False
    return True


def resolve(spec: JobSpec) -> None:
    """Write out the defaults of a set of tasks."""
    if not spec.tasks.HasField("attempts"):
        spec.tasks.attempts = ATTEMPTS
    if not spec.tasks.HasField("timeout"):
        spec.tasks.timeout.seconds = TIMEOUT_S
    if spec.tasks.on_failure.WhichOneof("action") is None:
        spec.tasks.on_failure.fail.SetInParent()


def job_plan(spec: JobSpec, job_id: str) -> training_pb2.JobPlan:
    """Return what aggregators and workers need to know of a resolved set of tasks."""
    return training_pb2.JobPlan(
        job_id=job_id,
        spec=spec.SerializeToString(deterministic=True),
        spec_sha256=spec_sha256(spec),
        total_steps=len(spec.tasks.arguments),
        range_count=1,
    )


def plan(spec: JobSpec, eligible_workers: int = 0) -> job_pb2.Plan:
    """Return the Plan of a resolved set of tasks, for people."""
    count = len(spec.tasks.arguments)
    warnings = too_few(count, eligible_workers)
    return job_pb2.Plan(steps=count, eligible_workers=eligible_workers, warnings=warnings)


def too_few(tasks: int, workers: int) -> list[str]:
    """Return the warning that there are fewer tasks than workers; none where there are enough."""
    if workers <= tasks:
        return []
    kept = f"{number_of(tasks, 'task')} {verb_for(tasks, 'keeps', 'keep')} {tasks}"
    return [f"{kept} of {number_of(workers, 'worker')} busy"]
