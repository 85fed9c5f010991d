"""What the jobs of one namespace may insist on together.

A job insists on `min_workers` slots, and on its memory in each of them, from its submission to its
end. What it uses beyond that is what nobody else wants at the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.control.core.facts import Facts, JobFacts
from coordinator.control.core.lifecycle import QUEUED
from phalanx.errors import ResourceExhausted
from phalanx.quotas import Namespaces
from phalanx.texts import number_of
from phalanx.v1.control_journal_pb2 import JobSubmitted


@dataclass(frozen=True)
class Quotas:
    """Limits of every namespace that `namespaces` does not say otherwise of; 0 stands for none."""

    jobs_max: int = 10_000
    slots_max: int = 0
    memory_bytes_max: int = 0
    running_jobs_max: int = 0
    queued_jobs_max: int = 0
    namespaces: Namespaces = field(default_factory=dict)

    def of(self, namespace: str) -> Quotas:
        """Return what holds for one namespace."""
        own = self.namespaces.get(namespace)
        if own is None:
            return self
        return Quotas(
            jobs_max=_either(own.jobs, self.jobs_max),
            slots_max=_either(own.slots, self.slots_max),
            memory_bytes_max=_either(own.memory_bytes, self.memory_bytes_max),
            running_jobs_max=_either(own.running_jobs, self.running_jobs_max),
            queued_jobs_max=_either(own.queued_jobs, self.queued_jobs_max),
        )


@dataclass(frozen=True)
class _Quota:
    """One limit: its name in the file of quotas, and what it counts in words."""

    name: str
    what: str
    limit: int

    def check(self, namespace: str, there: int, more: int) -> None:
        """Raise ResourceExhausted where so much more is too much."""
        if not self.limit or there + more <= self.limit:
            return
        raise ResourceExhausted(
            f"the namespace {namespace!r} may have {self.limit} {self.what} (quota {self.name}); "
            f"it has {there}, and this job asks for {more}: wait for some to end, or cancel them",
            reason="QUOTA_EXCEEDED",
            details={
                "namespace": namespace,
                "quota": self.name,
                "limit": str(self.limit),
                "used": str(there),
            },
        )


_UNENDED = "in jobs that are queued, running or paused"


def check(quotas: Quotas, facts: Facts, submitted: JobSubmitted) -> None:
    """Raise ResourceExhausted where one more job is more than its namespace may have."""
    namespace = submitted.spec.namespace
    check_jobs(quotas, facts, namespace)
    own = quotas.of(namespace)
    if own.slots_max == own.memory_bytes_max == 0:
        return
    there = [job.kept.submitted for job in _unended(facts, namespace)]
    slots = _Quota("slots", f"slots {_UNENDED}", own.slots_max)
    slots.check(namespace, sum(map(_slots, there)), _slots(submitted))
    memory = _Quota("memory_bytes", f"bytes of memory {_UNENDED}", own.memory_bytes_max)
    memory.check(namespace, sum(map(_memory_bytes, there)), _memory_bytes(submitted))


def check_jobs(quotas: Quotas, facts: Facts, namespace: str) -> None:
    """Raise ResourceExhausted where a namespace has all the jobs that it may have."""
    own = quotas.of(namespace)
    if own.jobs_max == own.queued_jobs_max == 0:
        return
    there = _unended(facts, namespace)
    unended = _Quota("jobs", "jobs that are queued, running or paused", own.jobs_max)
    unended.check(namespace, len(there), 1)
    queued = sum(job.state == QUEUED for job in there)
    _Quota("queued_jobs", "queued jobs", own.queued_jobs_max).check(namespace, queued, 1)


def why_it_waits(quotas: Quotas, namespace: str, running: int) -> str:
    """Return why no more jobs of a namespace may run; empty: another one may."""
    limit = quotas.of(namespace).running_jobs_max
    if not limit or running < limit:
        return ""
    return (
        f"the namespace {namespace!r} may have {number_of(limit, 'job')} running at once (quota "
        f"running_jobs); it has {running}"
    )


def check_queued(quotas: Quotas, facts: Facts, namespace: str) -> None:
    """Raise ResourceExhausted where no more jobs of a namespace may wait."""
    queued = sum(job.state == QUEUED for job in _unended(facts, namespace))
    limit = quotas.of(namespace).queued_jobs_max
    _Quota("queued_jobs", "queued jobs", limit).check(namespace, queued, 1)


def _either(own: int | None, of_all: int) -> int:
    return of_all if own is None else own


def _unended(facts: Facts, namespace: str) -> list[JobFacts]:
    return [job for job in facts.jobs.values() if not job.ended and job.spec.namespace == namespace]


def _slots(submitted: JobSubmitted) -> int:
    return max(1, submitted.spec.resources.min_workers)


def _memory_bytes(submitted: JobSubmitted) -> int:
    each = max(submitted.worker_bytes, submitted.spec.resources.memory_bytes)
    return each * _slots(submitted)
