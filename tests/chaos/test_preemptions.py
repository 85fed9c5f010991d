"""Pre-emption is nobody's fault: however often it comes, no shard is dropped or blamed for it."""

import contextlib
from pathlib import Path

import psutil
import pytest

import phalanx
from phalanx.testing.arena import GUARD_S, Arena, add_blobs, arena, gated_job, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

PREEMPTIONS = 5
STEPS = 400
"""Enough that the gate is held long before the end, however quick a step is."""


def _in_the_leaf(ring: Arena, killed: set[str]) -> list[str]:
    """Workers that are in the leaf now, except processes that were killed before."""
    entered = ring.gate.entered()
    found = []
    for member in ring.cluster.processes():
        if member.role == "worker" and member.pid and f"{member.id} {member.pid}" not in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(member.pid).children(recursive=True)
                if entered & {child.pid for child in children}:
                    found.append(member.id)
    return found


def test_a_shard_whose_workers_are_preempted_again_and_again_is_neither_dropped_nor_blamed(
    tmp_path: Path,
) -> None:
    """The job has one shard, so every death interrupts the same leaf of the same step."""
    with arena(tmp_path, 3) as ring:
        with phalanx.LocalCluster(workers=0) as inside, pytest.MonkeyPatch.context() as patch:
            patch.setenv("PHALANX_TEST_GATE", str(tmp_path))
            add_blobs(inside)
            expected = inside.submit(gated_job(steps=STEPS, shards=1)).wait(timeout_s=GUARD_S)
        job = ring.submit(gated_job(steps=STEPS, shards=1))
        ring.caught_at(job, 5)
        killed: set[str] = set()
        for _ in range(PREEMPTIONS):
            victim = wait_until(lambda: _in_the_leaf(ring, killed), "a worker in the leaf")[0]
            killed.add(f"{victim} {ring.cluster.process(victim).pid}")
            lost = len(ring.events("WORKER_LOST"))
            ring.signal(victim)
            wait_until(lambda n=lost: len(ring.events("WORKER_LOST")) > n, "the death to be seen")
            assert job.refresh().state == "RUNNING"
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert not ring.events("POISON_SHARD")
    assert len(killed) == PREEMPTIONS
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
    assert result.parameters_sha256 == expected.parameters_sha256


def test_the_job_outlives_its_coordinator_and_a_worker_that_dies_with_it(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        victim = ring.caught_at(job, 15)[0]
        generation = ring.cluster.describe().generation
        ring.signal("control-1")
        ring.signal(victim)
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.cluster.describe().generation > generation
        assert not ring.events("STEPS_REPLAYED"), "neither death takes back a committed step"
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
