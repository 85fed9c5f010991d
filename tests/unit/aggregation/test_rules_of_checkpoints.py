"""Rules of the data plane on the core alone: checkpoints, blocks, pauses, and joined go records."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from phalanx.frames import BLOCK_ELEMENTS, FRAME_BYTES, decode_response
from phalanx.reduction import Node
from phalanx.testing.ranges import ROWS_PER_LEAF, ScriptedJob, make_plan, reference
from phalanx.v1.training_pb2 import GoRecord

SMALL = 1000
THREE_BLOCKS = 2 * BLOCK_ELEMENTS + 777
FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""


# Rule 9: checkpoints


def test_rule_09_checkpoints_are_ordered_by_the_go_record_one_at_a_time(jobs: Any) -> None:
    plan = make_plan(elements=SMALL, steps=6, checkpoint_every=1)
    job = jobs.started(plan)
    for _ in range(3):
        job.run_round()
    assert [each.version for each in jobs.checkpoints(job)] == [1]
    assert [go.version for go in job.go_records if go.checkpoint] == [1]
    job.root.checkpoint_done()
    job.run_round()
    assert [each.version for each in jobs.checkpoints(job)] == [1, 4]


def test_rule_09_a_checkpoint_that_was_due_while_another_was_written_comes_after_it(
    jobs: Any,
) -> None:
    plan = make_plan(elements=SMALL, steps=9, checkpoint_every=2)
    job = jobs.started(plan)
    for _ in range(4):
        job.run_round()
    assert [each.version for each in jobs.checkpoints(job)] == [2]
    job.root.checkpoint_done()
    job.run_round()
    assert [each.version for each in jobs.checkpoints(job)] == [2, 5]


def test_rule_09_the_end_has_its_checkpoint_even_while_another_one_is_being_written(
    jobs: Any,
) -> None:
    plan = make_plan(elements=SMALL, steps=2, checkpoint_every=1)
    job = jobs.finished(plan)
    assert [(each.version, each.final) for each in jobs.checkpoints(job)] == [(1, False), (2, True)]


def test_rule_09_a_snapshot_stays_as_it_was_while_steps_go_on(jobs: Any) -> None:
    plan = make_plan(elements=FRAMES, steps=5, optimizer="adam", checkpoint_every=2)
    job = jobs.started(plan)
    for _ in range(3):
        job.run_round()
    snapshot = jobs.checkpoints(job)[0].snapshot
    assert snapshot.version == 2
    kept = [
        {name: array.copy() for name, array in state.items()}
        for state in snapshot.state
        if state is not None
    ]
    for _ in range(2):
        job.run_round()
    for state, copy in zip(snapshot.state, kept, strict=True):
        assert state is not None
        for name in copy:
            assert np.array_equal(state[name], copy[name])
    parameters = np.concatenate([snapshot.parameters(index) for index in range(2)])
    assert parameters.tobytes() == reference(plan)[2].tobytes()
    current = job.root._ranges[0].parameters._state
    assert all(a is not b for a, b in zip(current, snapshot.state, strict=True))


def test_rule_09_a_released_snapshot_is_not_copied_for_any_more(jobs: Any) -> None:
    plan = make_plan(elements=SMALL, steps=5, optimizer="adam", checkpoint_every=2)
    job = jobs.started(plan)
    for _ in range(2):
        job.run_round()
    snapshot = jobs.checkpoints(job)[0].snapshot
    before = job.root._ranges[0].parameters._state[0]
    snapshot.release()
    job.run_round()
    assert job.root._ranges[0].parameters._state[0] is before


@pytest.mark.parametrize("owners", [[[0, 1]], [[0], [1]]])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_rule_09_a_restored_job_goes_on_to_the_same_bits(
    jobs: Any, optimizer: str, owners: list[list[int]]
) -> None:
    plan = make_plan(
        elements=THREE_BLOCKS, ranges=2, steps=5, optimizer=optimizer, checkpoint_every=2,
        evaluation_shards=2, evaluate_every=2,
    )  # fmt: skip
    undisturbed = jobs.finished(plan, owners)
    first = jobs.started(plan, owners)
    while not first.is_whole(3):
        first.run_round()
    saved = {
        each.snapshot.range.index: each for each in jobs.checkpoints(first) if each.version == 2
    }
    second = jobs.scripted(plan, owners, term=2)
    for owner in second.owners:
        vectors = {}
        for index in owner.range_indexes:
            snapshot = saved[index].snapshot
            frames = range(len(snapshot.grid))
            parameters = np.concatenate([snapshot.parameters(frame) for frame in frames])
            states = [state for state in snapshot.state if state is not None]
            vectors[index] = (
                parameters,
                {n: np.concatenate([s[n] for s in states]) for n in snapshot.state_names},
            )
        second.effects += owner.begin_restored(2, vectors, saved[0].root_state)
    second.pull()
    assert (second.go.term, second.go.version) == (2, 2)
    second.run()
    assert jobs.final_bytes(second) == jobs.final_bytes(undisturbed) == reference(plan)[5].tobytes()
    decider, other = second.root.decider, undisturbed.root.decider
    assert decider is not None
    assert other is not None
    assert decider.metrics == other.metrics
    assert decider.examples == other.examples


def test_rule_09_counts_of_lost_examples_survive_a_restore(jobs: Any) -> None:
    plan = make_plan(elements=SMALL, shards=2, steps=4, checkpoint_every=1)
    job = jobs.started(plan)
    job.send(job.nodes_frames([Node(0, 2)], absent=[1]))
    saved = jobs.checkpoints(job)[-1]
    assert json.loads(saved.root_state)["examples_lost"] == ROWS_PER_LEAF
    assert "stop_reason" not in json.loads(saved.root_state)
    again = jobs.scripted(plan, term=2)
    vector = saved.snapshot.parameters(0)
    again.root.begin_restored(1, {0: (vector, {})}, saved.root_state)
    assert again.root.examples_lost == ROWS_PER_LEAF


def test_rule_09_a_checkpoint_that_does_not_fit_is_refused(jobs: Any) -> None:
    from phalanx.errors import DataLoss

    plan = make_plan(elements=SMALL, optimizer="momentum")
    vector = np.zeros(SMALL, np.float32)
    for vectors in (
        (vector[:-1], {"velocity": vector}),
        (vector, {}),
        (vector.astype(np.float64), {"velocity": vector}),
    ):
        with pytest.raises(DataLoss):
            jobs.scripted(plan).root.begin_restored(1, {0: vectors}, "{}")
    with pytest.raises(DataLoss, match="no state of range 0"):
        jobs.scripted(plan).root.begin_restored(1, {0: (vector, {"velocity": vector})}, "nonsense")


# Rule 14: blocks


@pytest.mark.parametrize("elements", [1, 65_535, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, FRAMES])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rule_14_vectors_of_any_length_are_cut_at_blocks(
    jobs: Any, elements: int, dtype: str
) -> None:
    plan = make_plan(elements=elements, steps=1, dtype=dtype, shards=3)
    job = jobs.finished(plan)
    for first, _ in job.root.versions_of(0).grid:
        assert first % BLOCK_ELEMENTS == 0
    assert jobs.final_bytes(job) == reference(plan)[1].tobytes()


# Go records that come along with their version


def messages(cursor: Any) -> list[Any]:
    """(version of the frame, version of the go record) of all that is there; None: none."""
    found = []
    while (message := cursor.take()) is not None:
        header, _ = decode_response(message)
        joined = header.HasField("joined_go_record")
        go = header.joined_go_record if joined else header.go_record
        has_go = joined or header.HasField("go_record")
        frame = header.frame.version if header.HasField("frame") else None
        found.append((frame, go.version if has_go else None))
    return found


@pytest.mark.parametrize("elements", [SMALL, FRAME_BYTES // 4])
def test_a_version_of_one_frame_comes_in_one_message_with_its_go_record(
    jobs: Any, elements: int
) -> None:
    job = jobs.started(make_plan(elements=elements, steps=9))
    steady = job.root.cursor(joins=True)
    assert messages(steady) == [(None, 0), (0, 0)]
    job.run_round()
    assert messages(steady) == [(1, 1)]
    for _ in range(3):
        job.run_round()
    assert messages(steady) == [(3, 3), (4, 4)]
    assert messages(job.root.cursor()) == [(None, 3), (None, 4), (3, None), (4, None)]


def test_a_version_of_several_frames_is_not_joined(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=FRAMES, steps=9))
    steady = job.root.cursor(joins=True)
    assert messages(steady) == [(None, 0), (None, 0), (0, None), (0, None)]


@pytest.mark.parametrize("owners", [[[0], [1]], [[0, 1]]])
def test_joined_go_records_change_no_bit(jobs: Any, owners: list[list[int]]) -> None:
    plan = make_plan(
        elements=THREE_BLOCKS // 2, ranges=2, steps=4, evaluation_shards=2, evaluate_every=2
    )
    job = ScriptedJob(jobs.make_owner, plan, owners, joins=True)
    job.begin()
    job.run()
    assert jobs.final_bytes(job) == reference(plan)[4].tobytes()
    keys = [(go.version, go.round) for go in job.go_records]
    assert keys == sorted(set(keys))


# Pause and failure (rules 3, 8 and 11 as far as they concern ranges)


def test_a_pause_without_workers_takes_effect_at_once_with_a_checkpoint(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=SMALL, steps=9))
    job.run_round()
    job.effects += job.root.pause()
    job.pull()
    assert (job.go.action, job.go.version) == (GoRecord.ACTION_PAUSE, 1)
    assert [(each.version, each.final) for each in jobs.checkpoints(job)] == [(1, False)]


def test_a_pause_in_the_middle_of_a_step_waits_for_the_boundary(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=FRAMES, steps=9))
    frames = job.nodes_frames([Node(0, 4)])
    job.send(frames[:1])
    job.effects += job.root.pause()
    job.pull()
    assert jobs.checkpoints(job) == []
    assert job.go.action == GoRecord.ACTION_TRAIN
    job.send(frames[1:])
    job.pull()
    assert (job.go.action, job.go.version) == (GoRecord.ACTION_PAUSE, 1)
    assert jobs.checkpoints(job)[0].snapshot.version == 1


def test_a_pause_that_other_owners_must_learn_of_waits_for_the_boundary(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=THREE_BLOCKS, ranges=2, steps=9), owners=[[0], [1]])
    job.effects += job.root.pause()
    job.run_round()
    job.carry()
    assert (job.go.action, job.go.version) == (GoRecord.ACTION_PAUSE, 1)
    assert {each.snapshot.range.index for each in jobs.checkpoints(job)} == {0, 1}


def test_a_failure_ends_the_term_at_once_and_nothing_counts_after_it(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=FRAMES))
    frames = job.nodes_frames([Node(0, 4)])
    job.send(frames[:1])
    job.effects += job.root.fail("POISON_SHARD", "shard 3 cannot be computed")
    job.pull()
    assert (job.go.action, job.go.reason) == (GoRecord.ACTION_FAIL, "POISON_SHARD")
    job.send(frames[1:])
    assert not job.is_whole(1)
    assert job.root.fail("AGAIN", "") == []
