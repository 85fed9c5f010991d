"""Going on from another job (`train.start.job`): what may differ between the two.

The new job takes over all state of the other one, so what made that state has to be the same. What
only says how long to go on, what to measure and keep, and where to run may be another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from phalanx.errors import InvalidArgument, Violation
from phalanx.v1 import job_spec_pb2

MAY_DIFFER = frozenset(
    {
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
