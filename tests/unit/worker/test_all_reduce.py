"""All-reduce in random orders, with deaths at every message: exactly once, same bits."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from coordinator.control.core.placement import place_members
from phalanx.frames import BLOCK_ELEMENTS
from tests.simulation.planting import Change, Mutant, planted
from tests.unit.worker.all_reduce_cluster import Cluster, plan_of, reference, spec_of

STEPS = 2
PLAN = plan_of(spec_of(STEPS), shards=5, elements=BLOCK_ELEMENTS + 8)
NAMES = ["w0", "w1", "w2"]
EVENTS_MAX = 400
"""More than any run here takes."""


def ends_with_the_same_bits(job, why=None):
    """Every member holds the last version, and every example is in it once."""
    assert job.run(events=EVENTS_MAX), why
    assert job.versions == {STEPS}, why
    expected = reference(PLAN, STEPS)[-1]
    for member in job.members.values():
        assert member.failures == []
        np.testing.assert_array_equal(member.core.replica.parameters, expected, str(why))
    versions = [version for _, version in job.committed]
    assert versions == sorted(set(versions)), "nothing is committed twice"
    (root,) = (each.core.root for each in job.members.values() if each.core.root is not None)
    counted = (root.decider.examples, root.examples_lost, root.examples_doubled)
    assert counted == (STEPS * PLAN.train_rows, 0, 0)


def dies_before(event, victim, seed):
    """Kill a member before one event and go on with the others; whether the death was in time."""
    job = Cluster(seed, PLAN, NAMES)
    if job.run(events=event) or job.events < event:
        return False
    job.kill(victim)
    survivors = [name for name in NAMES if name != victim]
    before = job.delivered.copy()
    job.change(survivors)
    held = job.versions  # each has finished what it had begun
    ends_with_the_same_bits(job, (event, victim, seed))
    again = [version for term, version in job.committed if term == 2]
    assert again == list(range(max(*held, 0) + 1, STEPS + 1)), "no step but the open one is redone"
    if min(held) >= 0:
        # Whoever is behind needs the gradient that the others have kept, and nothing else.
        sent = job.delivered - before
        assert not any(kind.startswith("state ") and "gradient" not in kind for kind in sent)
        assert bool(sent["state gradient"]) == (len(held) > 1)
    return True


def test_any_number_of_members_in_any_order_gives_the_bits_of_one():
    for seed, workers in enumerate((1, 2, 3, 5, 4)):
        ends_with_the_same_bits(Cluster(seed, PLAN, [f"w{n}" for n in range(workers)]))


@pytest.mark.parametrize("victim", NAMES)
def test_a_death_before_any_event_costs_the_open_step_and_nothing_else(victim):
    event = 0
    while dies_before(event, victim, seed=event):
        event += 1
    assert event > 40


PLANTED = (
    Change(  # a step is done when a part of its gradient is there
        "worker.core.all_reduce.replica:Gradient.take", "self._left -= count", "self._left = 0"
    ),
    Change(  # the gradient is not kept
        "worker.core.all_reduce.replica:Replica.work",
        "self._kept, self._open, self._done = gradient, None, 0",
        "self._kept, self._open, self._done = None, None, 0",
    ),
    Change(  # a term starts at the lowest version
        "worker.core.all_reduce.job:AllReduceJob._settle", "best = max(", "best = min("
    ),
)


@pytest.mark.parametrize("change", PLANTED, ids=["not-whole", "not-kept", "lowest"])
def test_without_rule_13_it_is_red(change):
    """Apply when the whole gradient is in, keep it one step, start at the highest version held."""
    with planted(Mutant("rule 13", 13, (change,), None)), pytest.raises(AssertionError):
        for seed in range(60):
            dies_before(20 + seed % 25, NAMES[1 + seed % 2], seed)


def test_members_that_join_are_sent_what_the_others_hold():
    for seed in range(8):
        job = Cluster(seed, PLAN, NAMES)
        job.run(events=4 + 7 * seed)
        job.change([*NAMES, "w3"])
        ends_with_the_same_bits(job, seed)


def test_the_first_step_of_a_term_may_come_before_all_members_are_heard_of():
    """The line to one member is broken in one direction while a term begins."""
    job = Cluster(1, plan_of(spec_of(5), shards=5, elements=8), NAMES)
    assert job.run(until=lambda: job.versions == {1})
    job.change(NAMES)
    assert job.versions == {1}
    deaf = job.members["w2"]
    unheard = [stream for stream in job.streams if stream.server is deaf]
    job.streams = [stream for stream in job.streams if stream.server is not deaf]
    assert job.run(until=lambda: deaf.core.replica.version == 2, events=EVENTS_MAX)
    assert job.ended is False
    job.streams += unheard
    before = job.delivered.copy()
    assert job.run(events=EVENTS_MAX)
    assert job.versions == {5}
    assert job.delivered["state_wanted"] == before["state_wanted"], "nothing is missing"
    expected = reference(job.plan, 5)[-1]
    for member in job.members.values():
        assert member.failures == []
        np.testing.assert_array_equal(member.core.replica.parameters, expected)


def test_a_second_death_while_a_term_begins():
    for seed in range(16):
        chosen = random.Random(seed)
        job = Cluster(seed, PLAN, [*NAMES, "w3"])
        job.run(events=chosen.randrange(60))
        for _ in range(2):
            job.kill(chosen.choice(list(job.members)))
            job.change(list(job.members))
            job.run(events=chosen.randrange(12))
        ends_with_the_same_bits(job, seed)


def test_replicas_that_differ_fail_the_job_and_name_the_members():
    job = Cluster(3, plan_of(spec_of(STEPS, every=1), 5, BLOCK_ELEMENTS + 8), NAMES)
    job.run(until=lambda: job.versions == {1})
    job.members["w1"].core.replica.parameters[7] += 1
    job.run(events=EVENTS_MAX)
    assert job.members["w0"].failures == ["REPLICAS_DISAGREE"]
    assert not job.members["w0"].stored


def test_checkpoints_are_written_by_one_once_all_agree():
    job = Cluster(4, plan_of(spec_of(STEPS, every=1), 5, BLOCK_ELEMENTS + 8), NAMES)
    assert job.run(events=EVENTS_MAX)
    assert job.members["w0"].stored == [1, 2]
    assert not job.members["w1"].stored
    assert not job.members["w2"].stored


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_member_sends_less_than_two_vectors_in_a_step(workers):
    plan = plan_of(spec_of(3), shards=4, elements=4 * BLOCK_ELEMENTS)
    job = Cluster(workers, plan, [f"w{n}" for n in range(workers)])
    assert job.run(events=EVENTS_MAX)
    for member in job.members.values():
        assert member.sent_bytes[2] <= 2 * 4 * plan.layout.element_count


def test_members_with_sub_trees_of_different_sizes_send_no_more_and_get_the_same_bits():
    names = [f"w{n}" for n in range(5)]
    owners = place_members(8, dict.fromkeys(names, 1))
    stops = [max(shard for shard in owners if owners[shard] == name) + 1 for name in names]
    assert sorted(after - before for before, after in pairwise([0, *stops])) == [1, 1, 2, 2, 2]
    plan = plan_of(spec_of(STEPS), shards=8, elements=5 * BLOCK_ELEMENTS)
    job = Cluster(1, plan, names, stops)
    assert job.run(events=EVENTS_MAX)
    expected = reference(plan, STEPS)[-1]
    for member in job.members.values():
        np.testing.assert_array_equal(member.core.replica.parameters, expected)
        assert member.sent_bytes[STEPS - 1] <= 2 * 4 * plan.layout.element_count
