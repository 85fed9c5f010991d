"""What a namespace may have, and what it hears when it wants more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts
from coordinator.control.core.quotas import Quotas, check, check_jobs
from coordinator.control.core.state import CoreConfig
from coordinator.control.turns import Turns
from phalanx.errors import ResourceExhausted
from phalanx.v1.control_journal_pb2 import ControlRecord, JobChanged, JobSubmitted
from phalanx.v1.job_pb2 import Job


def submitted(
    job_id: str, namespace: str = "red", workers: int = 1, memory: int = 0
) -> JobSubmitted:
    result = JobSubmitted(job_id=job_id, worker_bytes=memory)
    result.spec.namespace = namespace
    result.spec.resources.min_workers = workers
    return result


def facts_of(*jobs: JobSubmitted) -> Facts:
    facts = Facts()
    for job in jobs:
        facts.apply(ControlRecord(job_submitted=job))
    return facts


def test_a_namespace_has_only_so_many_jobs_and_others_do_not_count() -> None:
    quotas = Quotas(jobs_max=2)
    facts = facts_of(submitted("a"), submitted("b", "blue"))
    check(quotas, facts, submitted("c"))
    facts.apply(ControlRecord(job_submitted=submitted("c")))
    with pytest.raises(ResourceExhausted, match=r"'red' may have 2 jobs .* it has 2") as caught:
        check(quotas, facts, submitted("d"))
    assert caught.value.reason == "QUOTA_EXCEEDED"
    assert caught.value.details == {"namespace": "red", "limit": "2", "used": "2"}
    with pytest.raises(ResourceExhausted):
        check_jobs(quotas, facts, "red")
    check(quotas, facts, submitted("d", "blue"))


@pytest.mark.parametrize("state", [Job.STATE_RUNNING, Job.STATE_PAUSED])
def test_jobs_count_until_they_have_ended(state: Job.State.ValueType) -> None:
    facts = facts_of(submitted("a"))
    facts.apply(ControlRecord(job_changed=JobChanged(job_id="a", state=state)))
    with pytest.raises(ResourceExhausted):
        check_jobs(Quotas(jobs_max=1), facts, "red")
    facts.apply(ControlRecord(job_changed=JobChanged(job_id="a", state=Job.STATE_CANCELLED)))
    check_jobs(Quotas(jobs_max=1), facts, "red")


def test_slots_and_memory_are_what_jobs_insist_on() -> None:
    facts = facts_of(submitted("a", workers=3, memory=100))
    check(Quotas(slots_max=5), facts, submitted("b", workers=2))
    with pytest.raises(ResourceExhausted, match=r"5 slots .* has 3, and this job asks for 3"):
        check(Quotas(slots_max=5), facts, submitted("b", workers=3))
    check(Quotas(memory_bytes_max=500), facts, submitted("b", workers=2, memory=100))
    with pytest.raises(ResourceExhausted, match=r"500 bytes of memory .* has 300"):
        check(Quotas(memory_bytes_max=500), facts, submitted("b", workers=2, memory=101))
    wants = submitted("b", workers=2, memory=1)
    wants.spec.resources.memory_bytes = 101
    with pytest.raises(ResourceExhausted):
        check(Quotas(memory_bytes_max=500), facts, wants)


def test_no_limit_is_no_limit() -> None:
    facts = facts_of(*(submitted(f"job-{number}") for number in range(50)))
    check(Quotas(jobs_max=0), facts, submitted("b", workers=1000, memory=2**50))


def test_the_core_refuses_and_journals_nothing(make_cluster: Any) -> None:
    cluster = make_cluster(CoreConfig(quotas=Quotas(jobs_max=1)))
    taken = cluster.submit("job-1", "r1")
    before = len(cluster.journal)
    refused = cluster.submit("job-2", "r2")
    assert isinstance(cluster.answers[refused], ResourceExhausted)
    assert len(cluster.journal) == before
    # What was taken already is answered as it was, whatever the quota says by now.
    assert cluster.answers[cluster.submit("job-1", "r1")] == cluster.answers[taken]


def test_a_retry_is_a_job_too(make_cluster: Any) -> None:
    cluster = make_cluster(CoreConfig(quotas=Quotas(jobs_max=1)))
    cluster.submit("job-1")
    failed = JobChanged(job_id="job-1", state=Job.STATE_FAILED)
    cluster.journal.append(ControlRecord(job_changed=failed))
    cluster.lead()
    cluster.submit("job-2")
    refused = cluster.call(ev.RetryJob, "job-1")
    assert isinstance(cluster.answers[refused], ResourceExhausted)


# -- turns


async def test_a_few_of_a_namespace_work_at_once_and_others_are_not_kept_waiting() -> None:
    turns = Turns(at_once=2, waiting_max=3)
    go = asyncio.Event()
    working: list[str] = []

    async def work(namespace: str) -> None:
        async with turns.of(namespace):
            working.append(namespace)
            await go.wait()

    tasks = [asyncio.create_task(work("red")) for _ in range(5)]
    tasks.append(asyncio.create_task(work("blue")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert working == ["red", "red", "blue"]
    with pytest.raises(ResourceExhausted, match="the namespace 'red' has 5 submissions under way"):
        await work("red")
    tasks[4].cancel()
    await asyncio.gather(tasks[4], return_exceptions=True)
    go.set()
    await asyncio.gather(*tasks[:4], tasks[5])
    assert working.count("red") == 4
    assert len(turns) == 0, "a namespace that is done leaves nothing behind"
