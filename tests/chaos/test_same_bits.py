"""Promise 2: faults do not change the answer, to the last bit."""

import signal
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.chaos.harm import Harm
from phalanx.chaos.schedule import FAULTS
from phalanx.reduction import Node, TreeReducer, full_mask, root
from phalanx.testing.arena import GUARD_S, add_blobs, arena, gated_job, leaves_of_a_step, wait_until

pytestmark = pytest.mark.slow


class ArrivalOrder(TreeReducer):
    """Sums what comes as it comes, which is what the tree is there to avoid."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.total: Any = None
        self.mask = 0

    @property
    def complete(self) -> bool:
        return self.mask == full_mask(root(self._width), self._width)

    @property
    def result(self) -> tuple[Any, int]:
        return self.total, self.mask

    def fill(self, node: Node, value: Any, mask: int) -> bool:
        self.mask |= mask << node.first
        if value is not None:
            self.total = value if self.total is None else self.total + value
        return True


def test_summing_in_arrival_order_would_give_other_bits(
    monkeypatch: pytest.MonkeyPatch, undisturbed_sha256: str
) -> None:
    """Without this the equalities below would prove nothing."""
    monkeypatch.setattr("phalanx.training.local_rounds.TreeReducer", ArrivalOrder)
    with phalanx.LocalCluster(workers=0) as alone:
        add_blobs(alone)
        result = alone.submit(gated_job()).wait(timeout_s=GUARD_S)
    assert result.steps == 60
    assert result.parameters_sha256 != undisturbed_sha256


@pytest.mark.same_bits
def test_any_number_of_workers(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 1) as ring:
        for workers in (1, 2, 3, 5, 8):
            ring.grow_to(workers)
            result = ring.cluster.submit(gated_job()).wait(timeout_s=GUARD_S)
            assert result.parameters_sha256 == undisturbed_sha256, f"with {workers} workers"
            assert result.bit_identical
            assert (result.examples_lost, result.examples_doubled) == (0, 0)


@pytest.mark.same_bits
def test_workers_killed_in_the_middle_of_a_leaf(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.submit(gated_job())
        for step in (5, 20, 40):
            ring.caught_at(job, step)
            victim = ring.caught_with_shards(job)
            lost = len(ring.events("WORKER_LOST"))
            ring.signal(victim)
            wait_until(lambda n=lost: len(ring.events("WORKER_LOST")) > n, "the death to be seen")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        moved = {each.incident_id for each in ring.events("SHARDS_MOVED")} - {""}
        assert len(moved) >= 3
        assert moved <= {each.incident_id for each in ring.events("RECOVERED")}
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


@pytest.mark.same_bits
def test_all_workers_killed_at_once(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 15)
        for victim in ("worker-1", "worker-2"):
            ring.signal(victim)
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256


@pytest.mark.same_bits
def test_a_worker_stopped_past_its_lease_and_continued(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.submit(gated_job(steps=60))
        victim = ring.caught_at(job, 10)[0]
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


@pytest.mark.same_bits
def test_a_worker_ten_times_slower_than_the_others(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 3, lease_s=10.0) as ring, Harm() as harm:
        job = ring.submit(gated_job())
        victim = ring.caught_at(job, 10)[0]
        assert harm.inflict(FAULTS["slow-worker"], ring.cluster.process(victim).pid)
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert not any(event.worker_id == victim for event in ring.events("WORKER_LOST")), (
            "slow is not dead: its heartbeats get through"
        )
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


@pytest.mark.same_bits
def test_workers_join_and_leave(tmp_path: Path, long_job: dict[str, Any], long_sha256: str) -> None:
    """One takes shards over and another gives its own away, both in the middle of the job."""
    with arena(tmp_path, 2, leaf_s=0.01, lease_s=10.0) as ring:

        def happened(kind: str, worker_id: str) -> bool:
            return any(event.worker_id == worker_id for event in ring.events(kind))

        job = ring.submit(long_job)
        # However long a process takes to start: meanwhile the job does not come to its end.
        ring.caught_at(job, 5)
        joined = ring.cluster.add_worker()
        wait_until(lambda: happened("WORKER_JOINED", joined), "the newcomer to join")

        def hosts() -> bool:
            ring.gate.let_pass(leaves_of_a_step(job))
            workers = job.refresh().progress.workers
            return any(each.worker_id == joined and each.shards for each in workers)

        wait_until(hosts, "the newcomer to hold shards")
        ring.gate.let_nobody_pass()
        both = {joined, "worker-1"}
        wait_until(lambda: both <= ring.in_a_leaf(), "leaves of the newcomer and of the leaver")
        holders = {each.worker_id for each in job.refresh().progress.workers if each.shards}
        assert both <= holders, "these leaves are copies"
        ring.cluster.drain("worker-1")

        def has_left() -> bool:
            # It stays until its successor has worked through a step.
            ring.gate.let_pass(leaves_of_a_step(job))
            return happened("WORKER_LEFT", "worker-1")

        wait_until(has_left, "the drained worker to leave")
        ring.gate.let_nobody_pass()
        holders = {each.worker_id for each in job.refresh().progress.workers if each.shards}
        assert not job.done, "it did not leave in the middle of the job"
        assert "worker-1" not in holders
        assert joined in holders
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert not ring.events("WORKER_LOST")
    assert result.parameters_sha256 == long_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
