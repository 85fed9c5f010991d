"""Workers that are late with independent tasks: the first sign of an incident, or of nothing."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.job_pb2 import Event


@pytest.fixture
def tasks(cluster: Any) -> Any:
    """Two workers that run a set of tasks."""
    cluster.aggregator()
    for name in ("w1", "w2"):
        cluster.worker(name)
    cluster.submit_tasks(10)
    for name in ("w1", "w2"):
        ready = pb.WorkerJobReady(job_id="job-1", term=1)
        cluster.say(cluster.sessions[name], worker_job_ready=ready)
    assert cluster.state() == "RUNNING"
    return cluster


def late(tasks: Any, worker: str = "w1", cause: str = "late") -> Event:
    details = {"cause": cause, "tasks": "3", "worker_id": worker}
    message = pb.MemberEvent(
        type="SPECULATION_STARTED", job_id="job-1", message="copied", details=details
    )
    tasks.say(tasks.sessions["a1"], member_event=message)
    event: Event = tasks.events[-1]
    assert event.type == "SPECULATION_STARTED"
    return event


def report(tasks: Any, step: int, **late_s: float) -> None:
    workers = [pb.LateWorker(worker_id=name, late_s=value) for name, value in late_s.items()]
    tasks.report("job-1", step, late_workers=workers)


def of_type(tasks: Any, kind: str) -> list[Event]:
    return [event for event in tasks.events if event.type == kind]


def test_a_worker_that_says_nothing_and_is_then_lost_is_one_incident(tasks: Any) -> None:
    first = late(tasks, cause="silent")
    assert (first.worker_id, first.details["cause"]) == ("w1", "silent")
    for _ in range(6):
        report(tasks, 1, w1=0.5)
        tasks.time_s += 0.5
        tasks.heartbeats("w2", "a1")
        tasks.feed(ev.Tick())
    (lost,) = of_type(tasks, "WORKER_LOST")
    assert first.incident_id == lost.incident_id != ""


@pytest.mark.parametrize("told", [True, False])
def test_one_that_delivers_is_well_again(tasks: Any, told: bool) -> None:
    """Also where it does so before the next report."""
    first = late(tasks)
    if told:
        report(tasks, 1, w1=0.3)
        assert late(tasks).incident_id == first.incident_id, "it is the same trouble still"
    report(tasks, 2)
    second = late(tasks)
    assert "" != first.incident_id != second.incident_id != ""


def test_a_task_that_takes_long_takes_nothing_from_its_worker(tasks: Any) -> None:
    late(tasks)
    for _ in range(10):
        tasks.advance(0.5)
        report(tasks, 1, w1=60.0)
    assert not of_type(tasks, "WORKER_SUSPECTED")
    assert not tasks.core.jobs["job-1"].set_aside


def test_of_a_worker_that_is_not_there_any_more_no_incident_is_opened(tasks: Any) -> None:
    event = late(tasks, "w9")
    assert (event.incident_id, event.worker_id) == ("", "w9")
    assert not tasks.core.episodes
