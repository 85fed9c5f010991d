"""Going on from another job (`train.start.job`): what may differ between the two.

The new job takes over all state of the other one, so what made that state has to be the same. What
only says how long to go on, what to measure and keep, and where to run may be another. Steps and
time count from the very beginning, as they would in one job.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from phalanx.errors import InvalidArgument, Violation
from phalanx.texts import number_of
from phalanx.v1 import job_spec_pb2

MAY_DIFFER = frozenset(
    {
        "labels",
        "name",
        "output",
        "priority",
        "resources",
        "retain",
        "train.checkpoints",
        "train.evaluation",
        "train.start",
        "train.stop",
    }
)
_REFERENCE = re.compile(r"[a-z0-9][a-z0-9._-]{0,159}(@[1-9][0-9]{0,17})?", re.ASCII)


@dataclass(frozen=True)
class Reached:
    """How far the other job had come at the checkpoint that is taken over."""

    job_id: str
    step: int
    elapsed_s: float


def reference_violations(text: str) -> Iterator[Violation]:
    """Yield what is wrong with the text of JOB@STEP."""
    if _REFERENCE.fullmatch(text) is None:
        rule = "write JOB or JOB@STEP; see `phalanx jobs`"
        yield Violation("train.start.job", f"{text[:160]!r} is not allowed; {rule}")


def parse_reference(text: str) -> tuple[str, int | None]:
    """Return the job's id and the step of a valid JOB@STEP; no step: the newest checkpoint."""
    job_id, _, step = text.partition("@")
    return job_id, int(step) if step else None


def check_same(spec: job_spec_pb2.JobSpec, other: job_spec_pb2.JobSpec, job_id: str) -> None:
    """Check that a job can go on from another: both resolved. Raises InvalidArgument."""
    violations = [
        Violation(path, f"is not as in {job_id}, from which this job goes on: {why}")
        for path, why in _differences(spec, other, "")
    ]
    if violations:
        raise InvalidArgument(
            f"{violations[0].field} {violations[0].message}",
            reason="OTHER_SPEC",
            violations=violations,
        )


def check_rest(
    train: job_spec_pb2.Train, total_steps: int, others_total_steps: int, reached: Reached
) -> None:
    """Check that something is left to do, and that what was done counts as a part of it.

    `total_steps` are those of the new job, 0 where no rule counts them. Raises InvalidArgument.
    """
    violations = list(_rest_violations(train, total_steps, others_total_steps, reached))
    if violations:
        first = violations[0]
        raise InvalidArgument(f"{first.field} {first.message}", violations=violations)


def _rest_violations(
    train: job_spec_pb2.Train, total_steps: int, others_total_steps: int, reached: Reached
) -> Iterator[Violation]:
    wall_time = train.stop.wall_time
    limit_s = wall_time.seconds + wall_time.nanos / 1e9
    there = f"{reached.job_id} is at step {reached.step}"
    if 0 < total_steps <= reached.step:
        message = f"ends the job at step {total_steps}, and {there} already: its steps count, too"
        yield Violation("train.stop", message)
    if train.stop.HasField("wall_time") and limit_s <= reached.elapsed_s:
        message = (
            f"is {limit_s:g} s, and {reached.job_id} has run for {reached.elapsed_s:.0f} s "
            "already: its time counts, too"
        )
        yield Violation("train.stop.wall_time", message)
    if _follows_total(train) and total_steps != others_total_steps:
        mine, others = (number_of(each, "step") for each in (total_steps, others_total_steps))
        message = (
            f"makes {mine}, and that of {reached.job_id} makes {others}: "
            "with cosine the rates of all steps depend on how many there are, so the steps taken "
            f"were no part of this job; keep {others_total_steps}, use another schedule in both, "
            "or take over the parameters alone with train.start.model"
        )
        yield Violation("train.stop", message)


def _follows_total(train: job_spec_pb2.Train) -> bool:
    optimizers = (train.optimizer, train.local.outer)
    return any(each.schedule.WhichOneof("kind") == "cosine" for each in optimizers)


def _differences(one: Message, other: Message, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the smallest fields that differ, each with both values."""
    for field in one.DESCRIPTOR.fields:
        path = f"{prefix}{field.name}"
        mine, others = getattr(one, field.name), getattr(other, field.name)
        if path in MAY_DIFFER:
            continue
        if field.type != FieldDescriptor.TYPE_MESSAGE or field.is_repeated:
            if mine != others:
                yield path, f"{_shown(mine)}, and there {_shown(others)}"
        elif one.HasField(field.name) != other.HasField(field.name):
            here, there = _given(one, field.name), _given(other, field.name)
            yield path, f"{here} here, and {there} there"
        elif one.HasField(field.name):
            yield from _differences(mine, others, f"{path}.")


def _given(message: Message, name: str) -> str:
    return "given" if message.HasField(name) else "not given"


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool) else "other values"
    return text if len(text) <= 80 else "other values"
