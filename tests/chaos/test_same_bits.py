"""Promise 2: faults do not change the answer, to the last bit."""

import signal
from pathlib import Path

import numpy as np
import pytest

from phalanx.reduction import reduce_leaves
from phalanx.testing.arena import GUARD_S, arena, blobs, gated_job, wait_until

pytestmark = pytest.mark.slow


def test_summing_in_arrival_order_would_give_other_bits() -> None:
    """Without this the equalities below would prove nothing."""
    features, targets = blobs()
    leaves = {}
    for shard, rows in enumerate(np.array_split(np.arange(800), 11)):
        onehot = np.eye(3, dtype=np.float32)[targets[rows]]
        leaves[shard] = features[rows].T @ (onehot - 1 / 3)
    canonical = reduce_leaves(leaves, 11)
    backwards = leaves[10].copy()
    for shard in range(9, -1, -1):
        backwards += leaves[shard]
    assert canonical is not None
    assert canonical.tobytes() != backwards.tobytes()
    np.testing.assert_allclose(canonical, backwards, rtol=1e-2)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_any_number_of_workers(workers: int, tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, workers) as ring:
        result = ring.cluster.submit(gated_job()).wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == undisturbed_sha256
    assert result.bit_identical
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_workers_killed_in_the_middle_of_a_leaf(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.cluster.submit(gated_job())
        for step in (5, 20, 40):
            ring.at_step(job, step)
            victim = ring.caught_in_a_leaf()[0]
            lost = len(ring.events("WORKER_LOST"))
            ring.signal(victim)
            wait_until(lambda n=lost: len(ring.events("WORKER_LOST")) > n, "the death to be seen")
            ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert len(ring.events("RECOVERED")) >= 3
        assert ring.events("SHARDS_MOVED")
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_all_workers_killed_at_once(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.cluster.submit(gated_job())
        ring.at_step(job, 15)
        ring.caught_in_a_leaf()
        for victim in ("worker-1", "worker-2"):
            ring.signal(victim)
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256


def test_a_worker_stopped_past_its_lease_and_continued(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.cluster.submit(gated_job(steps=60))
        ring.at_step(job, 10)
        victim = ring.caught_in_a_leaf()[0]
        ring.signal(victim, signal.SIGSTOP)
        try:
            ring.gate.release()
            wait_until(
                lambda: any(event.worker_id == victim for event in ring.events("WORKER_LOST")),
                "the lease of the stopped worker to run out",
            )
        finally:
            ring.signal(victim, signal.SIGCONT)
        result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == undisturbed_sha256
    assert result.examples_doubled == 0


def test_workers_join_and_leave(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.cluster.submit(gated_job())
        ring.at_step(job, 5)
        joined = ring.cluster.add_worker()
        wait_until(
            lambda: (
                any(
                    worker.worker_id == joined and worker.shards
                    for worker in job.refresh().progress.workers
                )
                or job.done
            ),
            "the new worker to hold shards",
        )
        ring.cluster.drain("worker-1")
        result = job.wait(timeout_s=GUARD_S)
        assert not any(event.worker_id == "worker-1" for event in ring.events("WORKER_LOST"))
    assert result.parameters_sha256 == undisturbed_sha256
