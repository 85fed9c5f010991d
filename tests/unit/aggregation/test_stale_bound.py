"""What a bound on staleness wins against workers that are slow at times, in virtual time."""

from __future__ import annotations

import heapq
import random

import numpy as np
import pytest

from coordinator.aggregation.core.effects import Ended
from coordinator.aggregation.core.making import make_ranges
from phalanx.testing.ranges import make_plan
from phalanx.testing.starts import ScriptedWorker, StartedLeaf, StartedLeaves, asynchronous_plan

pytestmark = pytest.mark.slow

WORKERS = 8
STEPS = 300
SLOW_SHARE, SLOWER = 0.05, 8.0


def times(seed: int) -> list[list[float]]:
    """How long each step of each shard takes: 1, and at random 8."""
    draw = random.Random(seed)
    return [
        [SLOWER if draw.random() < SLOW_SHARE else 1.0 for _ in range(STEPS)]
        for _ in range(WORKERS)
    ]


def synchronous_s(took_s: list[list[float]]) -> float:
    """All wait for the slowest of each step."""
    return sum(max(step) for step in zip(*took_s, strict=True))


def simulated_s(took_s: list[list[float]], bound: int) -> float:
    """The time that the aggregator's core takes with one worker for each shard."""
    plan = asynchronous_plan(
        make_plan(elements=8, shards=WORKERS, steps=STEPS, bitwise=False),
        stale=bound,
        optimizer={"sgd": {"learning_rate": 1e-6}},
    )
    zero = np.zeros(8, np.float32)
    job = StartedLeaves(plan, make_ranges, lambda *_: (zero, 1, 0.0))
    job.begin()
    workers = [job.worker(f"worker-{shard}", [shard]) for shard in range(WORKERS)]
    coming: list[tuple[float, int, StartedLeaf]] = []
    idle: list[ScriptedWorker] = workers
    now_s, spread = 0.0, 0
    while not job.of(Ended):
        waiting = []
        for worker in idle:
            leaf = worker.begin(now_s)
            if leaf is None:
                waiting.append(worker)
                continue
            assert leaf.step - min(job.ranges.clocks.completed) <= bound
            ends_s = now_s + took_s[leaf.shard][leaf.step]
            heapq.heappush(coming, (ends_s, leaf.shard, leaf))
        now_s, _, leaf = heapq.heappop(coming)
        job.deliver(leaf, now_s)
        idle = [*waiting, leaf.worker]
        completed = job.ranges.clocks.completed
        spread = max(spread, max(completed) - min(completed))
    assert set(job.ranges.clocks.completed) == {STEPS}
    assert spread == bound + 1
    return now_s


def test_a_bound_of_four_hides_most_of_what_is_slow_at_times() -> None:
    took_s = times(seed=1)
    barrier_s, bounded_s = synchronous_s(took_s), simulated_s(took_s, 4)
    print(f"barrier: {barrier_s:.0f}, bound 4: {bounded_s:.0f}")
    assert bounded_s <= 0.65 * barrier_s


@pytest.mark.soak
def test_each_larger_bound_hides_more() -> None:
    took_s = times(seed=1)
    found = {bound: simulated_s(took_s, bound) for bound in (1, 2, 4, 8)}
    print(found)
    assert sorted(found.values(), reverse=True) == list(found.values())
    assert found[1] < synchronous_s(took_s)
    assert found[8] >= max(sum(shard) for shard in took_s), "no shard is faster than alone"
