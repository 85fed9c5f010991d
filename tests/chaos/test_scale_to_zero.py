"""A running job whose last worker is gone waits, says so, and goes on when another one comes."""

from pathlib import Path

import pytest

import phalanx
from phalanx.testing.arena import GUARD_S, Gate, add_blobs, arena, held_job, wait_until
from phalanx.testing.proxied_cluster import ProxiedCluster

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def wait_until_it_waits(cluster: phalanx.Cluster, job: phalanx.Job) -> None:
    """Wait until the job says for what, to those who ask and in an event; it is no failure."""
    wait_until(lambda: job.refresh().reason == "WAITING_FOR_WORKERS", "the job to say so")
    assert job.state == "RUNNING"
    assert "worker" in job.message.message
    assert not job.progress.workers

    def told() -> list[str]:
        events = (each for each in cluster.events(job.id) if each.type == "JOB_WAITING")
        return [each.message for each in events if each.details["reason"] == job.reason]

    # The event tells what was known when it began to wait, the job what is known now.
    assert "worker" in wait_until(told, "the event")[-1]


def check_end(cluster: phalanx.Cluster, job: phalanx.Job, sha256: str) -> None:
    """It ends as if nothing had happened, with no step done twice."""
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
    assert not job.message.failures
    assert not [each for each in cluster.events(job.id) if each.type == "STEPS_REPLAYED"]


def test_all_workers_are_drained_and_another_one_comes(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit_held(held_job(), workers=2)
        for worker_id in ("worker-1", "worker-2"):
            ring.cluster.drain(worker_id)
        ring.gate.release()
        wait_until(
            lambda: not [each for each in ring.cluster.processes() if each.role == "worker"],
            "the workers to leave",
        )
        wait_until_it_waits(ring.cluster, job)
        step = job.progress.step
        assert step < 60
        ring.cluster.add_worker()
        wait_until(lambda: job.refresh().progress.step > step, "a step of the new worker")
        assert job.reason != "WAITING_FOR_WORKERS"
        check_end(ring.cluster, job, undisturbed_sha256)


def test_all_workers_are_killed_and_one_comes_back(tmp_path: Path, undisturbed_sha256: str) -> None:
    gate = Gate(tmp_path)
    with ProxiedCluster(tmp_path, environment={"PHALANX_TEST_GATE": str(tmp_path)}) as network:
        try:
            add_blobs(network.cluster)
            gate.hold()
            job = network.cluster.submit(held_job())
            wait_until(lambda: len(gate.entered()) == 2, "both workers in the middle of a leaf")
            for worker in network.workers:
                worker.kill()
            wait_until_it_waits(network.cluster, job)
            gate.release()
            network.workers[0].restart()
            wait_until(lambda: job.refresh().progress.step > 1, "a step of the worker")
            assert job.reason != "WAITING_FOR_WORKERS"
            check_end(network.cluster, job, undisturbed_sha256)
        finally:
            gate.release()
