"""A wall clock that is set forward or back makes nothing forgotten: only elapsed time does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.control.cluster_servicer import ClusterServicer
from coordinator.control.core import events as ev
from coordinator.control.core.clock import NANOS, Instant
from coordinator.control.core.facts import Facts
from phalanx.v1 import cluster_service_pb2
from phalanx.v1.job_spec_pb2 import JobSpec

DAY_S = 24 * 3600.0


@pytest.fixture
def jumping(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster whose wall clock is `cluster.offset_s` off."""
    right = type(cluster).now

    def now(self: Any) -> Instant:
        exact = right.fget(self)
        return replace(exact, unix_nanos=exact.unix_nanos + int(self.offset_s * NANOS))

    cluster.offset_s = 0.0
    monkeypatch.setattr(type(cluster), "now", property(now))
    return cluster


def submitted(cluster: Any, job_id: str) -> str:
    """The job that a submission with the request id `nightly` leads to."""
    token = cluster.submit(job_id, request_id="nightly")
    job: str = cluster.answers[token].job.id
    return job


@pytest.mark.parametrize("jump_s", [25 * 3600.0, 400 * DAY_S, -400 * DAY_S])
def test_a_repeated_submission_is_the_same_job_after_a_jump(jumping: Any, jump_s: float) -> None:
    assert submitted(jumping, "job-1") == "job-1"
    jumping.offset_s = jump_s
    assert submitted(jumping, "job-2") == "job-1"
    # Nor does time that really goes on stop to count.
    jumping.advance(DAY_S - 120, tick_s=600.0)
    assert submitted(jumping, "job-3") == "job-1"
    jumping.advance(240, tick_s=60.0)
    assert submitted(jumping, "job-4") == "job-4"


@pytest.mark.parametrize("jump_s", [25 * 3600.0, -400 * DAY_S])
def test_so_it_is_where_a_machine_with_another_clock_takes_over(
    jumping: Any, jump_s: float
) -> None:
    assert submitted(jumping, "job-1") == "job-1"
    jumping.offset_s = jump_s
    jumping.lead()
    assert submitted(jumping, "job-2") == "job-1"


def test_the_time_until_a_take_over_counts_as_far_as_it_is_believed(jumping: Any) -> None:
    assert submitted(jumping, "job-1") == "job-1"
    jumping.advance(DAY_S - 1800, tick_s=600.0)
    jumping.submit("job-2", request_id="other")
    jumping.time_s += 2000.0
    jumping.lead()
    assert submitted(jumping, "job-3") == "job-3"


def test_steps_survive_in_a_snapshot(jumping: Any) -> None:
    assert submitted(jumping, "job-1") == "job-1"
    jumping.offset_s = 25 * 3600.0
    jumping.advance(1.0)
    copied = Facts()
    for record in jumping.durable.snapshot():
        copied.apply(record)
    assert copied.digest() == jumping.durable.digest()
    assert copied.told_unix_nanos == jumping.durable.told_unix_nanos
    jumping.journal = list(jumping.durable.snapshot())
    jumping.lead()
    assert submitted(jumping, "job-2") == "job-1"


def test_a_snapshot_is_as_old_as_its_newest_fact_whatever_times_its_jobs_have(
    jumping: Any,
) -> None:
    jumping.offset_s = 30 * 3600.0
    assert submitted(jumping, "job-1") == "job-1"
    jumping.offset_s = 0.0
    jumping.advance(1.0)
    jumping.journal = list(jumping.durable.snapshot())
    jumping.lead()
    assert submitted(jumping, "job-2") == "job-1"


def test_an_ended_job_is_kept_for_its_time(jumping: Any) -> None:
    def short(spec: JobSpec) -> None:
        spec.retain.seconds = 3600

    jumping.submit("job-1", edit=short)
    jumping.call(ev.CancelJob, "job-1")
    ended = jumping.job().end_time.ToNanoseconds()
    jumping.offset_s = 7200.0
    jumping.advance(60.0)
    assert "job-1" in jumping.core.facts.jobs
    assert jumping.job().end_time.ToNanoseconds() == ended
    jumping.advance(3600.0, tick_s=60.0)
    assert "job-1" not in jumping.core.facts.jobs


def test_leaders_whose_clocks_differ_by_less_than_a_minute_make_nothing_older(
    jumping: Any,
) -> None:
    """What one of them counts too little the next one would count again, on and on."""

    def short(spec: JobSpec) -> None:
        spec.retain.seconds = 600

    jumping.submit("job-1", edit=short)
    jumping.call(ev.CancelJob, "job-1")
    for _ in range(60):
        jumping.offset_s = -50.0 - jumping.offset_s
        jumping.lead()
    jumping.advance(580.0, tick_s=10.0)
    assert "job-1" in jumping.core.facts.jobs
    jumping.advance(40.0, tick_s=10.0)
    assert "job-1" not in jumping.core.facts.jobs


