"""What the jobs of one namespace may insist on together.

A job insists on `min_workers` slots, and on its memory in each of them, from its submission to its
end. What it uses beyond that is what nobody else wants at the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.control.core.facts import Facts
from phalanx.errors import ResourceExhausted
from phalanx.v1.control_journal_pb2 import JobSubmitted


@dataclass(frozen=True)
class Quotas:
    """Limits of every namespace; 0 stands for none."""

    jobs_max: int = 10_000
    slots_max: int = 0
    memory_bytes_max: int = 0


def check(quotas: Quotas, facts: Facts, submitted: JobSubmitted) -> None:
    """Raise ResourceExhausted where one more job is more than its namespace may have."""
    namespace = submitted.spec.namespace
    check_jobs(quotas, facts, namespace)
    if quotas.slots_max == quotas.memory_bytes_max == 0:
        return
    there = _unended(facts, namespace)
    _check(namespace, "slots", quotas.slots_max, sum(map(_slots, there)), _slots(submitted))
    _check(
        namespace,
        "bytes of memory",
        quotas.memory_bytes_max,
        sum(map(_memory_bytes, there)),
        _memory_bytes(submitted),
    )


def check_jobs(quotas: Quotas, facts: Facts, namespace: str) -> None:
    """Raise ResourceExhausted where a namespace has all the jobs that it may have."""
    if quotas.jobs_max:
        _check(namespace, "jobs", quotas.jobs_max, len(_unended(facts, namespace)), 1)


def _check(namespace: str, what: str, limit: int, there: int, more: int) -> None:
    if limit and there + more > limit:
        raise ResourceExhausted(
            f"the namespace {namespace!r} may have {limit} {what} in jobs that are queued, running "
            f"or paused; it has {there}, and this job asks for {more}: wait for some to end, or "
            "cancel them",
            reason="QUOTA_EXCEEDED",
            details={"namespace": namespace, "limit": str(limit), "used": str(there)},
        )


def _unended(facts: Facts, namespace: str) -> list[JobSubmitted]:
    return [
        job.kept.submitted
        for job in facts.jobs.values()
        if not job.ended and job.spec.namespace == namespace
    ]


def _slots(submitted: JobSubmitted) -> int:
    return max(1, submitted.spec.resources.min_workers)


def _memory_bytes(submitted: JobSubmitted) -> int:
    each = max(submitted.worker_bytes, submitted.spec.resources.memory_bytes)
    return each * _slots(submitted)
