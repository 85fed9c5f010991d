"""The rules of the data plane that bind an aggregator, one by one, on the core alone."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.core.effects import Committed, Ended, Failed, StartCheckpoint
from coordinator.aggregation.core.machine import JobRanges
from phalanx.errors import Aborted, FailedPrecondition, InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS, decode_response
from phalanx.optimizers import build_optimizer
from phalanx.reduction import Node
from phalanx.testing.ranges import ROWS_PER_LEAF, ScriptedJob, make_plan, reference
from phalanx.training.decisions import RootDecider
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan, ParameterRange

SMALL = 1000
THREE_BLOCKS = 2 * BLOCK_ELEMENTS + 777
FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""


def make_owner(plan: JobPlan, term: int, owned: list[ParameterRange]) -> JobRanges:
    optimizer = build_optimizer(JobSpec.FromString(plan.spec).train, plan.total_steps)
    is_root = owned[0].index == 0
    return JobRanges(plan, term, owned, optimizer, RootDecider(plan, term) if is_root else None)


def scripted(plan: JobPlan, owners: Any = ((0,),), term: int = 1) -> ScriptedJob:
    return ScriptedJob(make_owner, plan, owners, term)


def checkpoints(job: ScriptedJob) -> list[StartCheckpoint]:
    return [effect for effect in job.effects if isinstance(effect, StartCheckpoint)]


def started(plan: Any, owners: Any = ((0,),)) -> ScriptedJob:
    """A job at version 0, with the go record of its first step."""
    job = scripted(plan, owners)
    job.begin()
    job.run_round()
    return job


def finished(plan: Any, owners: Any = ((0,),), seed: int | None = None) -> ScriptedJob:
    job = scripted(plan, owners)
    job.begin()
    go = job.run(None if seed is None else random.Random(seed))
    assert go.action == GoRecord.ACTION_STOP, go
    return job


def final_bytes(job: ScriptedJob) -> bytes:
    return bytes(job.vector(job.plan.total_steps).tobytes())


# Rule 1: whole versions


def test_rule_01_a_range_keeps_a_version_until_a_contribution_to_the_next_arrives() -> None:
    job = started(make_plan(elements=SMALL))
    versions = job.root.versions_of(0)
    job.send(job.nodes_frames([Node(0, 4)]))
    job.pull()
    assert versions.held == [0, 1]
    job.send(job.nodes_frames([Node(0, 2)]))
    assert versions.held == [1]


def test_rule_01_a_worker_that_was_stopped_goes_on_at_the_version_that_all_ranges_hold() -> None:
    job = started(make_plan(elements=FRAMES, steps=6))
    laggard = job.root.cursor()
    first = laggard.take()
    assert first is not None
    for _ in range(4):
        job.run_round()
    late = scripted(job.plan)
    late._cursors = [laggard]
    late.pull()
    assert {version for version in range(7) if late.is_whole(version)} == {3, 4}
    assert [go.version for go in late.go_records] == [3, 4]
    assert late.vector(4).tobytes() == job.vector(4).tobytes()


def test_rule_01_a_frame_of_a_version_cannot_be_changed_or_made_twice() -> None:
    job = started(make_plan(elements=SMALL))
    versions = job.root.versions_of(0)
    values = versions.values(0, 0)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1
    with pytest.raises(Exception, match="made twice"):
        versions.publish(0, 0, np.zeros(SMALL, np.float32))


# Rule 2: terms


@pytest.mark.parametrize("term", [0, 2])
def test_rule_02_another_term_is_refused_with_the_current_one(term: int) -> None:
    job = started(make_plan(elements=SMALL))
    header, payload = job.nodes_frames([Node(0, 4)])[0]
    header.term = term
    with pytest.raises(Aborted) as refusal:
        job.root.contribute(header, payload, 0.0)
    assert refusal.value.reason == "STALE_TERM"
    assert refusal.value.details == {"current_term": "1"}
    assert not job.is_whole(1)


def test_rule_02_a_go_record_of_another_term_is_refused() -> None:
    job = scripted(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    job.begin()
    stale = GoRecord()
    stale.CopyFrom(job.go)
    stale.term = 0
    with pytest.raises(Aborted):
        job.owner_of(1).go_record(stale)


# Rule 3: the root decides


def test_rule_03_no_range_starts_without_the_go_record() -> None:
    job = scripted(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    job.begin()
    frames = job.nodes_frames([Node(0, 1)], ranges=[1])
    with pytest.raises(FailedPrecondition) as refusal:
        job.send(frames)
    assert refusal.value.reason == "NO_GO_RECORD"
    job.carry()
    job.send(frames)
    assert job.owner_of(1).version == 0


def test_rule_03_a_go_record_that_comes_early_is_kept_until_the_range_has_its_version() -> None:
    job = scripted(make_plan(elements=THREE_BLOCKS, ranges=2, steps=2), owners=[[0], [1]])
    job.begin()
    initialise = job.go
    job.carry()
    job.send(job.nodes_frames([Node(0, 1)], ranges=[0]))
    job.pull()
    early = job.go
    assert (early.version, early.round, early.action) == (0, 1, GoRecord.ACTION_TRAIN)
    job.carry(early)
    job.send(job.nodes_frames([Node(0, 1)], initialise, ranges=[1]))
    job.pull()
    job.send(job.nodes_frames([Node(0, 4)], early))
    job.pull()
    assert job.vector(1).tobytes() == reference(job.plan)[1].tobytes()


def test_rule_03_go_records_are_taken_in_order_and_repeated_ones_change_nothing() -> None:
    job = started(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    older = job.go_records[0]
    job.run_round()
    other = job.owner_of(1)
    assert other.go_record(older) == []
    job.carry()
    assert other.go_record(job.go) == []
    job.send(job.nodes_frames([Node(0, 4)]))
    job.pull()
    assert job.vector(2).tobytes() == reference(job.plan)[2].tobytes()


def test_rule_03_the_root_goes_at_most_one_version_ahead_of_the_other_ranges() -> None:
    job = started(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    job.carry()
    job.send(job.nodes_frames([Node(0, 4)], ranges=[0]))
    job.pull()
    ahead = job.go
    assert ahead.version == 1
    assert not job.is_whole(1)
    assert job.root.versions_of(0).held == [0, 1]
    # A worker that joins now can still compute step 0 for the range that lacks it.
    joiner = scripted(job.plan, owners=[[0], [1]])
    joiner._cursors = [owner.cursor() for owner in job.owners]
    joiner.pull()
    assert joiner.is_whole(0)
    assert [(go.version, go.round) for go in joiner.go_records] == [(0, 0), (0, 1), (1, 0)]


def test_rule_03_the_end_reaches_every_range_with_its_checkpoint() -> None:
    job = finished(make_plan(elements=THREE_BLOCKS, ranges=2, steps=2), owners=[[0], [1]])
    ordered = {(each.snapshot.range.index, each.version) for each in checkpoints(job)}
    assert ordered == {(0, 2), (1, 2)}
    assert all(each.final and each.terminal for each in checkpoints(job))
    ends = [effect for effect in job.effects if isinstance(effect, Ended)]
    assert [effect.go.action for effect in ends] == [GoRecord.ACTION_STOP] * 2


def test_rule_03_evaluation_is_a_barrier_of_range_0_alone() -> None:
    plan = make_plan(
        elements=THREE_BLOCKS, ranges=2, steps=2, evaluation_shards=3, evaluate_every=1
    )
    job = started(plan, owners=[[0], [1]])
    job.run_round()
    assert job.go.action == GoRecord.ACTION_EVALUATE
    train = GoRecord(term=1, version=1, round=5, action=GoRecord.ACTION_TRAIN)
    with pytest.raises(FailedPrecondition):
        job.send(job.nodes_frames([Node(0, 4)], train, ranges=[0]))
    job.run_round()
    assert job.go.action == GoRecord.ACTION_TRAIN
    decider = job.root.decider
    assert decider is not None
    assert decider.metrics["test/loss"] == pytest.approx((0.5 + 1.0 + 1.5) / 30)
    job.run()
    assert final_bytes(job) == reference(plan)[2].tobytes()


# Rules 4 and 5: many ranges, nodes in any order


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("owners", [[[0], [1], [2]], [[0, 2], [1]], [[0, 1, 2]]])
def test_rule_04_the_number_of_ranges_and_owners_changes_no_bit(
    optimizer: str, owners: list[list[int]]
) -> None:
    one = make_plan(elements=THREE_BLOCKS, steps=3, optimizer=optimizer, shards=5)
    three = make_plan(elements=THREE_BLOCKS, steps=3, optimizer=optimizer, shards=5, ranges=3)
    expected = reference(one)[3].tobytes()
    assert final_bytes(finished(one)) == expected
    assert final_bytes(finished(three, owners)) == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_rule_05_no_order_of_arrival_and_no_division_changes_a_bit(seed: int, workers: int) -> None:
    plan = make_plan(elements=FRAMES, shards=5, steps=2)
    job = scripted(plan)
    job.begin()
    job.run(random.Random(seed), workers)
    assert final_bytes(job) == reference(plan)[2].tobytes()


def test_rule_05_summing_in_arrival_order_would_give_other_bits() -> None:
    """Or the tests of order above would show nothing."""
    job = started(make_plan(elements=SMALL, shards=5))
    leaves = [
        np.frombuffer(p, np.float32) for _, p in job.nodes_frames([Node(i, 1) for i in range(5)])
    ]
    forward = leaves[0] + leaves[1] + leaves[2] + leaves[3] + leaves[4]
    backward = leaves[4] + leaves[3] + leaves[2] + leaves[1] + leaves[0]
    tree = ((leaves[0] + leaves[1]) + (leaves[2] + leaves[3])) + leaves[4]
    assert len({forward.tobytes(), backward.tobytes(), tree.tobytes()}) == 3


def test_rule_05_duplicates_and_descendants_of_filled_nodes_change_nothing() -> None:
    plan = make_plan(elements=FRAMES, shards=4, steps=1)
    job = started(plan)
    leaves = job.nodes_frames([Node(index, 1) for index in range(4)])
    pairs = job.nodes_frames([Node(0, 2), Node(2, 2)])
    job.send([*leaves[:2], *pairs[:2], *leaves, *pairs, *leaves])
    job.pull()
    assert job.vector(1).tobytes() == reference(plan)[1].tobytes()
    committed = [effect for effect in job.effects if isinstance(effect, Committed)]
    assert [effect.example_count for effect in committed] == [4 * ROWS_PER_LEAF]


def test_rule_05_a_worker_killed_half_way_through_its_frames_is_taken_over() -> None:
    plan = make_plan(elements=FRAMES, shards=4, steps=1)
    job = started(plan)
    dying = job.nodes_frames([Node(0, 2)])
    assert len(dying) == 2
    job.send(dying[:1])
    # Another division of the dead worker's shards, as a re-dispatch may choose.
    job.send(job.nodes_frames([Node(2, 2), Node(1, 1), Node(0, 1)]))
    job.pull()
    assert job.vector(1).tobytes() == reference(plan)[1].tobytes()


def test_rule_05_frames_of_closed_rounds_are_ignored() -> None:
    plan = make_plan(elements=SMALL, steps=3)
    job = started(plan)
    late = job.nodes_frames([Node(0, 4)])
    job.run_round()
    job.send(late)
    job.run()
    job.send(late)
    assert final_bytes(job) == reference(plan)[3].tobytes()


def test_a_frame_is_applied_and_sent_while_others_still_arrive() -> None:
    plan = make_plan(elements=FRAMES, shards=2)
    job = started(plan)
    frames = {f.first_element: (f, p) for f, p in job.nodes_frames([Node(0, 2)])}
    second = max(frames)
    job.send([frames[second]])
    job.pull()
    assert job._arrived[1] == {(second, FRAMES - second)}
    assert not job.is_whole(1)
    expected = reference(plan)[1]
    assert job._versions[1][second:].tobytes() == expected[second:].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": "parameters"}, "vector 'parameters'"),
        ({"first_element": 1}, "no frame of the range"),
        ({"element_count": 5}, "no frame of the range"),
        ({"range": 3}, "not owned"),
        ({"node": (1, 2)}, "no node"),
        ({"node": (0, 3)}, "no node"),
        ({"node": (8, 1)}, "no node"),
        ({"node": (0, 8)}, "above the root"),
        ({"node": (-4, 4)}, "no node"),
        ({"shard_mask": b"\xff"}, "outside"),
        ({"example_count": -1}, "examples"),
        ({"loss_sum": float("nan")}, "not finite"),
        ({"shard_mask": b"\x00"}, "no shard present"),
    ],
)
def test_malformed_frames_are_refused_and_change_nothing(
    change: dict[str, Any], message: str
) -> None:
    job = started(make_plan(elements=SMALL))
    header, payload = job.nodes_frames([Node(0, 4)])[0]
    for name, value in change.items():
        if name == "node":
            header.node.first, header.node.span = value
        else:
            setattr(header, name, value)
    with pytest.raises(InvalidArgument, match=message):
        job.root.contribute(header, payload, 0.0)
    job.run()
    assert final_bytes(job) == reference(job.plan)[3].tobytes()


def test_a_payload_of_the_wrong_length_is_refused() -> None:
    job = started(make_plan(elements=SMALL))
    header, payload = job.nodes_frames([Node(0, 4)])[0]
    with pytest.raises(InvalidArgument, match="bytes instead of"):
        job.root.contribute(header, payload[:-4], 0.0)


# Rule 6: what is not finite


def test_rule_06_absent_shards_pass_their_siblings_through_and_are_counted_lost() -> None:
    plan = make_plan(elements=FRAMES, shards=5, steps=2)
    job = started(plan)
    job.send(job.nodes_frames([Node(0, 4), Node(4, 1)], absent=[1, 4]))
    job.pull()
    job.run()
    expected = reference(plan, absent=lambda shard, step: step == 0 and shard in (1, 4))
    assert final_bytes(job) == expected[2].tobytes()
    assert job.root.examples_lost == 2 * ROWS_PER_LEAF
    assert job.root.examples_doubled == 0


def test_rule_06_a_step_without_any_shard_changes_no_parameter_and_counts() -> None:
    plan = make_plan(elements=SMALL, shards=2, steps=2, optimizer="adam")
    job = started(plan)
    job.send(job.nodes_frames([Node(0, 2)], absent=[0, 1]))
    job.pull()
    assert job.vector(1).tobytes() == job.vector(0).tobytes()
    assert job.go.version == 1
    job.run()
    assert final_bytes(job) == reference(plan, absent=lambda _, step: step == 0)[2].tobytes()


def test_rule_06_a_finite_tree_that_overflows_fails_the_job() -> None:
    job = started(make_plan(elements=SMALL, shards=2))
    frames = job.nodes_frames([Node(0, 1), Node(1, 1)])
    huge = np.full(SMALL, 3e38, np.float32)
    job.send([(header, huge.data.cast("B")) for header, _ in frames])
    job.pull()
    assert job.go.action == GoRecord.ACTION_FAIL
    assert job.go.reason == "PARAMETERS_NON_FINITE"
    failed = [effect for effect in job.effects if isinstance(effect, Failed)]
    assert [effect.reason for effect in failed] == ["PARAMETERS_NON_FINITE"]
    assert not job.is_whole(1)


def test_rule_06_an_overflow_in_another_range_fails_the_job_too() -> None:
    job = started(make_plan(elements=THREE_BLOCKS, ranges=2, shards=2), owners=[[0], [1]])
    job.carry()
    frames = job.nodes_frames([Node(0, 1), Node(1, 1)], ranges=[1])
    huge = np.full(THREE_BLOCKS, 3e38, np.float32)
    job.send([(header, huge[: header.element_count].data.cast("B")) for header, _ in frames])
    failed = [effect for effect in job.effects if isinstance(effect, Failed)]
    assert [effect.reason for effect in failed] == ["PARAMETERS_NON_FINITE"]
    assert job.owner_of(1).version == 0


def test_rule_06_initial_parameters_must_be_finite() -> None:
    job = scripted(make_plan(elements=SMALL))
    job.begin()
    header, _ = job.nodes_frames([Node(0, 1)])[0]
    bad = np.full(SMALL, np.inf, np.float32)
    job.send([(header, bad.data.cast("B"))])
    job.pull()
    assert job.go.reason == "PARAMETERS_NON_FINITE"


@pytest.mark.parametrize("what", ["count", "loss", "presence"])
def test_rule_06_copies_that_disagree_fail_a_reproducible_job(what: str) -> None:
    job = started(make_plan(elements=FRAMES, shards=4))
    first = job.nodes_frames([Node(0, 2)])
    job.send(first[:1])
    if what == "count":
        other = job.nodes_frames([Node(0, 2)])
        for header, _ in other:
            header.example_count += 1
    elif what == "loss":
        other = job.nodes_frames([Node(0, 2)], loss_error=1e-12)
    else:
        other = job.nodes_frames([Node(0, 4)], absent=[1])
    job.send(other[1:2])
    job.pull()
    assert job.go.action == GoRecord.ACTION_FAIL
    assert job.go.reason == "CONTRIBUTIONS_DISAGREE"


def test_rule_06_a_tolerant_job_takes_the_loss_of_the_first_copy() -> None:
    plan = make_plan(elements=FRAMES, shards=4, steps=1, bitwise=False)
    job = started(plan)
    job.send(job.nodes_frames([Node(0, 2)])[:1])
    job.send(job.nodes_frames([Node(0, 2)], loss_error=1e-9)[1:])
    job.send(job.nodes_frames([Node(2, 2)]))
    job.pull()
    assert job.go.action == GoRecord.ACTION_STOP


# Rule 7: no producer waits for a consumer


def test_rule_07_a_stopped_puller_holds_nothing_and_slows_nobody() -> None:
    plan = make_plan(elements=FRAMES, steps=20)
    job = started(plan)
    stopped = [job.root.cursor() for _ in range(5)]
    for cursor in stopped:
        assert cursor.take() is not None
    job.run()
    assert final_bytes(job) == reference(plan)[20].tobytes()
    assert job.root.versions_of(0).held == [19, 20]
    for cursor in stopped:
        waiting = 0
        while cursor.take() is not None:
            waiting += 1
        assert waiting <= 2 * 2 + 3


# Rule 9: checkpoints


def test_rule_09_checkpoints_are_ordered_by_the_go_record_one_at_a_time() -> None:
    plan = make_plan(elements=SMALL, steps=6, checkpoint_every=1)
    job = started(plan)
    for _ in range(3):
        job.run_round()
    assert [each.version for each in checkpoints(job)] == [1]
    assert [go.version for go in job.go_records if go.checkpoint] == [1]
    job.root.checkpoint_done()
    job.run_round()
    assert [each.version for each in checkpoints(job)] == [1, 4]


def test_rule_09_the_end_has_its_checkpoint_even_while_another_one_is_being_written() -> None:
    plan = make_plan(elements=SMALL, steps=2, checkpoint_every=1)
    job = finished(plan)
    assert [(each.version, each.final) for each in checkpoints(job)] == [(1, False), (2, True)]


def test_rule_09_a_snapshot_stays_as_it_was_while_steps_go_on() -> None:
    plan = make_plan(elements=FRAMES, steps=5, optimizer="adam", checkpoint_every=2)
    job = started(plan)
    for _ in range(3):
        job.run_round()
    snapshot = checkpoints(job)[0].snapshot
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


def test_rule_09_a_released_snapshot_is_not_copied_for_any_more() -> None:
    plan = make_plan(elements=SMALL, steps=5, optimizer="adam", checkpoint_every=2)
    job = started(plan)
    for _ in range(2):
        job.run_round()
    snapshot = checkpoints(job)[0].snapshot
    before = job.root._ranges[0].parameters._state[0]
    snapshot.release()
    job.run_round()
    assert job.root._ranges[0].parameters._state[0] is before


@pytest.mark.parametrize("owners", [[[0, 1]], [[0], [1]]])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_rule_09_a_restored_job_goes_on_to_the_same_bits(
    optimizer: str, owners: list[list[int]]
) -> None:
    plan = make_plan(
        elements=THREE_BLOCKS, ranges=2, steps=5, optimizer=optimizer, checkpoint_every=2,
        evaluation_shards=2, evaluate_every=2,
    )  # fmt: skip
    undisturbed = finished(plan, owners)
    first = started(plan, owners)
    while not first.is_whole(3):
        first.run_round()
    saved = {each.snapshot.range.index: each for each in checkpoints(first) if each.version == 2}
    second = scripted(plan, owners, term=2)
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
    assert final_bytes(second) == final_bytes(undisturbed) == reference(plan)[5].tobytes()
    decider, other = second.root.decider, undisturbed.root.decider
    assert decider is not None
    assert other is not None
    assert decider.metrics == other.metrics
    assert decider.examples == other.examples


def test_rule_09_counts_of_lost_examples_survive_a_restore() -> None:
    plan = make_plan(elements=SMALL, shards=2, steps=4, checkpoint_every=1)
    job = started(plan)
    job.send(job.nodes_frames([Node(0, 2)], absent=[1]))
    saved = checkpoints(job)[-1]
    assert json.loads(saved.root_state)["examples_lost"] == ROWS_PER_LEAF
    again = scripted(plan, term=2)
    vector = saved.snapshot.parameters(0)
    again.root.begin_restored(1, {0: (vector, {})}, saved.root_state)
    assert again.root.examples_lost == ROWS_PER_LEAF


def test_rule_09_a_checkpoint_that_does_not_fit_is_refused() -> None:
    from phalanx.errors import DataLoss

    plan = make_plan(elements=SMALL, optimizer="momentum")
    vector = np.zeros(SMALL, np.float32)
    for vectors in (
        (vector[:-1], {"velocity": vector}),
        (vector, {}),
        (vector.astype(np.float64), {"velocity": vector}),
    ):
        with pytest.raises(DataLoss):
            scripted(plan).root.begin_restored(1, {0: vectors}, "{}")
    with pytest.raises(DataLoss, match="no state of range 0"):
        scripted(plan).root.begin_restored(1, {0: (vector, {"velocity": vector})}, "nonsense")


# Rule 14: blocks


@pytest.mark.parametrize("elements", [1, 65_535, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, FRAMES])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rule_14_vectors_of_any_length_are_cut_at_blocks(elements: int, dtype: str) -> None:
    plan = make_plan(elements=elements, steps=1, dtype=dtype, shards=3)
    job = finished(plan)
    for first, _ in job.root.versions_of(0).grid:
        assert first % BLOCK_ELEMENTS == 0
    assert final_bytes(job) == reference(plan)[1].tobytes()


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


def test_a_small_version_comes_in_one_message_with_its_go_record() -> None:
    job = started(make_plan(elements=SMALL, steps=9))
    steady = job.root.cursor(joins=True)
    assert messages(steady) == [(None, 0), (0, 0)]
    job.run_round()
    assert messages(steady) == [(1, 1)]
    for _ in range(3):
        job.run_round()
    assert messages(steady) == [(3, 3), (4, 4)]
    assert messages(job.root.cursor()) == [(None, 3), (None, 4), (3, None), (4, None)]


def test_a_version_of_several_frames_is_not_joined() -> None:
    job = started(make_plan(elements=FRAMES, steps=9))
    steady = job.root.cursor(joins=True)
    assert messages(steady) == [(None, 0), (None, 0), (0, None), (0, None)]


@pytest.mark.parametrize("owners", [[[0], [1]], [[0, 1]]])
def test_joined_go_records_change_no_bit(owners: list[list[int]]) -> None:
    plan = make_plan(
        elements=THREE_BLOCKS // 2, ranges=2, steps=4, evaluation_shards=2, evaluate_every=2
    )
    job = ScriptedJob(make_owner, plan, owners, joins=True)
    job.begin()
    job.run()
    assert final_bytes(job) == reference(plan)[4].tobytes()
    keys = [(go.version, go.round) for go in job.go_records]
    assert keys == sorted(set(keys))


# Pause and failure (rules 3, 8 and 11 as far as they concern ranges)


def test_a_pause_without_workers_takes_effect_at_once_with_a_checkpoint() -> None:
    job = started(make_plan(elements=SMALL, steps=9))
    job.run_round()
    job.effects += job.root.pause()
    job.pull()
    assert (job.go.action, job.go.version) == (GoRecord.ACTION_PAUSE, 1)
    assert [(each.version, each.final) for each in checkpoints(job)] == [(1, False)]


def test_a_pause_in_the_middle_of_a_step_waits_for_the_boundary() -> None:
    job = started(make_plan(elements=FRAMES, steps=9))
    frames = job.nodes_frames([Node(0, 4)])
    job.send(frames[:1])
    job.effects += job.root.pause()
    assert checkpoints(job) == []
    job.send(frames[1:])
    job.pull()
    assert (job.go.action, job.go.version) == (GoRecord.ACTION_PAUSE, 1)
    assert checkpoints(job)[0].snapshot.version == 1


def test_a_pause_that_other_owners_must_learn_of_waits_for_the_boundary() -> None:
    job = started(make_plan(elements=THREE_BLOCKS, ranges=2, steps=9), owners=[[0], [1]])
    job.effects += job.root.pause()
    job.run_round()
    job.carry()
    assert (job.go.action, job.go.version) == (GoRecord.ACTION_PAUSE, 1)
    assert {each.snapshot.range.index for each in checkpoints(job)} == {0, 1}


def test_a_failure_ends_the_term_at_once_and_nothing_counts_after_it() -> None:
    job = started(make_plan(elements=FRAMES))
    frames = job.nodes_frames([Node(0, 4)])
    job.send(frames[:1])
    job.effects += job.root.fail("POISON_SHARD", "shard 3 cannot be computed")
    job.pull()
    assert (job.go.action, job.go.reason) == (GoRecord.ACTION_FAIL, "POISON_SHARD")
    job.send(frames[1:])
    assert not job.is_whole(1)
    assert job.root.fail("AGAIN", "") == []
