"""What a namespace may have, and what it hears when it wants more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from coordinator.control.config import ControlConfig
from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts
from coordinator.control.core.quotas import Quotas, check, check_jobs
from coordinator.control.core.state import CoreConfig
from coordinator.control.turns import Turns
from phalanx.config import build
from phalanx.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from phalanx.quota_file import QuotaFile
from phalanx.quotas import Limits
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import ControlRecord, JobChanged, JobSubmitted
from phalanx.v1.job_pb2 import Job
from phalanx.v1.job_spec_pb2 import JobSpec
from storage.config import StorageConfig


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
    details = {"namespace": "red", "quota": "jobs", "limit": "2", "used": "2"}
    assert caught.value.details == details
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


def test_a_namespace_may_have_limits_of_its_own() -> None:
    limits = Limits(jobs=1, slots=0, memory_bytes=7)
    quotas = Quotas(jobs_max=5, slots_max=3, namespaces={"red": limits})
    assert quotas.of("red") == Quotas(jobs_max=1, slots_max=0, memory_bytes_max=7)
    assert quotas.of("blue") == quotas
    check(quotas, facts_of(submitted("a", "blue")), submitted("b", workers=9))
    with pytest.raises(ResourceExhausted, match="may have 3 slots"):
        check(quotas, Facts(), submitted("b", "blue", workers=9))


def test_jobs_that_are_queued_have_a_limit_of_their_own() -> None:
    facts = facts_of(submitted("a"), submitted("b"))
    with pytest.raises(ResourceExhausted, match=r"2 queued jobs .*; it has 2") as caught:
        check_jobs(Quotas(queued_jobs_max=2), facts, "red")
    assert caught.value.details["quota"] == "queued_jobs"
    running = JobChanged(job_id="a", state=Job.STATE_RUNNING)
    facts.apply(ControlRecord(job_changed=running))
    check_jobs(Quotas(queued_jobs_max=2), facts, "red")


def in_namespace(name: str) -> Any:
    def edit(spec: JobSpec) -> None:
        spec.namespace = name

    return edit


@pytest.fixture
def crowded(make_cluster: Any) -> Any:
    """Two jobs of a namespace of which one may run, and one of another."""
    cluster = make_cluster(CoreConfig(quotas=Quotas(running_jobs_max=1)))
    cluster.aggregator("a1")
    cluster.worker("w1")
    for job_id, namespace in (("job-1", "red"), ("job-2", "red"), ("job-3", "blue")):
        cluster.submit(job_id, edit=in_namespace(namespace))
    return cluster


def test_only_so_many_jobs_of_a_namespace_run_and_the_next_waits_for_its_turn(crowded: Any) -> None:
    assert [crowded.state(f"job-{each}") for each in (1, 2, 3)] == ["RUNNING", "QUEUED", "RUNNING"]
    assert crowded.job("job-2").reason == "QUEUED_BY_QUOTA"
    expected = "'red' may have 1 job running at once (quota running_jobs); it has 1"
    assert expected in crowded.job("job-2").message
    crowded.call(ev.CancelJob, "job-1")
    assert crowded.state("job-2") == "RUNNING"


def test_a_job_that_is_paused_lets_the_next_one_run(crowded: Any) -> None:
    crowded.call(ev.PauseJob, "job-1")
    crowded.report("job-1", 7, outcome=pb.JobReport.OUTCOME_PAUSED, checkpoint_step=7)
    assert crowded.state("job-1") == "PAUSED"
    assert crowded.state("job-2") == "RUNNING"


def paused(cluster: Any, root: str = "a1") -> None:
    """Pause the first job: the second runs in its place."""
    cluster.call(ev.PauseJob, "job-1")
    cluster.report("job-1", 7, root, outcome=pb.JobReport.OUTCOME_PAUSED, checkpoint_step=7)
    assert cluster.state("job-2") == "RUNNING"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"quotas": Quotas(running_jobs_max=1)}, "QUEUED_BY_QUOTA"),
        ({"running_jobs_max": 1}, "QUEUED_BEHIND_OTHERS"),
    ],
)
def test_a_job_that_is_resumed_waits_for_its_turn(
    make_cluster: Any, limits: Any, reason: str
) -> None:
    """If it did not wait, all would run at once that had ever been paused; if it were refused,
    each place would go to a job that waits, and never to this one."""
    cluster = make_cluster(CoreConfig(**limits))
    cluster.aggregator("a1")
    cluster.worker("w1")
    for job_id in ("job-1", "job-2"):
        cluster.submit(job_id, edit=in_namespace("red"))
    paused(cluster)
    assert cluster.answers[cluster.call(ev.ResumeJob, "job-1")].job.state == Job.STATE_QUEUED
    assert (cluster.state("job-1"), cluster.job("job-1").reason) == ("QUEUED", reason)
    cluster.advance(1.0)
    cluster.submit("job-3", edit=in_namespace("red"))
    cluster.call(ev.CancelJob, "job-2")
    assert [cluster.state(f"job-{each}") for each in (1, 3)] == ["RUNNING", "QUEUED"]
    assert "JOB_RESUMED" in cluster.types()
    assert cluster.core.facts.jobs["job-1"].kept.changed.progress.step == 7


@pytest.mark.parametrize("ended", [False, True])
def test_a_term_raised_before_a_pause_begins_no_job_out_of_its_turn(
    make_cluster: Any, ended: bool
) -> None:
    """A job is paused while storage raises its term, and resumed before storage has answered."""
    cluster = make_cluster(CoreConfig(range_min_bytes=1, running_jobs_max=1), parameters=163840)
    for name in ("a1", "a2"):
        cluster.aggregator(name)
    cluster.worker("w1")
    for job_id in ("job-1", "job-2"):
        cluster.submit(job_id)
    assert len(cluster.core.facts.jobs["job-1"].ranges) == 2
    root = cluster.core.facts.jobs["job-1"].ranges[0].aggregator_id
    cluster.storage_up = False
    cluster.aggregator({"a1": "a2", "a2": "a1"}[root], incarnation="holds nothing")
    raising = cluster.operations.pop()
    cluster.storage_up = True
    paused(cluster, root)
    cluster.call(ev.ResumeJob, "job-1")
    if ended:
        cluster.call(ev.CancelJob, "job-2")
    states = [cluster.state(f"job-{each}") for each in (1, 2)]
    assert states == ["QUEUED", "CANCELLED" if ended else "RUNNING"]
    cluster.operations.append(raising)
    cluster.run_operations()
    assert [cluster.state(f"job-{each}") for each in (1, 2)] == (
        ["RUNNING", "CANCELLED"] if ended else ["QUEUED", "RUNNING"]
    )


def test_a_job_that_waits_to_be_resumed_counts_as_queued(make_cluster: Any) -> None:
    quotas = Quotas(running_jobs_max=1, queued_jobs_max=1)
    cluster = make_cluster(CoreConfig(quotas=quotas))
    cluster.aggregator("a1")
    cluster.worker("w1")
    for job_id in ("job-1", "job-2"):
        cluster.submit(job_id, edit=in_namespace("red"))
    paused(cluster)
    cluster.submit("job-3", edit=in_namespace("red"))
    refused = cluster.answers[cluster.call(ev.ResumeJob, "job-1")]
    assert isinstance(refused, ResourceExhausted)
    assert refused.details["quota"] == "queued_jobs"
    assert cluster.state("job-1") == "PAUSED"


def test_a_job_that_waits_to_be_resumed_can_be_cancelled(crowded: Any) -> None:
    paused(crowded)
    crowded.call(ev.ResumeJob, "job-1")
    crowded.call(ev.CancelJob, "job-1")
    assert crowded.state("job-1") == "CANCELLED"
    assert crowded.state("job-2") == "RUNNING"


def test_a_job_that_waits_to_be_resumed_can_be_paused_again(crowded: Any) -> None:
    """Else who resumed it too early could only cancel it."""
    paused(crowded)
    crowded.call(ev.ResumeJob, "job-1")
    answer = crowded.answers[crowded.call(ev.PauseJob, "job-1")]
    assert (answer.job.state, crowded.state("job-1")) == (Job.STATE_PAUSED, "PAUSED")
    assert crowded.core.facts.jobs["job-1"].kept.changed.progress.step == 7
    crowded.call(ev.CancelJob, "job-2")
    assert crowded.state("job-1") == "PAUSED"
    crowded.call(ev.ResumeJob, "job-1")
    assert crowded.state("job-1") == "RUNNING"
    refused = crowded.answers[crowded.call(ev.PauseJob, crowded_waiter(crowded))]
    assert "cannot pause" in refused.message


def crowded_waiter(crowded: Any) -> str:
    """Submit a job that is queued and has never run."""
    crowded.submit("job-4", edit=in_namespace("red"))
    assert crowded.state("job-4") == "QUEUED"
    return "job-4"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_term_that_is_raised_for_a_job_that_is_paused_again_begins_nothing(
    make_cluster: Any, resumed: bool
) -> None:
    cluster = make_cluster(CoreConfig(running_jobs_max=1))
    cluster.aggregator("a1")
    cluster.worker("w1")
    for job_id in ("job-1", "job-2", "job-3"):
        cluster.submit(job_id)
    paused(cluster)
    cluster.advance(1.0)
    cluster.call(ev.ResumeJob, "job-1")
    cluster.call(ev.CancelJob, "job-3")
    run_operations, cluster.run_operations = cluster.run_operations, lambda: None
    cluster.call(ev.CancelJob, "job-2")
    cluster.feed(cluster._answer_operation(cluster.operations.pop(0)))
    (raising,) = cluster.operations
    cluster.operations.clear()
    cluster.run_operations = run_operations
    cluster.call(ev.PauseJob, "job-1")
    cluster.submit("job-4")
    assert [cluster.state(f"job-{each}") for each in (1, 4)] == ["PAUSED", "RUNNING"]
    if resumed:
        cluster.call(ev.ResumeJob, "job-1")
    cluster.operations.append(raising)
    cluster.run_operations()
    first = "QUEUED" if resumed else "PAUSED"
    assert [cluster.state(f"job-{each}") for each in (1, 4)] == [first, "RUNNING"]


def test_a_quota_that_is_raised_holds_at_once(crowded: Any) -> None:
    crowded.feed(ev.QuotasChanged({"blue": Limits(running_jobs=9)}))
    assert crowded.state("job-2") == "QUEUED"
    crowded.feed(ev.QuotasChanged({"red": Limits(running_jobs=2)}))
    assert crowded.state("job-2") == "RUNNING"


# -- the file


def test_the_file_says_what_single_namespaces_may_have(tmp_path: Path) -> None:
    path = tmp_path / "quotas.json"
    path.write_text('{"namespaces": {"red": {"jobs": 3, "bytes": "2GiB"}, "blue": {}}}')
    file = QuotaFile(path)
    version, found = file.read()
    assert found == {"red": Limits(jobs=3, bytes=2 * 2**30), "blue": Limits()}
    assert file.read()[0] == version
    # One that is broken changes nothing; one that is right again does.
    path.write_text('{"namespaces": {"red": {"jobs": 3')
    assert file.read() == (version, found)
    path.write_text('{"namespaces": {}}')
    assert file.read() == (version + 1, {})
    assert QuotaFile(None).read() == (0, {})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "of the form"),
        ("[]", "of the form"),
        ('{"namespaces": []}', "of the form"),
        ('{"namespaces": {}, "more": 1}', "of the form"),
        ('{"namespaces": {"../red": {}}}', "not allowed"),
        ('{"namespaces": {"red": 3}}', "red: must be an object"),
        ('{"namespaces": {"red": {"job": 3}}}', "'job' is no limit; there are bytes, jobs"),
        ('{"namespaces": {"red": {"jobs": -1}}}', "jobs must be a whole number"),
        ('{"namespaces": {"red": {"jobs": true}}}', "jobs must be a whole number"),
        ('{"namespaces": {"red": {"jobs": "3"}}}', "jobs must be a whole number"),
        ('{"namespaces": {"red": {"bytes": "3 apples"}}}', "bytes is not a size"),
        (f'{{"namespaces": {{"red": {{"bytes": "{"9" * 400}.0"}}}}}}', "bytes is not a size"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, text: str, wrong: str
) -> None:
    path = tmp_path / "quotas.json"
    path.write_text(text)
    with pytest.raises(FailedPrecondition) as caught:
        QuotaFile(path).read()
    assert caught.value.reason == "BAD_QUOTA_FILE"
    assert wrong in caught.value.message
    for service, more in ((ControlConfig, {}), (StorageConfig, {"state": str(tmp_path)})):
        with pytest.raises(InvalidArgument) as refused:
            build(service, {"quotas": str(path), **more}, {})
        (violation,) = refused.value.violations
        assert "quotas" in violation.field
        assert wrong in violation.message


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
