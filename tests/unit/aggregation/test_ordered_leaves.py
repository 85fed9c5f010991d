"""Rounds whose reducer sees the contribution of each shard by itself."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.core.effects import Committed, Refused
from phalanx.errors import InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer
from phalanx.reducers import Contribution, build_reducer
from phalanx.reduction import Node
from phalanx.testing.ranges import (
    ROWS_PER_LEAF,
    initial_vector,
    leaf_gradient,
    leaf_loss,
    make_plan,
)
from phalanx.v1.job_spec_pb2 import JobSpec, Krum, Median, Reduction, TrimmedMean
from phalanx.v1.training_pb2 import JobPlan

FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""

RULES = [
    Reduction(median=Median()),
    Reduction(trimmed_mean=TrimmedMean(trim=1)),
    Reduction(krum=Krum(faulty=1, keep=2)),
    Reduction(clip_norm=50.0),
]


def robust_plan(rule: Reduction, elements: int = 1000, **options: Any) -> JobPlan:
    plan = make_plan(elements=elements, shards=5, optimizer="adam", **options)
    spec = JobSpec.FromString(plan.spec)
    spec.train.reduction.CopyFrom(rule)
    plan.spec = spec.SerializeToString()
    plan.unit_span = 1
    return plan


def leaves(shards: int) -> list[Node]:
    return [Node(shard, 1) for shard in range(shards)]


def expected(plan: JobPlan, absent: tuple[int, ...] = ()) -> Any:
    """The last version, by a plain loop over whole leaves."""
    train = JobSpec.FromString(plan.spec).train
    optimizer = build_optimizer(train, plan.total_steps)
    reducer = build_reducer(train, plan.shards)
    assert reducer is not None
    vector = initial_vector(plan)
    state = {name: np.zeros_like(vector) for name in optimizer.state_names}
    for step in range(plan.total_steps):
        contributions = {
            shard: Contribution([leaf_gradient(plan, shard, step, vector)], ROWS_PER_LEAF)
            for shard in range(plan.shards)
            if shard not in absent
        }
        reduced = reducer.reduce(contributions)
        out = vector.copy()
        if reduced is not None:
            mask = decay_mask(plan.layout)
            optimizer.apply(vector, reduced.pieces[0], reduced.divisor, mask, state, step, out)
        vector = out
    return vector


def train(job: Any, draw: random.Random | None = None, **options: Any) -> None:
    for _ in range(job.plan.total_steps):
        frames = job.nodes_frames(leaves(job.plan.shards), **options)
        if draw is not None:
            frames += draw.choices(frames, k=3)
            draw.shuffle(frames)
        job.send(frames)
        job.pull()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule).split()[0])
@pytest.mark.parametrize("elements", [1000, FRAMES])
def test_neither_arrival_nor_copies_change_a_bit(jobs: Any, rule: Reduction, elements: int) -> None:
    plan = robust_plan(rule, elements)
    last = expected(plan).tobytes()
    for seed in range(2):
        job = jobs.started(plan)
        train(job, random.Random(seed))
        assert job.vector(plan.total_steps).tobytes() == last
        assert job.root.examples_lost == job.root.examples_doubled == 0


def test_nothing_is_applied_before_everything_is_there(jobs: Any) -> None:
    job = jobs.started(robust_plan(RULES[0], FRAMES))
    frames = job.nodes_frames(leaves(5))
    assert len(frames) == 10
    job.send(frames[1:])
    assert job.root.versions_of(0).held == [0]
    assert job.root.open_round.missing() == 0b00001
    job.send(frames[:1])
    assert job.root.versions_of(0).newest_whole == 1


def test_a_node_of_several_shards_is_refused(jobs: Any) -> None:
    job = jobs.started(robust_plan(RULES[0]))
    with pytest.raises(InvalidArgument, match="by nodes of 1"):
        job.send(job.nodes_frames([Node(0, 2)]))


def test_an_absent_shard_takes_no_part(jobs: Any) -> None:
    plan = robust_plan(RULES[0])
    job = jobs.started(plan)
    train(job, absent=[3])
    assert job.vector(plan.total_steps).tobytes() == expected(plan, (3,)).tobytes()
    commits = [effect for effect in job.effects if isinstance(effect, Committed)]
    assert [effect.example_count for effect in commits] == [4 * ROWS_PER_LEAF] * 3
    assert job.root.examples_lost == 3 * ROWS_PER_LEAF


def test_where_too_few_are_present_the_step_changes_nothing(jobs: Any) -> None:
    plan = robust_plan(RULES[2], steps=1)
    job = jobs.started(plan)
    train(job, absent=[3])
    assert job.vector(1).tobytes() == job.vector(0).tobytes()


def test_a_lie_that_is_not_finite_does_not_fail_the_job(jobs: Any) -> None:
    plan = robust_plan(RULES[1], steps=1)
    job = jobs.started(plan)
    frames = job.nodes_frames(leaves(5))
    header, _ = frames[2]
    frames[2] = header, memoryview(np.full(1000, np.nan, np.float32)).cast("B")
    job.send(frames)
    job.pull()
    assert np.isfinite(job.vector(1)).all()
    assert [each for each in job.effects if isinstance(each, Refused)] == [Refused(1, (2,))]
    (commit,) = [each for each in job.effects if isinstance(each, Committed)]
    assert commit.example_count == 4 * ROWS_PER_LEAF, "its rows are not in the step"
    loss = sum(leaf_loss(shard, 0) for shard in (0, 1, 3, 4)) / (4 * ROWS_PER_LEAF)
    assert job.root.decider.metrics["train/loss"] == pytest.approx(loss)


def test_a_checkpoint_is_taken_and_restored_as_with_any_reducer(jobs: Any) -> None:
    plan = robust_plan(RULES[1], steps=6, checkpoint_every=3)
    job = jobs.started(plan)
    train(job)
    (middle, _) = jobs.checkpoints(job)
    again = jobs.scripted(plan, term=2)
    parameters = np.concatenate([middle.snapshot.parameters(0)])
    state = {name: middle.snapshot.state[0][name] for name in middle.snapshot.state_names}
    again.effects += again.root.begin_restored(3, {0: (parameters, state)}, middle.root_state)
    again.pull()
    for _ in range(3):
        again.send(again.nodes_frames(leaves(5)))
        again.pull()
    assert again.vector(6).tobytes() == job.vector(6).tobytes() == expected(plan).tobytes()
