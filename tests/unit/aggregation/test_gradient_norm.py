"""A mean gradient whose norm is limited: shortened as a whole, whatever frames arrive in."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from phalanx.frames import BLOCK_ELEMENTS
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer
from phalanx.reduction import reduce_leaves
from phalanx.testing.ranges import (
    ROWS_PER_LEAF,
    initial_vector,
    leaf_gradient,
    make_plan,
    reference,
)
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""

LIMIT = 2.5


def clipped_plan(limit: float = LIMIT, **options: Any) -> JobPlan:
    plan = make_plan(elements=FRAMES, **options)
    spec = JobSpec.FromString(plan.spec)
    spec.train.optimizer.clip_norm = limit
    plan.spec = spec.SerializeToString()
    return plan


def expected(plan: JobPlan) -> tuple[Any, list[float]]:
    """The last version and the norms of the mean gradients, in double precision."""
    train = JobSpec.FromString(plan.spec).train
    optimizer, vector, norms = build_optimizer(train, plan.total_steps), initial_vector(plan), []
    for step in range(plan.total_steps):
        leaves = {s: leaf_gradient(plan, s, step, vector) for s in range(plan.shards)}
        total = reduce_leaves(leaves, plan.shards)
        assert total is not None
        count, out = ROWS_PER_LEAF * plan.shards, np.empty_like(vector)
        norms.append(float(np.linalg.norm(total.astype(np.float64))) / count)
        total = total * total.dtype.type(min(1.0, LIMIT / norms[-1]))
        optimizer.apply(vector, total, count, decay_mask(plan.layout), {}, step, out)
        vector = out
    return vector, norms


def test_the_mean_gradient_is_shortened_as_a_whole(jobs: Any) -> None:
    plan = clipped_plan()
    vector, norms = expected(plan)
    assert min(norms) > LIMIT
    finals = {jobs.final_bytes(jobs.finished(plan, seed=seed)) for seed in (None, 1, 2)}
    assert len(finals) == 1
    found = np.frombuffer(finals.pop(), np.float32)
    np.testing.assert_allclose(found, vector, rtol=1e-6, atol=1e-6)
    assert found.tobytes() != reference(plan)[-1].tobytes()


def test_below_the_limit_the_bits_are_those_without_one(jobs: Any) -> None:
    plan = clipped_plan(1e9)
    assert jobs.final_bytes(jobs.finished(plan, seed=3)) == reference(plan)[-1].tobytes()


def test_no_frame_is_applied_before_all_are_in_and_copies_complete_nothing(jobs: Any) -> None:
    job = jobs.started(clipped_plan())
    frames = job.nodes_frames(job.division(2))
    first = [frame for frame in frames if frame[0].first_element == 0]
    rest = [frame for frame in frames if frame[0].first_element > 0]
    assert len(first) == len(rest) == 2
    job.send([*first, *first, *first])
    assert job.root.versions_of(0).held == [0]
    job.send(rest)
    assert job.root.version == 1


def test_where_every_shard_is_absent_nothing_changes(jobs: Any) -> None:
    job = jobs.started(clipped_plan(steps=1))
    job.send(job.nodes_frames(job.division(2), absent=range(4)))
    job.pull()
    assert job.vector(1).tobytes() == job.vector(0).tobytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_checkpoint_takes_a_whole_version(jobs: Any, seed: int) -> None:
    plan = clipped_plan(checkpoint_every=2)
    job = jobs.scripted(plan)
    job.begin()
    job.run(random.Random(seed))
    first = jobs.checkpoints(job)[0]
    saved = np.concatenate([first.snapshot.parameters(index) for index in range(2)])
    assert first.version == 2
    assert saved.tobytes() == job.vector(2).tobytes()
