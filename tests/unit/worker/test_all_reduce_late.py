"""Late shards of all-reduce jobs: copies where a leaf is late, patience where a member is."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.copies import PATIENCE_UNMEASURED_S
from phalanx.frames import BLOCK_ELEMENTS
from tests.unit.worker.all_reduce_cluster import Cluster, plan_of, reference, spec_of
from worker.core.all_reduce.job import HELLO_S

STEPS = 9
NAMES = ["w0", "w1", "w2"]
SHARDS = 7


def cluster(seed: int, blocks: int = 2) -> Cluster:
    elements = (blocks - 1) * BLOCK_ELEMENTS + 8
    return Cluster(seed, plan_of(spec_of(STEPS), SHARDS, elements), NAMES)


def at(job: Cluster, version: int) -> None:
    """Let every member hold a version at least; leaves take some time."""
    assert job.wait(30, until=lambda: min(job.versions) >= version)


def ends_with_the_same_bits(job: Cluster, seconds: float = 10.0) -> None:
    assert job.wait(seconds, until=lambda: job.versions == {STEPS}), job.versions
    expected = reference(job.plan, STEPS)[-1]
    for member in job.members.values():
        assert member.failures == []
        np.testing.assert_array_equal(member.core.replica.parameters, expected)
    assert [version for _, version in job.committed] == list(range(1, STEPS + 1))
    (root,) = (each.core.root for each in job.members.values() if each.core.root is not None)
    counted = (root.decider.examples, root.examples_lost, root.examples_doubled)
    assert counted == (STEPS * job.plan.train_rows, 0, 0)


@pytest.mark.parametrize("victim", NAMES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_leaf_that_hangs_costs_one_wait_and_others_compute_its_shards(victim, blocks):
    job = cluster(blocks, blocks)
    at(job, 4)
    job.members[victim].hangs = True
    began_s = job.now_s
    ends_with_the_same_bits(job)
    assert job.now_s - began_s < 2.0, "known to be late, it is waited for once"
    told = [each for member in job.members.values() for each in member.told]
    assert {each.worker_id for each in told} == {victim}
    assert all(victim not in each.copied_to for each in told)
    assert not any(member.core.unheard() for member in job.members.values())


def test_before_anything_is_measured_it_takes_longer_and_a_copy_may_come_from_the_owner():
    job = Cluster(3, plan_of(spec_of(STEPS), SHARDS, 8), ["w0", "w1"])
    at(job, 0)
    job.members["w1"].hangs = True
    assert not job.wait(PATIENCE_UNMEASURED_S - 0.5, until=lambda: max(job.versions) >= 1)
    ends_with_the_same_bits(job, PATIENCE_UNMEASURED_S)


def test_the_root_asks_another_member_for_the_parameters_that_its_leaf_does_not_make():
    job = cluster(11)
    job.members["w0"].hangs = True
    assert not job.wait(PATIENCE_UNMEASURED_S - 0.5, until=lambda: max(job.versions) >= 0)
    assert job.wait(1.0, until=lambda: job.versions == {0})
    first = job.members["w0"].told[0]
    assert (first.worker_id, first.cause, first.step) == ("w0", "late", 0)
    assert (list(first.shards), list(first.copied_to)) == ([0], ["w1"])
    assert job.delivered["state parameters"] == 2, "of one frame: to the root, and from it to w2"
    ends_with_the_same_bits(job, 3 * PATIENCE_UNMEASURED_S)


def test_a_copy_of_the_initial_parameters_that_hangs_as_well_costs_one_more_wait():
    job = cluster(12)
    job.members["w0"].hangs = job.members["w1"].hangs = True
    assert not job.wait(2 * PATIENCE_UNMEASURED_S - 0.5, until=lambda: max(job.versions) >= 0)
    assert job.wait(1.5, until=lambda: job.versions == {0})
    job.members["w1"].hangs = False
    ends_with_the_same_bits(job, 3 * PATIENCE_UNMEASURED_S)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("taken", ["copied", "asked"])
def test_a_leaf_that_is_only_slow_at_the_initial_parameters_changes_no_bit(seed, taken):
    """It ends while another member makes them, or while the root is sent what that one made."""
    job = cluster(seed, 3)
    root, maker = job.members["w0"], job.members["w1"]
    root.hangs = maker.hangs = True
    job.wait(PATIENCE_UNMEASURED_S + 0.5)
    assert maker.running, "it was ordered a copy"
    if taken == "asked":
        maker.hangs = False
        assert job.wait(2.0, until=lambda: job.delivered["state parameters"] > 0)
    root.hangs = maker.hangs = False
    ends_with_the_same_bits(job)


def test_a_member_that_made_the_initial_parameters_and_sends_none_is_told():
    job = cluster(13)
    root, maker = job.members["w0"], job.members["w1"]
    root.hangs = True
    assert job.wait(PATIENCE_UNMEASURED_S + 1.0, until=lambda: root.core._holder == "w1")
    maker.stopped = True
    job.wait(HELLO_S - 1.0)
    assert root.core.unheard() == {}
    job.wait(2.0)
    assert root.core.unheard().keys() == {"w1"}
    # Control begins a term without it, in which nobody holds anything again.
    job.kill("w1")
    job.change(["w0", "w2"])
    ends_with_the_same_bits(job, 4 * PATIENCE_UNMEASURED_S)


def test_whoever_made_the_initial_parameters_hands_them_on_in_the_next_term():
    job = cluster(14)
    job.members["w0"].hangs = True
    maker = job.members["w1"].core
    assert job.wait(PATIENCE_UNMEASURED_S + 1.0, until=lambda: maker.replica.version == 0)
    job.kill("w0")
    job.change(["w2", "w1"])
    ends_with_the_same_bits(job)


def test_an_evaluation_that_nobody_begins_is_missed():
    """Not even its first frame comes: the record that orders it opens its round."""
    plan = plan_of(spec_of(STEPS), SHARDS, 8)
    spec = spec_of(STEPS)
    spec.train.evaluation.split, spec.train.evaluation.every_steps = "test", 5
    plan.spec = spec.SerializeToString()
    plan.evaluation_shards, plan.evaluation_rows = 1, 4
    plan.evaluation_sums.append("loss")
    job = Cluster(9, plan, NAMES)
    at(job, 4)
    job.members["w2"].hangs = True
    ends_with_the_same_bits(job, 2 * PATIENCE_UNMEASURED_S)


def test_a_leaf_that_is_well_again_is_not_copied_any_more():
    job = cluster(5)
    at(job, 4)
    job.members["w1"].hangs = True
    at(job, 6)
    job.members["w1"].hangs = False
    ends_with_the_same_bits(job)


@pytest.mark.parametrize("victim", NAMES)
def test_no_copy_leaves_a_member_behind_that_does_not_answer(victim):
    """It would have to be brought up by more than the one gradient that is kept."""
    job = cluster(6)
    at(job, 4)
    job.members[victim].stopped = True
    assert not job.wait(5.0, until=lambda: job.versions == {STEPS})
    held = job.members[victim].core.replica.version
    assert max(job.versions) <= held + 1
    others = [member for name, member in job.members.items() if name != victim]
    waited = [member.core.unheard() for member in others]
    assert all(each.keys() <= {victim} for each in waited)
    if victim != "w0":  # whose contributions may all have been sent: control sees that it is silent
        assert any(each.get(victim, 0) > 4.0 for each in waited)
    # Control begins a term without it.
    job.kill(victim)
    job.change([name for name in NAMES if name != victim])
    ends_with_the_same_bits(job)


def test_a_member_that_says_no_hello_is_told():
    job = cluster(7)
    job.members["w2"].stopped = True
    job.wait(HELLO_S - 1)
    assert job.members["w0"].core.unheard() == {}
    job.wait(2)
    assert job.members["w0"].core.unheard().keys() == {"w2"}
    assert job.members["w1"].core.unheard().keys() == {"w2"}


def test_a_root_that_has_not_loaded_the_job_is_told():
    """It opens streams to the others, but accepts none."""
    job = cluster(15)
    root = job.members["w0"].core
    root._set_up = root.prepared = False
    job.wait(HELLO_S - 1)
    assert job.members["w1"].core.unheard() == {}
    job.wait(2)
    assert job.members["w1"].core.unheard().keys() == {"w0"}
    assert job.members["w2"].core.unheard().keys() == {"w0"}
    # Control begins a term without it.
    job.change(["w1", "w2"])
    ends_with_the_same_bits(job)


def test_a_root_that_takes_long_to_make_the_initial_parameters_is_not_told():
    job = cluster(16)
    for member in job.members.values():
        member.hangs = True
    job.wait(2.5 * PATIENCE_UNMEASURED_S)
    assert not any(member.core.unheard() for member in job.members.values())
    for member in job.members.values():
        member.hangs = False
    ends_with_the_same_bits(job)


def test_a_member_to_which_the_state_is_on_its_way_is_waited_for():
    job = cluster(8)
    at(job, 2)
    job.change([*NAMES, "w3"])
    serving, asked = job.members["w0"].core._serving, []
    wants_state, serving.wants_state = serving.wants_state, lambda *ask: asked.append(ask)
    for _ in range(20):
        job.wait(1.0)
        job.members["w3"].core._came_s = job.now_s  # as if a part of it had come
    assert not any(
        late_s > 2.0 for each in job.members.values() for late_s in each.core.unheard().values()
    )
    job.wait(HELLO_S + 3.0)
    told = {name: member.core.unheard() for name, member in job.members.items()}
    assert told.pop("w3").keys() == {"w0"}, "it says who sends nothing"
    assert told["w0"].keys() == {"w3"}, "and is not waited for any more"
    wants_state(*asked[0])
    ends_with_the_same_bits(job)
