"""Steps of two train rounds: what the root decides, and that nothing happens within one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.checkpoints import layout_part, parse_part
from coordinator.aggregation.core.effects import Committed, Ended, Failed, StartCheckpoint
from coordinator.aggregation.core.making import make_ranges
from phalanx.models.split_features import SCORED, SCORES
from phalanx.testing.ranges import ROWS_PER_LEAF, ScriptedJob, initial_vector, make_plan
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan, TensorSpec

SHARDS, STEPS, FEATURES = 3, 4, 6
TRAIN, EVALUATE, PAUSE, STOP, FAIL = (
    GoRecord.ACTION_TRAIN,
    GoRecord.ACTION_EVALUATE,
    GoRecord.ACTION_PAUSE,
    GoRecord.ACTION_STOP,
    GoRecord.ACTION_FAIL,
)


def plan_of(**options: Any) -> JobPlan:
    """A plan whose vector is eight parameters, the scores of a step's rows, and the marker."""
    plan = make_plan(elements=FEATURES + 2, shards=SHARDS, steps=STEPS, **options)
    spec = JobSpec.FromString(plan.spec)
    spec.data.columns.SetInParent()
    plan.spec = spec.SerializeToString()
    plan.layout.tensors.append(TensorSpec(name=SCORES, shape=[ROWS_PER_LEAF], workspace=True))
    plan.layout.tensors.append(TensorSpec(name=SCORED, shape=[1], workspace=True))
    plan.layout.element_count += ROWS_PER_LEAF + 1
    plan.by_columns = True
    plan.train_rows = 4 * ROWS_PER_LEAF
    return plan


def begun(plan: JobPlan, term: int = 1) -> ScriptedJob:
    job = ScriptedJob(make_ranges, plan, term=term)
    job.begin()
    while job.go.action == GoRecord.ACTION_INITIALISE:
        [(frame, _)] = job.nodes_frames(job.division(1))
        vector = initial_vector(plan)
        vector[-1] = 0  # nothing is scored yet
        job.send([(frame, memoryview(vector.tobytes()))])
        job.pull()
    return job


def of_kind(job: ScriptedJob, kind: type[Any]) -> list[Any]:
    return [each for each in job.effects if isinstance(each, kind)]


def test_a_step_is_two_rounds_and_counts_its_rows_once() -> None:
    plan = plan_of(evaluation_shards=2, evaluate_every=2)
    job = begun(plan)
    seen = [(job.go.version, job.go.action)]
    while job.go.action != STOP:
        job.run_round()
        seen.append((job.go.version, job.go.action))
    assert seen == [
        (0, TRAIN),
        (1, TRAIN),
        (2, TRAIN),
        (3, TRAIN),
        (4, EVALUATE),
        (4, TRAIN),
        (5, TRAIN),
        (6, TRAIN),
        (7, TRAIN),
        (8, EVALUATE),
        (8, STOP),
    ]
    commits = of_kind(job, Committed)
    assert [each.version for each in commits] == [1, 2, 3, 4]
    assert {each.example_count for each in commits} == {ROWS_PER_LEAF}
    assert {each.expected_count for each in commits} == {ROWS_PER_LEAF}
    assert (job.root.version, job.root.examples_lost, job.root.examples_doubled) == (STEPS, 0, 0)
    assert job.root.decider.examples == STEPS * ROWS_PER_LEAF
    assert [each.go.version for each in of_kind(job, Ended)] == [STEPS]


def test_the_first_round_moves_no_parameter() -> None:
    job = begun(plan_of())
    job.run_round()
    before, scored = job.vector(0), job.vector(1)
    assert scored[: FEATURES + 2].tobytes() == before[: FEATURES + 2].tobytes()
    assert scored[-1] == 1
    job.run_round()
    after = job.vector(2)
    assert (after[: FEATURES + 2] != before[: FEATURES + 2]).all()
    assert not after[FEATURES + 2 :].any()


def test_a_pause_waits_for_the_second_round() -> None:
    job = begun(plan_of())
    job.run_round()
    job.effects += job.root.pause()
    job.pull()
    assert (job.go.version, job.go.action) == (1, TRAIN)
    job.run_round()
    assert (job.go.version, job.go.action) == (2, PAUSE)
    [saved] = of_kind(job, StartCheckpoint)
    assert (saved.version, saved.snapshot.version, saved.terminal) == (1, 1, True)


def test_a_pause_between_two_steps_is_at_once() -> None:
    job = begun(plan_of())
    job.run_round()
    job.run_round()
    job.effects += job.root.pause()
    job.pull()
    assert (job.go.version, job.go.action) == (2, PAUSE)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_a_job_fails_in_any_round(rounds: int) -> None:
    job = begun(plan_of())
    for _ in range(rounds):
        job.run_round()
    job.effects += job.root.fail("SOME_REASON", "why")
    job.pull()
    assert (job.go.action, job.go.reason) == (FAIL, "SOME_REASON")
    assert [each.reason for each in of_kind(job, Failed)] == ["SOME_REASON"]
    assert [each.go.version for each in of_kind(job, Ended)] == [rounds // 2]


def test_checkpoints_are_of_whole_steps_and_go_on_with_the_same_bits() -> None:
    plan = plan_of(checkpoint_every=1, evaluation_shards=2, evaluate_every=1, best="test/accuracy")
    whole = begun(plan)
    while whole.go.action != STOP:
        whole.run_round()
        whole.root.checkpoint_done()
    saved = of_kind(whole, StartCheckpoint)
    assert [each.version for each in saved] == [1, 2, 3, 4]
    for effect in saved[:-1]:
        header, buffers = layout_part(effect.snapshot)
        parameters, vectors = parse_part(header + b"".join(buffers))
        again = ScriptedJob(make_ranges, plan, term=2)
        again.effects += again.root.begin_restored(
            effect.version, {0: (parameters, dict(vectors))}, effect.root_state
        )
        again.pull()
        assert (again.root.version, again.go.version) == (effect.version, 2 * effect.version)
        while again.go.action != STOP:
            again.run_round()
            again.root.checkpoint_done()
        assert again.vector(2 * STEPS).tobytes() == whole.vector(2 * STEPS).tobytes()
        assert again.root.decider.state() == whole.root.decider.state()


def test_a_checkpoint_that_is_owed_waits_for_the_end_of_a_step() -> None:
    job = begun(plan_of(checkpoint_every=1))
    for _ in range(4):
        job.run_round()
    assert [each.version for each in of_kind(job, StartCheckpoint)] == [1]
    job.root.checkpoint_done()  # in the middle of what follows, when one is owed
    job.run_round()
    assert [each.version for each in of_kind(job, StartCheckpoint)] == [1]
    job.run_round()
    assert [each.version for each in of_kind(job, StartCheckpoint)] == [1, 3]


def test_a_limit_of_the_gradient_does_not_count_the_scores() -> None:
    plan = plan_of()
    spec = JobSpec.FromString(plan.spec)
    spec.train.optimizer.clip_norm = 0.5
    spec.train.l2 = 0
    plan.spec = spec.SerializeToString()
    job = begun(plan)
    job.run_round()
    scores = job.vector(1)[FEATURES + 2 : -1]
    assert np.linalg.norm(scores) > ROWS_PER_LEAF
    job.run_round()
    moved = job.vector(2)[: FEATURES + 2] - job.vector(0)[: FEATURES + 2]
    assert np.linalg.norm(moved) == pytest.approx(0.1 * 0.5, rel=1e-5)
