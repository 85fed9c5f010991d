"""All-reduce on real processes: the bits of a parameter server, and no step is lost twice."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from phalanx.sdk.job import Job
from phalanx.testing.arena import GUARD_S, Arena, arena, gated_job, stopped, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


BEGINS_BADLY = '''
"""The same model; the first that is to make the parameters that a job begins with never does."""

import inspect
import time

from gated import GATE, Gated


class BeginsBadly(Gated):
    def initial(self, seed):
        described = any(frame.function == "describe" for frame in inspect.stack())
        if not described and self.is_first():
            while True:
                time.sleep(1)
        return super().initial(seed)

    def is_first(self):
        try:
            (GATE / "hangs").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
'''


def all_reduce_job(**options: Any) -> dict[str, Any]:
    return gated_job(**options, all_reduce={})


def hosts(job: Job) -> set[str]:
    return {each.worker_id for each in job.refresh().progress.workers if each.shards}


def shards_of(job: Job, worker_id: str) -> set[int]:
    progress = job.refresh().progress
    ranges = [
        held for each in progress.workers if each.worker_id == worker_id for held in each.shards
    ]
    return {shard for first, count in ranges for shard in range(first, first + count)}


def copied_shards(ring: Arena) -> set[int]:
    """Shards whose leaves others computed as well, in some training step."""
    told = [each for each in ring.events("SPECULATION_STARTED") if "evaluation" not in each.message]
    return {int(shard) for each in told for shard in each.details["shards"].split(",")}


def nothing_was_rolled_back(ring: Arena, job: Job) -> None:
    """No step was computed again from a checkpoint, and the examples are those of every step."""
    assert not ring.events("STEPS_REPLAYED")
    result = job.wait(timeout_s=GUARD_S)
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
    assert result.bit_identical


def test_any_number_of_workers_gives_the_bits_of_a_parameter_server(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 1) as ring:
        served = ring.cluster.submit(gated_job()).wait(timeout_s=GUARD_S)
        assert served.parameters_sha256 == undisturbed_sha256
        for workers in range(1, 9):
            ring.grow_to(workers)
            job = ring.cluster.submit(all_reduce_job())
            assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256, workers
            nothing_was_rolled_back(ring, job)


def test_workers_killed_amid_steps_cost_the_open_step_and_roll_nothing_back(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 4) as ring:
        job = ring.submit(all_reduce_job())
        for step in (4, 15, 33):
            ring.caught_at(job, step)
            # Never the last one.
            wait_until(lambda: len(hosts(job)) >= 2, "two members")
            caught = wait_until(lambda: ring.in_a_leaf() & hosts(job), "a member in a leaf")
            victim = min(caught)
            before = job.refresh().progress.step
            lost = len(ring.events("WORKER_LOST"))
            moved = len(ring.events("SHARDS_MOVED"))
            ring.signal(victim)
            wait_until(lambda n=lost: len(ring.events("WORKER_LOST")) > n, "the death to be seen")
            wait_until(lambda n=moved: len(ring.events("SHARDS_MOVED")) > n, "a new term")
            assert job.refresh().progress.step >= before, "nothing is rolled back"
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
        nothing_was_rolled_back(ring, job)
        steps = [event.step for event in ring.events("RECOVERED")]
        assert len(steps) >= 3
        assert steps == sorted(steps)


def test_all_workers_killed_go_on_from_the_checkpoint(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(all_reduce_job())
        # On a busy machine checkpoints come later than every 10 steps.
        ring.caught_at(job, 25)

        def behind_a_checkpoint() -> bool:
            progress = job.refresh().progress
            return 0 < progress.checkpoint_step < progress.step

        wait_until(behind_a_checkpoint, "a step behind a checkpoint")
        killed = {each: ring.cluster.process(each).pid for each in ("worker-1", "worker-2")}
        for victim in killed:
            ring.signal(victim)
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
        assert all(ring.cluster.process(each).pid != pid for each, pid in killed.items())
        assert ring.events("WORKER_LOST")
        replayed = wait_until(lambda: ring.events("STEPS_REPLAYED"), "who loses steps to be told")
        assert all(event.step >= 10 for event in replayed)


def test_control_may_die_and_a_member_be_stopped(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.submit(all_reduce_job())
        ring.caught_at(job, 5)
        ring.signal("control-1")
        # Control notices the silence only of those that have come back to it.
        ring.workers_ready()
        victim = ring.cluster.process("worker-2").pid
        with stopped(victim):
            wait_until(lambda: ring.events("WORKER_LOST"), "its lease to be over")
            ring.caught_at(job, 25)
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
        nothing_was_rolled_back(ring, job)


def test_a_leaf_that_hangs_under_good_heartbeats_is_copied_by_other_members(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 3, lease_s=5.0) as ring:
        job = ring.submit(all_reduce_job())
        ring.caught_at(job, 5)
        wait_until(lambda: len(hosts(job)) == 3, "three members")
        victim = ring.caught_at(job, 15)[0]
        held = shards_of(job, victim)
        children = psutil.Process(ring.cluster.process(victim).pid).children(recursive=True)
        leaf = next(child.pid for child in children if child.pid in ring.gate.entered())
        with stopped(leaf):
            ring.gate.release()
            assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
        # By their numbers, not by name: while the gate is held, whose they are may be forgotten.
        assert copied_shards(ring) & held
        assert not ring.events("WORKER_LOST"), "its heartbeats never stopped"
        nothing_was_rolled_back(ring, job)


def test_a_leaf_that_hangs_before_the_first_step_is_copied_by_another_member(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 3, lease_s=5.0) as ring:
        ring.workers_ready()
        document = all_reduce_job()
        document["code"]["files"]["begins_badly.py"] = BEGINS_BADLY
        document["train"]["model"]["custom"]["entrypoint"] = "begins_badly:BeginsBadly"
        job = ring.cluster.submit(document)
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
        assert (ring.gate.folder / "hangs").exists()
        first = ring.events("SPECULATION_STARTED")[0]
        assert (first.step, first.details["shards"]) == (0, "0")
        assert not ring.events("WORKER_LOST"), "its heartbeats never stopped"
        nothing_was_rolled_back(ring, job)


def test_pause_resume_cancel_and_a_worker_that_leaves(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.submit(all_reduce_job())
        ring.caught_at(job, 5)
        job.pause()
        ring.gate.release()
        wait_until(lambda: job.refresh().state == "PAUSED", "the pause")
        ring.gate.hold()
        job.resume()
        wait_until(ring.in_a_leaf, "a leaf after the pause")
        ring.signal("worker-3", signal.SIGTERM)
        wait_until(lambda: ring.events("WORKER_LEFT"), "a worker to leave")
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
        nothing_was_rolled_back(ring, job)
        other = ring.submit(all_reduce_job())
        ring.caught_at(other, 3)
        other.cancel()
        ring.gate.release()
        wait_until(lambda: other.refresh().state == "CANCELLED", "the end")
