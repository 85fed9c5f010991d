"""The loss of a leader is told as a story: fenced, replayed, adopted, committed."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.job_pb2 import Event

WORKERS = ("w1", "w2", "w3")


def take_over(cluster: Any) -> Event:
    """control-0 falls silent; its lease is taken 2 s later and the journal is read in 0.5 s."""
    silent_s = cluster.time_s
    cluster.time_s += 2.5
    cluster.lead(ev.LostLeader("control-0", silent_s, silent_s + 2.0))
    took_over: Event = next(each for each in cluster.events if each.type == "CONTROL_TOOK_OVER")
    return took_over


def held(cluster: Any, name: str) -> pb.HeldWorkerJob:
    assigned = cluster.told(name, "assign_job")[-1]
    job = pb.HeldWorkerJob(job_id="job-1", term=1, placement=assigned.placement, ready=True)
    job.train_nodes.extend(assigned.train_nodes)
    return job


def back(cluster: Any, jobs: dict[str, pb.HeldWorkerJob]) -> None:
    """The aggregator and the workers come back with what they hold, 0.25 s after one another."""
    ranges = pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0], version=9)
    cluster.aggregator("a1", held_ranges=[ranges])
    for name, job in jobs.items():
        cluster.time_s += 0.25
        cluster.worker(name, held_jobs=[job])


def test_a_lost_leader_is_an_incident_from_its_silence_to_the_next_step(running: Any) -> None:
    running.report("job-1", 5)
    jobs = {name: held(running, name) for name in WORKERS}
    began_s = running.now.unix_nanos / 1e9
    took_over = take_over(running)
    assert took_over.incident_id == "incident-2-1"
    assert "in the place of control-0" in took_over.message
    assert took_over.details["cause"] == "control_lost"
    assert took_over.details["member"] == "control-0"
    assert float(took_over.details["began_unix_s"]) == pytest.approx(began_s, abs=1e-3)
    assert float(took_over.details["fenced_after_s"]) == pytest.approx(2.0)
    assert float(took_over.details["replayed_after_s"]) == pytest.approx(2.5)

    back(running, jobs)
    joined = [each for each in running.events if each.type == "WORKER_JOINED"]
    assert {each.incident_id for each in joined} == {took_over.incident_id}
    running.time_s += 0.125
    running.report("job-1", 9)
    recovered = running.events[-1]
    assert (recovered.type, recovered.incident_id) == ("RECOVERED", took_over.incident_id)
    assert (recovered.job_id, recovered.step) == ("job-1", 9)
    phases = {
        name.removesuffix("_after_s"): float(value)
        for name, value in recovered.details.items()
        if name.endswith("_after_s")
    }
    expected = {"fenced": 2.0, "replayed": 2.5, "adopted": 3.25, "committed": 3.375}
    assert phases == pytest.approx(expected)
    assert not running.core.incidents
    measured = {
        dict(each.labels)["phase"]: each.value
        for each in running.observed
        if dict(each.labels).get("cause") == "control_lost"
    }
    wanted = {"detect": 2.0, "replay": 0.5, "adopt": 0.75, "commit": 0.875, "total": 3.375}
    assert measured == pytest.approx(wanted)


def test_steps_committed_before_anybody_is_back_do_not_end_it(running: Any) -> None:
    """They were on their way anyway: the new leader had no part in them."""
    jobs = {name: held(running, name) for name in WORKERS}
    take_over(running)
    running.time_s += 0.01
    back(running, jobs)
    running.report("job-1", 9)
    assert "RECOVERED" not in running.types()
    running.time_s += 0.01
    running.report("job-1", 10)
    assert running.types()[-1] == "RECOVERED"


def test_a_worker_without_a_job_in_hand_is_no_part_of_it(running: Any) -> None:
    take_over(running)
    running.worker("w4")
    joined = next(each for each in running.events if each.type == "WORKER_JOINED")
    assert not joined.incident_id


def test_the_end_of_the_job_ends_it_too(running: Any) -> None:
    take_over(running)
    assert running.core.incidents
    running.call(ev.CancelJob, "job-1")
    assert running.state() == "CANCELLED"
    assert not running.core.incidents


def test_without_a_running_job_it_is_told_and_over(cluster: Any) -> None:
    took_over = take_over(cluster)
    assert took_over.incident_id
    assert took_over.details["cause"] == "control_lost"
    assert not cluster.core.incidents


def test_a_leader_that_handed_over_is_no_incident(running: Any) -> None:
    running.lead()
    (took_over,) = [each for each in running.events if each.type == "CONTROL_TOOK_OVER"]
    assert not took_over.incident_id
    assert not took_over.details
    assert not running.core.incidents


def test_two_losses_of_one_control_process_are_two_incidents(cluster: Any) -> None:
    assert take_over(cluster).incident_id != take_over(cluster).incident_id
