"""Versions that are shortened as a whole after the optimizer, whatever frames arrive in."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from phalanx.frames import BLOCK_ELEMENTS
from phalanx.models.base import decay_mask
from phalanx.reduction import reduce_leaves
from phalanx.testing.ranges import ROWS_PER_LEAF, initial_vector, leaf_gradient, make_plan
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

FRAMES = 2 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""

L2 = 0.01


def projected_plan(clip_norm: float = 0, **options: Any) -> JobPlan:
    plan = make_plan(elements=FRAMES, dtype="float64", **options)
    spec = JobSpec.FromString(plan.spec)
    spec.train.l2 = L2
    spec.train.optimizer.pegasos.project = True
    if clip_norm:
        spec.train.optimizer.clip_norm = clip_norm
    plan.spec = spec.SerializeToString()
    return plan


def expected(plan: JobPlan, clip_norm: float = np.inf) -> tuple[np.ndarray, list[float]]:
    """The last version by the formulas, and the norms of the weights before they are shortened."""
    w, norms, decay = initial_vector(plan), [], decay_mask(plan.layout)
    assert decay is not None
    for step in range(plan.total_steps):
        leaves = {s: leaf_gradient(plan, s, step, w) for s in range(plan.shards)}
        total = reduce_leaves(leaves, plan.shards)
        assert total is not None
        mean = total / (ROWS_PER_LEAF * plan.shards)
        mean = mean * min(1.0, clip_norm / float(np.linalg.norm(mean)))
        w = w - (mean + L2 * w * decay) / (L2 * (step + 1))
        norms.append(float(np.linalg.norm(w[decay])))
        w[decay] *= min(1.0, 1 / np.sqrt(L2) / norms[-1])
    return w, norms


@pytest.mark.parametrize("clip_norm", [0.0, 2.5])
def test_a_version_is_shortened_as_a_whole(jobs: Any, clip_norm: float) -> None:
    plan = projected_plan(clip_norm)
    vector, norms = expected(plan, clip_norm or np.inf)
    assert max(norms) > 1 / np.sqrt(L2)
    finals = {jobs.final_bytes(jobs.finished(plan, seed=seed)) for seed in (None, 1, 2)}
    assert len(finals) == 1
    found = np.frombuffer(finals.pop(), np.float64)
    np.testing.assert_allclose(found, vector, rtol=1e-9, atol=1e-9)


def test_nothing_is_made_before_all_frames_are_in(jobs: Any) -> None:
    job = jobs.started(projected_plan())
    frames = job.nodes_frames(job.division(2))
    first = [frame for frame in frames if frame[0].first_element == 0]
    rest = [frame for frame in frames if frame[0].first_element > 0]
    assert len(first) == len(rest) == 2
    job.send([*first, *first])
    assert job.root.versions_of(0).held == [0]
    job.send(rest)
    assert job.root.version == 1


def test_where_every_shard_is_absent_nothing_changes(jobs: Any) -> None:
    job = jobs.started(projected_plan(steps=1))
    job.send(job.nodes_frames(job.division(2), absent=range(4)))
    job.pull()
    assert job.vector(1).tobytes() == job.vector(0).tobytes()


def test_a_checkpoint_takes_a_whole_version(jobs: Any) -> None:
    job = jobs.scripted(projected_plan(checkpoint_every=2))
    job.begin()
    job.run(random.Random(0))
    first = jobs.checkpoints(job)[0]
    saved = np.concatenate([first.snapshot.parameters(index) for index in range(2)])
    assert first.version == 2
    assert saved.tobytes() == job.vector(2).tobytes()
