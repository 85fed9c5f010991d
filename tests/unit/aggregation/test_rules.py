"""The rules of the data plane that bind an aggregator, one by one, on the core alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.core.effects import Committed, Ended, Failed
from coordinator.aggregation.core.machine import PENDING_GO_RECORDS
from phalanx.errors import Aborted, FailedPrecondition, Internal, InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.reduction import Node
from phalanx.testing.ranges import ROWS_PER_LEAF, make_plan, reference
from phalanx.v1.training_pb2 import GoRecord

SMALL = 1000
THREE_BLOCKS = 2 * BLOCK_ELEMENTS + 777
FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""


# Rule 1: whole versions


def test_rule_01_a_range_keeps_a_version_until_a_contribution_to_the_next_arrives(
    jobs: Any,
) -> None:
    job = jobs.started(make_plan(elements=SMALL))
    versions = job.root.versions_of(0)
    job.send(job.nodes_frames([Node(0, 4)]))
    job.pull()
    assert versions.held == [0, 1]
    job.send(job.nodes_frames([Node(0, 2)]))
    assert versions.held == [1]


def test_rule_01_a_worker_that_was_stopped_goes_on_at_the_version_that_all_ranges_hold(
    jobs: Any,
) -> None:
    job = jobs.started(make_plan(elements=FRAMES, steps=6))
    laggard = job.root.cursor()
    first = laggard.take()
    assert first is not None
    for _ in range(4):
        job.run_round()
    late = jobs.scripted(job.plan)
    late._cursors = [laggard]
    late.pull()
    assert {version for version in range(7) if late.is_whole(version)} == {3, 4}
    assert [go.version for go in late.go_records] == [3, 4]
    assert late.vector(4).tobytes() == job.vector(4).tobytes()


def test_rule_01_a_frame_of_a_version_cannot_be_changed_or_made_twice(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=SMALL))
    versions = job.root.versions_of(0)
    values = versions.values(0, 0)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1
    with pytest.raises(Exception, match="made twice"):
        versions.publish(0, 0, np.zeros(SMALL, np.float32))


def test_rule_01_there_is_never_a_third_version(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=SMALL))
    versions = job.root.versions_of(0)
    zeros = np.zeros(SMALL, np.float32)
    versions.publish(1, 0, zeros)
    with pytest.raises(Internal, match=r"a third version, 2, beside \[0, 1\]"):
        versions.publish(2, 0, zeros)


# Rule 2: terms


@pytest.mark.parametrize("term", [0, 2])
def test_rule_02_another_term_is_refused_with_the_current_one(jobs: Any, term: int) -> None:
    job = jobs.started(make_plan(elements=SMALL))
    header, payload = job.nodes_frames([Node(0, 4)])[0]
    header.term = term
    with pytest.raises(Aborted) as refusal:
        job.root.contribute(header, payload, 0.0)
    assert refusal.value.reason == "STALE_TERM"
    assert refusal.value.details == {"current_term": "1"}
    assert not job.is_whole(1)


def test_rule_02_a_go_record_of_another_term_is_refused(jobs: Any) -> None:
    job = jobs.scripted(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    job.begin()
    stale = GoRecord()
    stale.CopyFrom(job.go)
    stale.term = 0
    with pytest.raises(Aborted):
        job.owner_of(1).go_record(stale)


# Rule 3: the root decides


def test_rule_03_no_range_starts_without_the_go_record(jobs: Any) -> None:
    job = jobs.scripted(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    job.begin()
    frames = job.nodes_frames([Node(0, 1)], ranges=[1])
    with pytest.raises(FailedPrecondition) as refusal:
        job.send(frames)
    assert refusal.value.reason == "NO_GO_RECORD"
    job.carry()
    job.send(frames)
    assert job.owner_of(1).version == 0


def test_rule_03_a_go_record_that_comes_early_is_kept_until_the_range_has_its_version(
    jobs: Any,
) -> None:
    job = jobs.scripted(make_plan(elements=THREE_BLOCKS, ranges=2, steps=2), owners=[[0], [1]])
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


def test_rule_03_go_records_of_versions_to_come_are_kept_up_to_a_bound(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    other = job.owner_of(1)
    records = [
        GoRecord(term=1, version=5 + number, action=GoRecord.ACTION_TRAIN)
        for number in range(PENDING_GO_RECORDS + 1)
    ]
    for record in records[:-1]:
        assert other.go_record(record) == []
    assert other.go_record(records[0]) == []
    with pytest.raises(FailedPrecondition) as refusal:
        other.go_record(records[-1])
    assert refusal.value.reason == "TOO_MANY_GO_RECORDS"


def test_rule_03_go_records_are_taken_in_order_and_repeated_ones_change_nothing(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    older = job.go_records[0]
    job.run_round()
    other = job.owner_of(1)
    assert other.go_record(older) == []
    job.carry()
    assert other.go_record(job.go) == []
    job.send(job.nodes_frames([Node(0, 4)]))
    job.pull()
    assert job.vector(2).tobytes() == reference(job.plan)[2].tobytes()


def test_rule_03_nobody_but_the_root_decides(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=THREE_BLOCKS, ranges=3), owners=[[0, 1], [2]])
    forged = GoRecord(term=1, version=0, round=9, action=GoRecord.ACTION_FAIL)
    assert job.root.go_record(forged) == []
    job.run()
    assert jobs.final_bytes(job) == reference(job.plan)[3].tobytes()


def test_rule_03_a_round_that_has_made_a_part_of_the_next_version_is_finished(jobs: Any) -> None:
    plan = make_plan(elements=10 * BLOCK_ELEMENTS, ranges=2, shards=1)
    job = jobs.started(plan, owners=[[0], [1]])
    job.carry()
    first, second = job.nodes_frames([Node(0, 1)], ranges=[1])
    job.send([first])
    late = GoRecord(term=1, version=0, round=9, action=GoRecord.ACTION_PAUSE, checkpoint=True)
    assert job.owner_of(1).go_record(late) == []
    job.send([second])
    assert job.owner_of(1).version == 1


def test_rule_03_the_root_goes_at_most_one_version_ahead_of_the_other_ranges(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=THREE_BLOCKS, ranges=2), owners=[[0], [1]])
    job.carry()
    job.send(job.nodes_frames([Node(0, 4)], ranges=[0]))
    job.pull()
    ahead = job.go
    assert ahead.version == 1
    assert not job.is_whole(1)
    assert job.root.versions_of(0).held == [0, 1]
    # A worker that joins now can still compute step 0 for the range that lacks it.
    joiner = jobs.scripted(job.plan, owners=[[0], [1]])
    joiner._cursors = [owner.cursor() for owner in job.owners]
    joiner.pull()
    assert joiner.is_whole(0)
    assert [(go.version, go.round) for go in joiner.go_records] == [(0, 0), (0, 1), (1, 0)]


def test_rule_03_the_end_reaches_every_range_with_its_checkpoint(jobs: Any) -> None:
    job = jobs.finished(make_plan(elements=THREE_BLOCKS, ranges=2, steps=2), owners=[[0], [1]])
    ordered = {(each.snapshot.range.index, each.version) for each in jobs.checkpoints(job)}
    assert ordered == {(0, 2), (1, 2)}
    assert all(each.final and each.terminal for each in jobs.checkpoints(job))
    ends = [effect for effect in job.effects if isinstance(effect, Ended)]
    assert [effect.go.action for effect in ends] == [GoRecord.ACTION_STOP] * 2


def test_rule_03_evaluation_is_a_barrier_of_range_0_alone(jobs: Any) -> None:
    plan = make_plan(
        elements=THREE_BLOCKS, ranges=2, steps=2, evaluation_shards=3, evaluate_every=1
    )
    job = jobs.started(plan, owners=[[0], [1]])
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
    assert jobs.final_bytes(job) == reference(plan)[2].tobytes()


# Rules 4 and 5: many ranges, nodes in any order


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("owners", [[[0], [1], [2]], [[0, 2], [1]], [[0, 1, 2]]])
def test_rule_04_the_number_of_ranges_and_owners_changes_no_bit(
    jobs: Any, optimizer: str, owners: list[list[int]]
) -> None:
    one = make_plan(elements=THREE_BLOCKS, steps=3, optimizer=optimizer, shards=5)
    three = make_plan(elements=THREE_BLOCKS, steps=3, optimizer=optimizer, shards=5, ranges=3)
    expected = reference(one)[3].tobytes()
    assert jobs.final_bytes(jobs.finished(one)) == expected
    assert jobs.final_bytes(jobs.finished(three, owners)) == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_rule_05_no_order_of_arrival_and_no_division_changes_a_bit(
    jobs: Any, seed: int, workers: int
) -> None:
    plan = make_plan(elements=FRAMES, shards=5, steps=2)
    job = jobs.scripted(plan)
    job.begin()
    job.run(random.Random(seed), workers)
    assert jobs.final_bytes(job) == reference(plan)[2].tobytes()


def test_rule_05_summing_in_arrival_order_would_give_other_bits(jobs: Any) -> None:
    """Or the tests of order above would show nothing."""
    job = jobs.started(make_plan(elements=SMALL, shards=5))
    leaves = [
        np.frombuffer(p, np.float32) for _, p in job.nodes_frames([Node(i, 1) for i in range(5)])
    ]
    forward = leaves[0] + leaves[1] + leaves[2] + leaves[3] + leaves[4]
    backward = leaves[4] + leaves[3] + leaves[2] + leaves[1] + leaves[0]
    tree = ((leaves[0] + leaves[1]) + (leaves[2] + leaves[3])) + leaves[4]
    assert len({forward.tobytes(), backward.tobytes(), tree.tobytes()}) == 3


def test_rule_05_duplicates_and_descendants_of_filled_nodes_change_nothing(jobs: Any) -> None:
    plan = make_plan(elements=FRAMES, shards=4, steps=1)
    job = jobs.started(plan)
    leaves = job.nodes_frames([Node(index, 1) for index in range(4)])
    pairs = job.nodes_frames([Node(0, 2), Node(2, 2)])
    job.send([*leaves[:2], *pairs[:2], *leaves, *pairs, *leaves])
    job.pull()
    assert job.vector(1).tobytes() == reference(plan)[1].tobytes()
    committed = [effect for effect in job.effects if isinstance(effect, Committed)]
    assert [effect.example_count for effect in committed] == [4 * ROWS_PER_LEAF]


def test_rule_05_a_worker_killed_half_way_through_its_frames_is_taken_over(jobs: Any) -> None:
    plan = make_plan(elements=FRAMES, shards=4, steps=1)
    job = jobs.started(plan)
    dying = job.nodes_frames([Node(0, 2)])
    assert len(dying) == 2
    job.send(dying[:1])
    # Another division of the dead worker's shards, as a re-dispatch may choose.
    job.send(job.nodes_frames([Node(2, 2), Node(1, 1), Node(0, 1)]))
    job.pull()
    assert job.vector(1).tobytes() == reference(plan)[1].tobytes()


def test_rule_05_frames_of_closed_rounds_are_ignored(jobs: Any) -> None:
    plan = make_plan(elements=SMALL, steps=3)
    job = jobs.started(plan)
    late = job.nodes_frames([Node(0, 4)])
    job.run_round()
    job.send(late)
    job.run()
    job.send(late)
    assert jobs.final_bytes(job) == reference(plan)[3].tobytes()


def test_a_frame_is_applied_and_sent_while_others_still_arrive(jobs: Any) -> None:
    plan = make_plan(elements=FRAMES, shards=2)
    job = jobs.started(plan)
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
    jobs: Any, change: dict[str, Any], message: str
) -> None:
    job = jobs.started(make_plan(elements=SMALL))
    header, payload = job.nodes_frames([Node(0, 4)])[0]
    for name, value in change.items():
        if name == "node":
            header.node.first, header.node.span = value
        else:
            setattr(header, name, value)
    with pytest.raises(InvalidArgument, match=message):
        job.root.contribute(header, payload, 0.0)
    job.run()
    assert jobs.final_bytes(job) == reference(job.plan)[3].tobytes()


def test_a_payload_of_the_wrong_length_is_refused(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=SMALL))
    header, payload = job.nodes_frames([Node(0, 4)])[0]
    with pytest.raises(InvalidArgument, match="bytes instead of"):
        job.root.contribute(header, payload[:-4], 0.0)


# Rule 6: what is not finite


def test_rule_06_absent_shards_pass_their_siblings_through_and_are_counted_lost(jobs: Any) -> None:
    plan = make_plan(elements=FRAMES, shards=5, steps=2)
    job = jobs.started(plan)
    job.send(job.nodes_frames([Node(0, 4), Node(4, 1)], absent=[1, 4]))
    job.pull()
    job.run()
    expected = reference(plan, absent=lambda shard, step: step == 0 and shard in (1, 4))
    assert jobs.final_bytes(job) == expected[2].tobytes()
    assert job.root.examples_lost == 2 * ROWS_PER_LEAF
    assert job.root.examples_doubled == 0


def test_rule_06_a_step_without_any_shard_changes_no_parameter_and_counts(jobs: Any) -> None:
    plan = make_plan(elements=SMALL, shards=2, steps=2, optimizer="adam")
    job = jobs.started(plan)
    job.send(job.nodes_frames([Node(0, 2)], absent=[0, 1]))
    job.pull()
    assert job.vector(1).tobytes() == job.vector(0).tobytes()
    assert job.go.version == 1
    job.run()
    assert jobs.final_bytes(job) == reference(plan, absent=lambda _, step: step == 0)[2].tobytes()


def test_rule_06_a_finite_tree_that_overflows_fails_the_job(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=SMALL, shards=2))
    frames = job.nodes_frames([Node(0, 1), Node(1, 1)])
    huge = np.full(SMALL, 3e38, np.float32)
    job.send([(header, huge.data.cast("B")) for header, _ in frames])
    job.pull()
    assert job.go.action == GoRecord.ACTION_FAIL
    assert job.go.reason == "PARAMETERS_NON_FINITE"
    failed = [effect for effect in job.effects if isinstance(effect, Failed)]
    assert [effect.reason for effect in failed] == ["PARAMETERS_NON_FINITE"]
    assert not job.is_whole(1)


def test_rule_06_an_overflow_in_another_range_fails_the_job_too(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=THREE_BLOCKS, ranges=2, shards=2), owners=[[0], [1]])
    job.carry()
    frames = job.nodes_frames([Node(0, 1), Node(1, 1)], ranges=[1])
    huge = np.full(THREE_BLOCKS, 3e38, np.float32)
    job.send([(header, huge[: header.element_count].data.cast("B")) for header, _ in frames])
    failed = [effect for effect in job.effects if isinstance(effect, Failed)]
    assert [effect.reason for effect in failed] == ["PARAMETERS_NON_FINITE"]
    assert job.owner_of(1).version == 0


def test_rule_06_a_range_that_failed_makes_no_further_frame(jobs: Any) -> None:
    elements = 10 * BLOCK_ELEMENTS
    job = jobs.started(make_plan(elements=elements, ranges=2, shards=1), owners=[[0], [1]])
    job.carry()
    bad, good = job.nodes_frames([Node(0, 1)], ranges=[1])
    spoilt = np.full(bad[0].element_count, np.inf, np.float32).data.cast("B")
    job.send([(bad[0], spoilt), good])
    assert [type(effect) for effect in job.effects].count(Failed) == 1
    assert job.owner_of(1).versions_of(1).held == [0]


def test_rule_06_initial_parameters_must_be_finite(jobs: Any) -> None:
    job = jobs.scripted(make_plan(elements=SMALL))
    job.begin()
    header, _ = job.nodes_frames([Node(0, 1)])[0]
    bad = np.full(SMALL, np.inf, np.float32)
    job.send([(header, bad.data.cast("B"))])
    job.pull()
    assert job.go.reason == "PARAMETERS_NON_FINITE"


@pytest.mark.parametrize("what", ["count", "loss", "presence"])
def test_rule_06_copies_that_disagree_fail_a_reproducible_job(jobs: Any, what: str) -> None:
    job = jobs.started(make_plan(elements=FRAMES, shards=4))
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


def test_rule_06_a_shard_that_is_present_in_one_frame_cannot_be_absent_in_another(
    jobs: Any,
) -> None:
    job = jobs.started(make_plan(elements=FRAMES, shards=4))
    job.send(job.nodes_frames([Node(0, 2)])[:1])
    job.send(job.nodes_frames([Node(1, 1)], absent=[1])[1:])
    job.pull()
    assert job.go.reason == "CONTRIBUTIONS_DISAGREE"


def test_rule_06_a_tolerant_job_takes_the_loss_of_the_first_copy(jobs: Any) -> None:
    plan = make_plan(elements=FRAMES, shards=4, steps=1, bitwise=False)
    job = jobs.started(plan)
    job.send(job.nodes_frames([Node(0, 2)])[:1])
    job.send(job.nodes_frames([Node(0, 2)], loss_error=1e-9)[1:])
    job.send(job.nodes_frames([Node(2, 2)]))
    job.pull()
    assert job.go.action == GoRecord.ACTION_STOP


# Rule 7: no producer waits for a consumer


def test_rule_07_a_stopped_puller_holds_nothing_and_slows_nobody(jobs: Any) -> None:
    plan = make_plan(elements=FRAMES, steps=20)
    job = jobs.started(plan)
    stopped = [job.root.cursor() for _ in range(5)]
    for cursor in stopped:
        assert cursor.take() is not None
    job.run()
    assert jobs.final_bytes(job) == reference(plan)[20].tobytes()
    assert job.root.versions_of(0).held == [19, 20]
    for cursor in stopped:
        waiting = 0
        while cursor.take() is not None:
            waiting += 1
        assert waiting <= 2 * 2 + 3