def test_a_leader_whose_clock_is_behind_keeps_an_ended_job_by_that_much_longer(
    jumping: Any,
) -> None:
    def short(spec: JobSpec) -> None:
        spec.retain.seconds = 600

    jumping.submit("job-1", edit=short)
    jumping.call(ev.CancelJob, "job-1")
    jumping.offset_s = -50.0
    jumping.lead()
    jumping.advance(630.0, tick_s=10.0)
    assert "job-1" in jumping.core.facts.jobs
    jumping.advance(40.0, tick_s=10.0)
    assert "job-1" not in jumping.core.facts.jobs


def test_small_corrections_are_no_step(jumping: Any) -> None:
    jumping.advance(10.0)
    jumping.offset_s = 5.0
    jumping.advance(10.0)
    assert not any(each.HasField("clock_stepped") for each in jumping.journal)


@pytest.mark.parametrize("sign", [1, -1])
def test_small_corrections_add_up_to_a_step(jumping: Any, sign: int) -> None:
    assert submitted(jumping, "job-1") == "job-1"
    for count in range(1, 24 * 60 + 10):
        jumping.offset_s = sign * count * 59.0
        jumping.advance(1.0)
    assert submitted(jumping, "job-2") == "job-1"


@pytest.mark.parametrize("jump_s", [30.0, -30.0])
def test_a_recovery_takes_as_long_as_it_takes_whatever_wall_clocks_say(
    jumping: Any, running: Any, jump_s: float
) -> None:
    running.kill("w2")
    jumping.offset_s = jump_s
    running.time_s += 0.5
    running.report("job-1", 3, since_commit_s=0.125)
    recovered = running.events[-1]
    assert (recovered.type, recovered.details["commit_s"]) == ("RECOVERED", "0.375000")
    measured = {
        dict(each.labels)["phase"]: each.value
        for each in running.observed
        if each.metric == "recovery_seconds"
    }
    assert measured["total"] == pytest.approx(0.375)


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_job_has_waited_as_long_as_it_has(jumping: Any, jump_s: float) -> None:
    jumping.aggregator()
    jumping.submit()
    jumping.offset_s = jump_s
    jumping.advance(10.0)
    jumping.worker("w1")
    waited = [each.value for each in jumping.observed if each.metric == "job_queue_seconds"]
    assert waited == [pytest.approx(10.0)]


def test_a_jump_does_not_move_a_job_up_in_the_queue(jumping: Any) -> None:
    def urgent(spec: JobSpec) -> None:
        spec.priority = 60

    jumping.submit("job-1")
    jumping.offset_s = DAY_S
    jumping.submit("job-2", edit=urgent)
    jumping.aggregator()
    jumping.worker("w1")
    asked = [each.plan.job_id for each in jumping.told("w1", "describe_job")]
    assert asked[0] == "job-2"


async def workers_by_pages(cluster: Any, between: Any) -> list[str]:
    """All workers as they are listed one by one, with something that happens after the second."""
    process: Any = SimpleNamespace(
        leading=lambda: SimpleNamespace(core=cluster.core, incomplete=lambda: "")
    )
    servicer, context, seen = ClusterServicer(process), None, list[str]()
    request = cluster_service_pb2.ListWorkersRequest(page_size=1)
    while True:
        answer = await servicer.ListWorkers(request, context)  # type: ignore[arg-type]
        seen += [worker.id for worker in answer.workers]
        request.page_token = answer.next_page_token
        if not request.page_token:
            return seen
        if len(seen) == 2:
            between()


@pytest.mark.parametrize("jump_s", [-400 * DAY_S, 0.0, 400 * DAY_S])
async def test_pages_list_every_worker_once_although_some_are_started_again(
    jumping: Any, jump_s: float
) -> None:
    names = ["w1", "w2", "w3", "w4"]
    for name in names:
        jumping.time_s += 1.0
        jumping.worker(name)

    def started_again() -> None:
        jumping.offset_s = jump_s
        for name in names:
            jumping.kill(name)
            jumping.worker(name, incarnation=f"{name}-2")

    assert sorted(await workers_by_pages(jumping, started_again)) == names


async def test_pages_list_every_worker_once_although_another_leader_takes_over(
    jumping: Any,
) -> None:
    names = ["w1", "w2", "w3", "w4"]
    for name in names:
        jumping.worker(name)

    def taken_over() -> None:
        jumping.time_s += 1.0
        jumping.lead()
        for name in names:
            jumping.worker(name)

    assert sorted(await workers_by_pages(jumping, taken_over)) == names
