"""Steps that do not wait for the slowest shards."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.core.effects import Committed, StartCheckpoint
from coordinator.aggregation.core.making import make_ranges
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer
from phalanx.reduction import Node, reduce_leaves
from phalanx.testing.ranges import (
    ROWS_PER_LEAF,
    ScriptedJob,
    leaf_gradient,
    leaf_loss,
    make_plan,
)
from phalanx.training.left_out import LeftOutLog
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""


def backup_plan(backup: int, *, shards: int = 5, elements: int = 1000, **options: Any) -> JobPlan:
    plan = make_plan(elements=elements, shards=shards, bitwise=False, **options)
    spec = JobSpec.FromString(plan.spec)
    spec.train.synchronous.backup_shards = backup
    spec.train.optimizer.sgd.learning_rate = 1e-6  # these leaves have no minimum
    plan.spec = spec.SerializeToString()
    plan.unit_span = 1
    return plan


def step_without(plan: JobPlan, vector: Any, version: int, absent: set[int]) -> Any:
    train = JobSpec.FromString(plan.spec).train
    leaves = {
        shard: leaf_gradient(plan, shard, version, vector)
        for shard in range(plan.shards)
        if shard not in absent
    }
    total = reduce_leaves(leaves, plan.shards)
    assert total is not None
    out = np.empty_like(vector)
    build_optimizer(train, plan.total_steps).apply(
        vector, total, ROWS_PER_LEAF * len(leaves), decay_mask(plan.layout), {}, version, out
    )
    return out


def frames_of(job: Any, *shards: int) -> list[Any]:
    return job.nodes_frames([Node(shard, 1) for shard in shards])


@pytest.mark.parametrize("elements", [1000, FRAMES])
def test_the_step_commits_with_the_first_so_many_in_any_order(jobs: Any, elements: int) -> None:
    plan = backup_plan(2, elements=elements)
    job = jobs.started(plan)
    vector, draw = job.vector(0), random.Random(3)
    for version in range(3):
        late = set(draw.sample(range(5), 2))
        frames = frames_of(job, *sorted(set(range(5)) - late))
        last = frames_of(job, *sorted(late))
        draw.shuffle(frames)
        job.send(frames[:-1])
        assert job.root.version == version
        job.send(frames[-1:])
        assert job.root.version == version + 1
        job.send(last)
        job.pull()
        vector = step_without(plan, vector, version, late)
        assert job.vector(version + 1).tobytes() == vector.tobytes()
    commits = [effect for effect in job.effects if isinstance(effect, Committed)]
    assert [effect.example_count for effect in commits] == [3 * ROWS_PER_LEAF] * 3
    assert job.root.examples_lost == 3 * 2 * ROWS_PER_LEAF
    assert job.root.examples_doubled == 0


def test_a_part_of_a_contribution_is_in_no_step(jobs: Any) -> None:
    plan = backup_plan(1, elements=FRAMES)
    job = jobs.started(plan)
    vector = job.vector(0)
    first, second = frames_of(job, 4)
    job.send([first])
    job.send(frames_of(job, 0, 1, 2, 3))
    job.send([second])
    job.pull()
    assert job.vector(1).tobytes() == step_without(plan, vector, 0, {4}).tobytes()


def test_copies_do_not_count_twice(jobs: Any) -> None:
    plan = backup_plan(1)
    job = jobs.started(plan)
    job.send(frames_of(job, 0, 1, 2, 2, 2, 0))
    assert job.root.version == 0
    assert job.root.open_round.missing() == 0b11000


def test_the_loss_is_that_of_the_shards_that_count(jobs: Any) -> None:
    job = jobs.started(backup_plan(2, steps=1))
    job.send(frames_of(job, 1, 3, 4))
    loss = sum(leaf_loss(shard, 0) for shard in (1, 3, 4)) / (3 * ROWS_PER_LEAF)
    assert job.root.decider.metrics["train/loss"] == pytest.approx(loss)


def test_without_backup_shards_everything_is_waited_for(jobs: Any) -> None:
    job = jobs.started(backup_plan(0))
    job.send(frames_of(job, 0, 1, 2, 3))
    assert job.root.version == 0


def left_out_of(effect: StartCheckpoint) -> LeftOutLog:
    extra = {name: pieces[0] for name, pieces in effect.snapshot.extra.items()}
    return LeftOutLog.restored(extra, effect.version)


def test_checkpoints_say_which_shards_each_step_left_out(jobs: Any) -> None:
    plan = backup_plan(2, checkpoint_every=2, steps=4)
    job = ScriptedJob(make_ranges, plan, ((0,),), 1)
    job.begin()
    job.run_round()
    late = [{0, 3}, {1, 2}, {3, 4}, {0, 1}]
    for version in range(3):
        job.send(frames_of(job, *sorted(set(range(5)) - late[version])))
        job.pull()
    (checkpoint,) = jobs.checkpoints(job)
    log = left_out_of(checkpoint)
    assert [set(log.of(step)) for step in range(len(log))] == late[:2]

    for kept, wanted in (
        (checkpoint.snapshot.extra, late[:2]),
        ({}, None),  # of a job that began where nobody wrote it down
    ):
        again = make_ranges(plan, 2, job.pieces)
        vectors = {name: pieces[0] for name, pieces in kept.items()}
        parameters = np.concatenate(checkpoint.snapshot.frames)
        again.begin_restored(2, {0: (parameters, vectors)}, checkpoint.root_state)
        (paused,) = [each for each in again.pause() if isinstance(each, StartCheckpoint)]
        if wanted is None:
            assert not paused.snapshot.extra
        else:
            log = left_out_of(paused)
            assert [set(log.of(step)) for step in range(len(log))] == wanted


def throughput(jobs: Any, backup: int, steps: int = 60) -> float:
    """Examples per second of 100 workers with one shard each, in virtual time."""
    draw = random.Random(backup)
    job = jobs.started(backup_plan(backup, shards=100, elements=8, steps=steps))
    time_s, examples = 0.0, 0
    for version in range(steps):
        arrivals = sorted((1 + draw.expovariate(2.0), shard) for shard in range(100))
        for took_s, shard in arrivals:
            job.send(frames_of(job, shard))
            if job.root.version > version:
                time_s += took_s
                break
        job.pull()
    for effect in job.effects:
        if isinstance(effect, Committed):
            examples += effect.example_count
    return examples / time_s


def test_four_backups_among_a_hundred_make_a_third_more(jobs: Any) -> None:
    """Chen et al. 2016: times of 1 + Exp(mean 0.5), whose slowest of 100 takes 3.6 on average."""
    assert throughput(jobs, 4) >= 1.3 * throughput(jobs, 0)
