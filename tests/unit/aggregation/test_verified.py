"""Contributions count once as many copies as needed are equal; who is outvoted is told of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.core.making import make_ranges
from coordinator.aggregation.core.verified import MISSING_AFTER_S
from coordinator.aggregation.core.verifiers import LONG_LATE_S
from phalanx.copies import PATIENCE_UNMEASURED_S
from phalanx.errors import InvalidArgument
from phalanx.reduction import Node
from phalanx.testing.ranges import ScriptedJob, initial_vector
from phalanx.v1.job_spec_pb2 import JobSpec, Median, Reduction
from phalanx.v1.training_pb2 import GoRecord
from tests.unit.aggregation.voters import (
    SHARDS,
    TRAIN,
    TWO_FRAMES,
    Voters,
    final_bytes,
    verified_plan,
)


@pytest.mark.parametrize("elements", [600, TWO_FRAMES])
def test_the_bits_are_those_of_the_job_without_verification(elements: int) -> None:
    plan = verified_plan(elements=elements, steps=2)
    for seed in range(3):
        voters = Voters(plan, seed=seed)
        job = voters.run()
        assert job.vector(2).tobytes() == final_bytes(plan)
        assert job.root.examples_lost == job.root.examples_doubled == 0
        assert voters.caught == []
        assert voters.verified == 1 + 2 * SHARDS + 3, "the parameters, two steps, an evaluation"


def test_a_minority_of_liars_changes_nothing_in_any_order_and_is_caught() -> None:
    plan = verified_plan()

    def lie(name: str, go: GoRecord, shard: int) -> bool:
        """Three of six lie, never two about the same leaf."""
        return name in ("w1", "w2", "w3") and (go.version + shard) % 3 == int(name[1:]) - 1

    caught: set[str] = set()
    for seed in range(30):
        voters = Voters(plan, workers=6, lie=lie, seed=seed)
        job = voters.run()
        assert job.vector(3).tobytes() == final_bytes(plan)
        assert job.root.examples_lost == job.root.examples_doubled == 0
        names = [each.worker_id for each in voters.caught]
        assert len(set(names)) == len(names), "each is told of once"
        assert {*names} <= {"w1", "w2", "w3"}
        caught.update(names)
    assert caught == {"w1", "w2", "w3"}


def test_who_is_caught_is_told_with_leaf_and_both_hashes() -> None:
    voters = Voters(verified_plan(), lie=lambda name, go, _: name == "w2" and go.action == TRAIN)
    voters.run_round()
    voters.run_round()
    [caught] = voters.caught
    assert (caught.worker_id, caught.incarnation, caught.version) == ("w2", "one", 0)
    assert caught.action == TRAIN
    assert caught.node.span == 1
    assert len(caught.digest) == len(caught.majority) == 64
    assert caught.digest != caught.majority
    assert "w2" not in caught.agreed
    assert len(caught.agreed) == 2


def in_training(**options: Any) -> Voters:
    """A job whose first train round is open."""
    voters = Voters(verified_plan(**options))
    voters.run_round()
    assert voters.job.go.action == TRAIN
    return voters


def test_nothing_enters_a_sum_before_two_are_equal() -> None:
    voters = in_training()
    for shard in range(SHARDS):
        voters.deliver(voters.home(shard), shard)
    assert voters.job.root.versions_of(0).held == [0]
    copies = voters.take_asked()
    assert {shard for _, shard in copies} == set(range(SHARDS))
    for name, shard in copies[1:]:
        voters.deliver(name, shard, copy=True)
    assert voters.job.root.versions_of(0).held == [0]
    voters.deliver(*copies[0], copy=True)
    assert voters.job.root.version == 1


def test_copies_are_never_asked_of_who_has_voted_nor_of_two_for_one() -> None:
    voters = in_training()
    for shard in range(SHARDS):
        voters.deliver(voters.home(shard), shard)
    copies = voters.take_asked()
    assert sorted(shard for _, shard in copies) == list(range(SHARDS))
    assert all(name != voters.home(shard) for name, shard in copies)


def test_two_that_differ_call_a_third_and_a_worker_has_one_vote() -> None:
    voters = in_training()
    voters.lie = lambda name, *_: name == "w1"
    voters.deliver("w1", 0)
    [(second, _)] = voters.take_asked()
    voters.deliver("w1", 0)
    voters.deliver("w1", 0, copy=True)
    assert voters.job.root.verifiers_missing(0.0) is None
    assert voters.take_asked() == []
    voters.deliver(second, 0, copy=True)
    [(third, shard)] = voters.take_asked()
    assert (shard, len({"w1", second, third})) == (0, 3)
    assert voters.caught == []
    voters.deliver(third, 0, copy=True)
    [caught] = voters.caught
    assert (caught.worker_id, caught.agreed) == ("w1", tuple(sorted((second, third))))


def test_a_vote_stands_whatever_its_worker_sends_later() -> None:
    voters = in_training()
    voters.lie = lambda name, *_: name == "w1"
    voters.deliver("w1", 0)
    voters.lie = lambda *_: False
    voters.deliver("w1", 0)
    voters.deliver("w2", 0, copy=True)
    assert voters.verified == 1, "the parameters; these two differ"
    voters.deliver("w3", 0, copy=True)
    assert voters.verified == 2
    assert [each.worker_id for each in voters.caught] == ["w1"]


def test_of_five_three_must_agree() -> None:
    voters = in_training(replicas=5)
    voters.deliver("w1", 0)
    asked = [name for name, _ in voters.take_asked()]
    assert len(asked) == 2
    voters.lie = lambda name, *_: name == asked[0]
    voters.deliver(asked[0], 0, copy=True)
    [(fourth, _)] = voters.take_asked()
    voters.deliver(asked[1], 0, copy=True)
    assert voters.caught == []
    voters.deliver(fourth, 0, copy=True)
    assert [each.worker_id for each in voters.caught] == [asked[0]]


def test_what_a_caught_worker_has_voted_and_sends_does_not_count() -> None:
    voters = in_training()
    voters.lie = lambda name, _, shard: (name, shard) == ("w1", 0)
    voters.deliver("w1", 4)
    voters.deliver("w1", 0)
    voters.deliver("w2", 0, copy=True)
    voters.deliver("w3", 0, copy=True)
    assert [each.worker_id for each in voters.caught] == ["w1"]
    assert [name for name, _ in voters.take_asked() if name == "w1"] == []
    voters.deliver("w2", 4, copy=True)
    assert voters.verified == 1 + 1, "the parameters, and shard 0"
    voters.deliver("w1", 4)
    assert voters.verified == 2
    voters.deliver("w3", 4, copy=True)
    assert voters.verified == 3


def test_another_start_of_a_caught_worker_is_believed_again() -> None:
    voters = in_training()
    voters.lie = lambda name, *_: name == "w1"
    for name in ("w1", "w2", "w3"):
        voters.deliver(name, 0)
    voters.lie = lambda *_: False
    voters.disconnect("w1")
    voters.connect("w1", "one")
    voters.deliver("w1", 1)
    voters.deliver("w2", 1)
    assert voters.verified == 2, "the same start is not"
    voters.disconnect("w1")
    voters.connect("w1", "two")
    voters.deliver("w1", 1)
    assert voters.verified == 3


def test_a_late_vote_that_differs_is_told_too() -> None:
    voters = in_training()
    voters.deliver("w1", 0)
    voters.deliver("w2", 0, copy=True)
    voters.lie = lambda *_: True
    voters.deliver("w3", 0, copy=True)
    [caught] = voters.caught
    assert (caught.worker_id, caught.agreed) == ("w3", ("w1", "w2"))


@pytest.mark.parametrize("what", ["loss", "count"])
def test_loss_and_examples_are_hashed_too(what: str) -> None:
    voters = in_training()
    frames = voters.frames("w1", 0, copy=False)
    for header, _ in frames:
        if what == "loss":
            header.loss_sum += 1.0
        else:
            header.example_count += 1
    voters.send("w1", frames)
    voters.deliver("w2", 0, copy=True)
    assert voters.verified == 1
    voters.deliver("w3", 0, copy=True)
    assert [each.worker_id for each in voters.caught] == ["w1"]


def test_an_absent_shard_is_voted_on_like_any_other() -> None:
    voters = in_training(elements=TWO_FRAMES)
    for name in ("w1", "w2"):
        voters.send(name, voters.frames(name, 0, copy=False, absent=[0]))
    for shard in range(1, SHARDS):
        for name in ("w1", "w2"):
            voters.deliver(name, shard)
    assert voters.job.root.version == 1
    assert voters.job.root.examples_lost == 8


def test_a_part_of_a_copy_on_a_broken_stream_is_not_continued_on_the_next() -> None:
    voters = in_training(elements=TWO_FRAMES)
    first, last = voters.frames("w1", 0, copy=False)
    voters.send("w1", [first])
    old = voters.keys["w1"]
    voters.connect("w1")
    voters.send("w1", [first])
    voters.ranges.stream_closed(old)
    voters.send("w1", [last])
    voters.deliver("w2", 0, copy=True)
    assert voters.verified == 2


def test_frames_of_one_copy_must_agree_with_each_other() -> None:
    voters = in_training(elements=TWO_FRAMES)
    frames = voters.frames("w1", 0, copy=False)
    frames[1][0].loss_sum += 1.0
    with pytest.raises(InvalidArgument, match="in one contribution differ"):
        voters.send("w1", frames)
    with pytest.raises(InvalidArgument, match="by nodes of 1"):
        voters.send("w1", voters.job.nodes_frames([Node(0, 2)]))


def test_where_a_verifier_dies_another_is_asked() -> None:
    voters = in_training()
    voters.deliver("w1", 0)
    [(second, _)] = voters.take_asked()
    voters.disconnect(second)
    voters.perform(voters.ranges.look(0.1))
    asked = voters.take_asked()
    third = next(name for name, shard in asked if shard == 0)
    assert third not in ("w1", second)
    voters.deliver(third, 0, copy=True)
    assert voters.verified == 2


def test_where_a_verifier_is_late_another_is_asked_and_it_is_told() -> None:
    voters = in_training()
    voters.deliver("w1", 0)
    [(second, _)] = voters.take_asked()
    voters.perform(voters.ranges.look(PATIENCE_UNMEASURED_S - 0.01))
    assert voters.take_asked() == []
    voters.perform(voters.ranges.look(PATIENCE_UNMEASURED_S))
    assert voters.ranges.late_workers(PATIENCE_UNMEASURED_S + 1) == {second: pytest.approx(11.0)}
    third = next(name for name, shard in voters.take_asked() if shard == 0)
    assert third not in ("w1", second)


def test_whose_home_is_late_costs_one_wait_and_not_one_in_each_step() -> None:
    voters = Voters(verified_plan(steps=12, evaluation_shards=0))
    for _ in range(6):
        voters.now_s += 0.1
        voters.run_round()
    late = voters.home(0)
    patience_s = voters.ranges._verifiers.patience_s
    assert patience_s < PATIENCE_UNMEASURED_S

    def owed_by_others() -> None:
        for shard in range(SHARDS):
            if voters.home(shard) != late:
                voters.deliver(voters.home(shard), shard)
        for name, shard in voters.take_asked():
            if name != late:
                voters.deliver(name, shard, copy=True)

    owed_by_others()
    before = voters.job.root.version
    assert voters.job.root.version == before
    voters.now_s += patience_s
    voters.perform(voters.ranges.look(voters.now_s))
    while voters.job.root.version == before:
        copies = voters.take_asked()
        assert copies, "others are asked for what is late"
        for name, shard in copies:
            assert name != late
            voters.deliver(name, shard, copy=True)
    voters.job.pull()
    assert late in voters.ranges.late_workers(voters.now_s)
    asked = voters.take_asked()
    voters.asked = [(name, (before + 1, 0), Node(shard, 1)) for name, shard in asked]
    assert late not in {name for name, _ in asked}
    owed_by_others()
    for name, shard in voters.take_asked():
        voters.deliver(name, shard, copy=True)
    assert voters.job.root.version == before + 2, "its shards were asked of others at once"


def one_owes_its_own() -> tuple[Voters, int, set[int]]:
    """Of two workers one owes, at a version, its own shards and nothing else."""
    voters = Voters(verified_plan(steps=12, evaluation_shards=0), workers=2)
    for _ in range(4):
        voters.run_round()
    version = voters.job.root.version
    own = {shard for shard in range(SHARDS) if voters.home(shard) == "w2"}
    for shard in range(SHARDS):
        voters.deliver("w1", shard, copy=shard in own)
    for shard in set(range(SHARDS)) - own:
        voters.deliver("w2", shard, copy=True)
    voters.take_asked()
    assert voters.job.root.version == version
    return voters, version, own


def test_who_is_late_is_asked_where_nobody_else_could() -> None:
    voters, version, own = one_owes_its_own()
    late_s = voters.ranges._verifiers.patience_s
    voters.perform(voters.ranges.look(late_s))
    assert voters.ranges.late_workers(late_s) == {"w2": pytest.approx(late_s)}
    # Control may have moved what was its own: it computes that if it is asked for it.
    assert voters.take_asked() == [("w2", shard) for shard in sorted(own)]
    voters.perform(voters.ranges.look(late_s + 0.1))
    assert voters.take_asked() == [], "once is enough"
    for shard in own:
        voters.deliver("w2", shard, copy=True)
    assert voters.job.root.version == version + 1


def test_who_comes_back_within_a_round_is_asked_and_has_as_long_as_others() -> None:
    voters, _, own = one_owes_its_own()
    patience_s = voters.ranges._verifiers.patience_s
    voters.perform(voters.ranges.look(patience_s))
    voters.disconnect("w2")
    voters.take_asked()
    back_s = patience_s + LONG_LATE_S
    voters.connect("w2")
    voters.perform(voters.ranges.look(back_s))
    assert voters.take_asked() == [("w2", shard) for shard in sorted(own)]
    voters.perform(voters.ranges.look(back_s + patience_s - 0.01))
    assert voters.ranges.late_workers(back_s + patience_s) == {}
    voters.perform(voters.ranges.look(back_s + patience_s))
    late = voters.ranges.late_workers(back_s + patience_s)
    assert late == {"w2": pytest.approx(patience_s)}


def test_without_enough_workers_it_waits_and_says_what_for() -> None:
    voters = in_training()
    voters.disconnect("w2")
    voters.disconnect("w3")
    voters.disconnect("w4")
    for shard in range(SHARDS):
        voters.deliver("w1", shard)
    assert voters.ranges.verifiers_missing(0.0) is None, "members come and go"
    missing = voters.ranges.verifiers_missing(MISSING_AFTER_S)
    assert missing is not None
    assert (missing.version, missing.leaves, missing.node) == (0, SHARDS, Node(0, 1))
    assert (missing.copies, missing.results, missing.needed) == (1, 1, 2)
    assert voters.job.root.version == 0
    voters.connect("w2")
    voters.perform(voters.ranges.look(1.5))
    assert voters.ranges.verifiers_missing(1.5) is None
    for name, shard in voters.take_asked():
        voters.deliver(name, shard, copy=True)
    assert voters.job.root.version == 1


def test_workers_that_are_late_for_long_are_not_counted_on() -> None:
    voters = in_training()
    for shard in range(SHARDS):
        voters.deliver("w1", shard)
    late_s = PATIENCE_UNMEASURED_S
    for _ in range(3):
        voters.perform(voters.ranges.look(late_s))
        late_s += PATIENCE_UNMEASURED_S
    assert voters.ranges.verifiers_missing(late_s) is None
    voters.perform(voters.ranges.look(late_s + LONG_LATE_S))
    assert voters.ranges.verifiers_missing(late_s + LONG_LATE_S + MISSING_AFTER_S) is not None


def test_results_that_all_differ_are_told_as_such() -> None:
    voters = in_training()
    voters.lie = lambda *_: True
    for name in ("w1", "w2", "w3", "w4"):
        voters.deliver(name, 0)
    assert voters.caught == []
    voters.ranges.verifiers_missing(0.0)
    missing = voters.ranges.verifiers_missing(MISSING_AFTER_S)
    assert missing is not None
    assert (missing.copies, missing.results, missing.needed) == (4, 4, 2)


def test_the_initial_parameters_are_verified() -> None:
    plan = verified_plan(audit=0.01, steps=1)
    voters = Voters(plan, lie=lambda name, go, _: name == "w1" and go.version == 0)
    voters.run_round()
    assert voters.job.vector(0).tobytes() == initial_vector(plan).tobytes()
    assert [each.worker_id for each in voters.caught] == ["w1"]


def test_a_robust_reducer_sees_only_what_was_verified() -> None:
    plan = verified_plan(steps=2)
    spec = JobSpec.FromString(plan.spec)
    spec.train.reduction.CopyFrom(Reduction(median=Median()))
    plan.spec = spec.SerializeToString()
    wanted = Voters(plan).run().vector(2).tobytes()
    assert wanted != final_bytes(plan)
    for seed in range(5):
        voters = Voters(plan, lie=lambda name, *_: name == "w1", seed=seed)
        assert voters.run().vector(2).tobytes() == wanted


def test_a_pause_in_the_middle_of_votes_forgets_them() -> None:
    voters = in_training()
    voters.deliver("w1", 0)
    voters.perform(voters.ranges.pause())
    voters.job.pull()
    assert voters.job.go.action == GoRecord.ACTION_PAUSE
    assert voters.ranges.verifiers_missing(99.0) is None
    assert voters.ranges.look(99.0) == []


def test_one_range_is_needed() -> None:
    plan = verified_plan(elements=TWO_FRAMES, ranges=2)
    with pytest.raises(InvalidArgument, match="in one range, not in 2"):
        ScriptedJob(make_ranges, plan)


def test_a_stream_that_is_not_a_workers_is_refused() -> None:
    voters = in_training()
    frames = voters.frames("w1", 0, copy=False)
    voters.keys["w9"] = object()
    with pytest.raises(InvalidArgument, match="no worker's stream"):
        voters.send("w9", frames)
    assert np.isfinite(voters.job.vector(0)).all()
