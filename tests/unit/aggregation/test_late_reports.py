"""A late report of somebody who was given up marks nobody else's work as done."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.errors import Aborted
from phalanx.reduction import Node
from phalanx.testing.ranges import make_plan, reference

SMALL = 1000


def test_what_a_zombie_sends_after_a_roll_back_is_refused_and_its_node_stays_open(
    jobs: Any,
) -> None:
    """After the roll-back the same step and the same nodes come again, with other owners."""
    plan = make_plan(elements=SMALL, shards=4, steps=3)
    before = jobs.started(plan)
    late = before.nodes_frames([Node(0, 2)])
    after = jobs.scripted(plan, term=2)
    after.begin()
    after.run_round()
    assert after.go.version == before.go.version
    with pytest.raises(Aborted, match="term") as refusal:
        after.send(late)
    assert refusal.value.reason == "STALE_TERM"
    # Only what the present owner of those shards sends completes the step.
    after.send(after.nodes_frames([Node(2, 2)]))
    after.pull()
    assert not after.is_whole(1)
    after.send(after.nodes_frames([Node(0, 2)]))
    after.pull()
    assert after.vector(1).tobytes() == reference(plan)[1].tobytes()


def test_what_a_zombie_sends_of_an_earlier_step_does_not_fill_the_same_node_of_this_one(
    jobs: Any,
) -> None:
    plan = make_plan(elements=SMALL, shards=4, steps=3)
    job = jobs.started(plan)
    late = job.nodes_frames([Node(0, 2)])
    job.run_round()
    job.send(late)
    job.send(job.nodes_frames([Node(2, 2)]))
    job.pull()
    assert not job.is_whole(2), "the node was filled by another step's work"
    job.send(job.nodes_frames([Node(0, 2)]))
    job.pull()
    assert job.vector(2).tobytes() == reference(plan)[2].tobytes()


def test_a_zombie_that_delivers_what_its_successor_also_delivers_counts_once(jobs: Any) -> None:
    plan = make_plan(elements=SMALL, shards=4, steps=1)
    job = jobs.started(plan)
    twice = job.nodes_frames([Node(0, 2)])
    job.send(twice)
    job.send(twice)
    job.pull()
    assert not job.is_whole(1)
    job.send(job.nodes_frames([Node(2, 2)]))
    job.pull()
    assert job.vector(1).tobytes() == reference(plan)[1].tobytes()
