"""`kill -9` of each service in turn while a job runs, and what is promised then."""

import signal
from pathlib import Path

import pytest

from phalanx.testing.arena import GUARD_S, arena, gated_job, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def test_control_dies_and_training_goes_on(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2, lease_s=5.0) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 10)
        before = ring.cluster.describe().generation
        ring.signal("control-1")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.cluster.describe().generation > before
        assert not ring.events("STEPS_REPLAYED"), "a dead control must not roll anything back"
        assert not ring.events("WORKER_LOST")
    assert result.parameters_sha256 == undisturbed_sha256


def test_control_and_a_worker_die_together(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2, controls=2) as ring:
        job = ring.submit(gated_job())
        victim = ring.caught_at(job, 10)[0]
        before = ring.cluster.describe()
        ring.signal(before.leader)
        ring.signal(victim)
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.cluster.describe().generation > before.generation
        assert not ring.events("STEPS_REPLAYED"), "neither of them holds parameters"
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_a_leader_stopped_past_its_lease_and_continued(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 2, controls=2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 10)
        before = ring.cluster.describe()
        ring.signal(before.leader, signal.SIGSTOP)
        try:
            wait_until(
                lambda: ring.cluster.describe().generation > before.generation,
                "the standby to lead",
            )
        finally:
            ring.signal(before.leader, signal.SIGCONT)
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.cluster.describe().generation == before.generation + 1
    assert result.parameters_sha256 == undisturbed_sha256


def test_an_aggregator_dies_and_the_job_replays(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 25)
        ring.signal("aggregator-1")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.events("AGGREGATOR_LOST")
        assert ring.events("STEPS_REPLAYED")
    assert result.parameters_sha256 == undisturbed_sha256


def test_an_aggregator_dies_before_the_first_checkpoint(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 2)
        ring.signal("aggregator-1")
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256


def test_storage_dies_and_training_goes_on(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 15)
        ring.signal("storage")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.cluster.models.describe(result.model)
    assert result.parameters_sha256 == undisturbed_sha256


def test_everything_dies_at_once(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 25)
        for member in ring.cluster.processes():
            ring.signal(member.id)
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256


def test_pause_resume_on_another_number_of_workers(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 1) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 12)
        job.pause()
        ring.gate.release()
        wait_until(lambda: job.refresh().state == "PAUSED", "the pause")
        ring.cluster.add_worker()
        ring.cluster.add_worker()
        wait_until(lambda: len(ring.cluster.describe().workers) >= 3, "three workers")
        job.resume()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
