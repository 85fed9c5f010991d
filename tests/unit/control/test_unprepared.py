"""Workers that cannot prepare a set of tasks: told, tried again, left out, at the end blamed."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core.eligibility import PREPARE_TRIES
from coordinator.control.core.events import RetryJob
from phalanx.v1 import coordination_service_pb2 as pb

CAUSE = "there is no module 'solver': install it on the workers"


def cannot(cluster: Any, worker: str, times: int = 1, term: int = 1) -> None:
    for _ in range(times):
        failed = pb.LeafFailed(
            job_id="job-1",
            term=term,
            shard=-1,
            kind=pb.LeafFailed.KIND_RAISED,
            message=CAUSE,
            traceback="Traceback",
        )
        cluster.say(cluster.sessions[worker], leaf_failed=failed)


def told(cluster: Any) -> list[tuple[str, str]]:
    return [(e.worker_id, e.message) for e in cluster.events if e.type == "WORKER_INELIGIBLE"]


@pytest.fixture
def tasks(cluster: Any) -> Any:
    """Two workers that were given a set of tasks and are not ready for it."""
    cluster.aggregator()
    for name in ("w1", "w2"):
        cluster.worker(name)
    cluster.submit_tasks(10)
    assert set(cluster.core.jobs["job-1"].hosts) == {"w1", "w2"}
    return cluster


def test_each_try_is_told_with_its_cause(tasks: Any) -> None:
    cannot(tasks, "w1")
    assert told(tasks) == [
        ("w1", f"w1 cannot prepare the job: {CAUSE}; it tries again (try 1 of {PREPARE_TRIES})")
    ]
    assert "w1" in tasks.core.jobs["job-1"].hosts


def test_after_its_tries_a_worker_is_left_out_and_the_others_go_on(tasks: Any) -> None:
    cannot(tasks, "w1", PREPARE_TRIES)
    assert "it is left out" in told(tasks)[-1][1]
    assert set(tasks.core.jobs["job-1"].hosts) == {"w2"}
    assert tasks.told("w1", "revoke_job")
    assert tasks.state() == "RUNNING"
    tasks.advance(10.0)
    assert set(tasks.core.jobs["job-1"].hosts) == {"w2"}


def test_once_no_worker_can_the_job_fails_and_names_workers_and_cause(tasks: Any) -> None:
    cannot(tasks, "w1", PREPARE_TRIES)
    cannot(tasks, "w2", PREPARE_TRIES)
    job = tasks.job()
    assert (tasks.state(), job.reason) == ("FAILED", "JOB_NOT_PREPARED")
    (failure,) = job.failures
    assert list(failure.worker_ids) == ["w1", "w2"]
    assert failure.attempts == 2 * PREPARE_TRIES
    assert failure.traceback == "Traceback"
    assert f"w1: {CAUSE}" in failure.message
    tasks.call(RetryJob, "job-1")
    assert set(tasks.core.jobs["job-1"].hosts) == {"w1", "w2"}
    cannot(tasks, "w1", PREPARE_TRIES - 1, term=tasks.core.facts.jobs["job-1"].term)
    assert "w1" in tasks.core.jobs["job-1"].hosts


def test_a_worker_that_dies_in_between_is_not_blamed_for_it(tasks: Any) -> None:
    cannot(tasks, "w2", PREPARE_TRIES - 1)
    tasks.kill("w2")
    tasks.worker("w2", incarnation="w2-2")
    cannot(tasks, "w2")
    assert f"(try 1 of {PREPARE_TRIES})" in told(tasks)[-1][1]
    assert "w2" in tasks.core.jobs["job-1"].hosts


def test_the_death_of_the_only_one_that_can_ends_nothing(tasks: Any) -> None:
    cannot(tasks, "w1", PREPARE_TRIES)
    tasks.kill("w2")
    tasks.advance(60.0)
    job = tasks.job()
    assert (tasks.state(), job.reason) == ("RUNNING", "WAITING_FOR_WORKERS")
    assert f"w1 is left out: it cannot prepare the job: {CAUSE}" in job.message
    tasks.worker("w2", incarnation="w2-2")
    assert set(tasks.core.jobs["job-1"].hosts) == {"w2"}


def test_one_that_died_before_the_others_were_left_out_may_come_back_as_well(tasks: Any) -> None:
    tasks.kill("w2")
    cannot(tasks, "w1", PREPARE_TRIES)
    tasks.advance(60.0)
    assert (tasks.state(), tasks.job().reason) == ("RUNNING", "WAITING_FOR_WORKERS")
    tasks.worker("w2", incarnation="w2-2")
    assert set(tasks.core.jobs["job-1"].hosts) == {"w2"}
    cannot(tasks, "w2", PREPARE_TRIES)
    assert (tasks.state(), tasks.job().reason) == ("FAILED", "JOB_NOT_PREPARED")


def test_a_worker_that_was_mended_and_started_again_takes_part(tasks: Any) -> None:
    cannot(tasks, "w1", PREPARE_TRIES)
    tasks.kill("w1")
    tasks.worker("w1", incarnation="w1-2")
    assert set(tasks.core.jobs["job-1"].hosts) == {"w1", "w2"}


def test_what_failed_before_it_worked_is_forgotten(tasks: Any) -> None:
    cannot(tasks, "w1", PREPARE_TRIES - 1)
    ready = pb.WorkerJobReady(job_id="job-1", term=1)
    tasks.say(tasks.sessions["w1"], worker_job_ready=ready)
    cannot(tasks, "w1")
    assert f"(try 1 of {PREPARE_TRIES})" in told(tasks)[-1][1]


def test_what_one_says_that_does_not_host_the_job_counts_for_nothing(tasks: Any) -> None:
    cannot(tasks, "w1", PREPARE_TRIES)
    before = told(tasks)
    cannot(tasks, "w1")
    assert told(tasks) == before
