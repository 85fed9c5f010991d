"""Heartbeats move shards: when, and when not."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import levels
from coordinator.control.core.balancing import (
    LOOK_AGAIN_S,
    REST_LEASES,
    SEEN_HEARTBEATS,
    WIRE_BYTES_PER_S,
)
from coordinator.control.core.events import Tick
from coordinator.control.core.tree import node_count
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec

ALL = set(range(16))
WORKERS = ("w1", "w2", "w3", "w4")


class Beats:
    """A job of 16 shards on four workers with one slot, whose heartbeats tell leaf times."""

    def __init__(self, cluster: Any, edit: Any = None) -> None:
        self.cluster = cluster
        cluster.aggregator()
        for name in WORKERS:
            cluster.worker(name, slots=1)
        cluster.submit(edit=edit)
        self.leaf_s = dict.fromkeys(WORKERS, 0.1)
        self.leaves = dict.fromkeys(WORKERS, 0)
        self.seconds = dict.fromkeys(WORKERS, 0.0)
        self.step = 0
        # As the root reports before there is a commit.
        cluster.report("job-1", 0, since_commit_s=None)

    def go(self, seconds: float) -> None:
        """Let time pass: half a second, then heartbeats, a report of the root and a tick."""
        for _ in range(round(seconds / 0.5)):
            self.cluster.time_s += 0.5
            self.cluster.heartbeats("a1")
            for name in self.leaf_s:
                if self.count(name):
                    self.leaves[name] += 5
                    self.seconds[name] += 5 * self.leaf_s[name]
                self.beat(name)
            self.step += 1
            self.cluster.report("job-1", self.step)
            self.cluster.feed(Tick())

    def beat(self, name: str) -> None:
        progress = pb.WorkerJobProgress(
            job_id="job-1",
            term=1,
            step=self.step,
            train_leaves=self.leaves[name],
            train_leaf_seconds=self.seconds[name],
        )
        heartbeat = pb.Heartbeat(jobs=[progress])
        self.cluster.say(self.cluster.sessions[name], heartbeat=heartbeat)

    def count(self, name: str) -> int:
        owners = self.cluster.core.jobs["job-1"].train.owners
        return list(owners.values()).count(name)

    def counts(self) -> list[int]:
        return [self.count(name) for name in WORKERS]

    def moves(self) -> list[Any]:
        return [event for event in self.cluster.events if event.type == "SHARDS_MOVED"]


@pytest.fixture
def beats(cluster: Any) -> Beats:
    return Beats(cluster)


def test_equal_workers_keep_what_they_have(beats: Beats) -> None:
    before = beats.counts()
    for factor in (1.0, 1.1, 0.9, 1.2) * 5:
        beats.leaf_s["w2"] = 0.1 * factor
        beats.go(1.0)
    assert beats.counts() == before == [4, 4, 4, 4]
    assert not beats.moves()
    assert len(beats.cluster.told("w2", "assign_job")) == 1


def test_a_worker_that_is_four_times_slower_gets_a_quarter(beats: Beats) -> None:
    beats.leaf_s["w3"] = 0.4
    beats.go(6.0)
    assert beats.counts() == [5, 5, 1, 5]
    (event,) = beats.moves()
    assert event.details["cause"] == "speed"
    assert "by measured speed" in event.message
    assert beats.cluster.shards("w3") <= ALL
    beats.go(30.0)
    assert len(beats.moves()) == 1, "they do not dance"


def test_a_worker_that_turns_out_clearly_slower_in_its_first_rounds_is_believed_at_once(
    beats: Beats,
) -> None:
    beats.leaf_s["w3"] = 0.4
    beats.go(1.0)
    assert beats.counts() == [5, 5, 1, 5]
    beats.go(30.0)
    assert len(beats.moves()) == 1, "they do not dance"


def test_a_worker_that_is_a_little_slower_at_first_has_to_stay_so(beats: Beats) -> None:
    beats.leaf_s["w3"] = 0.17
    beats.go(1.0)
    assert not beats.moves()
    beats.go(1.0)
    assert beats.moves()


def test_one_that_was_well_for_some_rounds_has_to_stay_slow(beats: Beats) -> None:
    beats.go(1.5)
    beats.leaf_s["w3"] = 0.8
    beats.go(0.5 * SEEN_HEARTBEATS)
    assert not beats.moves()
    beats.go(1.0)
    assert beats.moves()


def test_the_old_host_keeps_its_shards_until_the_new_one_works(beats: Beats) -> None:
    beats.leaf_s["w3"] = 0.4
    held = beats.cluster.shards("w3")
    while not beats.moves():
        beats.go(0.5)
    assert beats.cluster.shards("w3") == held
    # A step shows that it works; it is not the slow one's pace that the next ones are to have.
    beats.go(0.5)
    assert len(beats.cluster.shards("w3")) == 1


def test_a_moment_of_noise_moves_nothing(beats: Beats) -> None:
    beats.go(3.0)
    for _ in range(5):
        beats.leaf_s["w1"] = 0.5
        beats.go(0.5)
        beats.leaf_s["w1"] = 0.1
        beats.go(5.0)
    assert not beats.moves()


def test_one_that_is_well_again_gets_its_share_back(beats: Beats) -> None:
    beats.leaf_s["w3"] = 0.4
    beats.go(6.0)
    assert beats.count("w3") == 1
    beats.leaf_s["w3"] = 0.1
    beats.go(20.0)
    assert beats.counts() == [4, 4, 4, 4]
    assert len(beats.moves()) == 2


def test_one_so_slow_that_it_gets_nothing_is_tried_again(beats: Beats) -> None:
    beats.leaf_s["w3"] = 2.0
    beats.go(6.0)
    assert beats.count("w3") == 0
    beats.leaf_s["w3"] = 0.1
    beats.go(60.0)
    assert beats.counts() == [4, 4, 4, 4]


def comes_back(beats: Beats, name: str) -> None:
    """A worker that was lost, and that nobody ended, opens a session with the job in hand."""
    mine = beats.cluster.told(name, "assign_job")[-1]
    job = pb.HeldWorkerJob(job_id="job-1", term=1, placement=mine.placement, ready=True)
    beats.cluster.worker(name, slots=1, held_jobs=[job])


def test_one_that_was_stopped_is_not_taken_for_slow_when_it_comes_back(beats: Beats) -> None:
    """In the leaf in which it was stopped it is; it is told of once that is over."""
    beats.go(3.0)
    beats.leaf_s["w3"] = 4.0
    beats.go(0.5)
    beats.cluster.kill("w3")
    assert beats.count("w3") == 0
    beats.leaf_s["w3"] = 0.1
    comes_back(beats, "w3")
    assert beats.counts() == [4, 4, 4, 4]


def test_moves_are_rare_whatever_happens(beats: Beats) -> None:
    for turn in range(60):
        for place, name in enumerate(WORKERS):
            beats.leaf_s[name] = 0.8 if (turn + place) % 4 == 0 else 0.1
        beats.go(2.5)
    lease_s = beats.cluster.core.config.lease_ttl_s
    assert beats.moves()
    assert len(beats.moves()) <= 150 / (REST_LEASES * lease_s)


def test_steps_that_take_their_time_with_other_things_move_nothing(cluster: Any) -> None:
    beats = Beats(cluster)
    beats.leaf_s = dict.fromkeys(WORKERS, 0.0001)
    beats.leaf_s["w3"] = 0.0004
    beats.go(2 * LOOK_AGAIN_S)
    assert not beats.moves(), "a step takes half a second and would win a millisecond"


def test_after_a_take_over_the_measures_are_there_before_shards_move(beats: Beats) -> None:
    """The counters of a heartbeat are those of the worker's life, so the first one is enough."""
    beats.leaf_s["w3"] = 0.4
    beats.go(8.0)
    cluster = beats.cluster
    held = {name: cluster.told(name, "assign_job")[-1] for name in WORKERS}
    cluster.lead()
    ranges = [pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0], version=3)]
    cluster.aggregator(held_ranges=ranges)
    for name, mine in held.items():
        job = pb.HeldWorkerJob(
            job_id="job-1",
            term=1,
            placement=mine.placement,
            train_nodes=mine.train_nodes,
            evaluation_nodes=mine.evaluation_nodes,
            ready=True,
        )
        cluster.worker(name, slots=1, held_jobs=[job])
    beats.go(20.0)
    assert beats.counts() == [5, 5, 1, 5]
    assert not beats.moves()


def test_a_worker_that_joins_gets_its_share_of_what_the_others_have(beats: Beats) -> None:
    beats.leaf_s["w3"] = 0.4
    beats.go(6.0)
    beats.cluster.worker("w5", slots=1)
    assert beats.count("w5") == 3
    assert beats.count("w3") == 1


def test_a_dead_worker_is_not_replaced_by_a_slow_one(beats: Beats) -> None:
    beats.leaf_s["w3"] = 0.4
    beats.go(6.0)
    beats.cluster.kill("w1")
    assert beats.count("w3") <= 2
    assert sum(beats.counts()) == 16


def test_the_data_of_a_shard_is_known_to_its_former_hosts(beats: Beats) -> None:
    had = beats.cluster.core.jobs["job-1"].had
    assert set(had) == ALL
    beats.leaf_s["w3"] = 0.4
    beats.go(6.0)
    moved = [shard for shard in had if len(had[shard]) == 2]
    assert len(moved) == 3
    assert all(had[shard][1] == "w3" for shard in moved)


def test_the_gain_is_named(beats: Beats) -> None:
    assert levels.GAIN_LEAST == 0.15
    beats.leaf_s["w3"] = 0.4
    beats.go(6.0)
    assert "5.00 leaves instead of 16.00" in beats.moves()[0].message


@pytest.mark.parametrize(("vector_leaves", "cut"), [(0.0, True), (8.0, False)])
def test_vectors_are_cut_only_where_they_cost_less_than_it_brings(
    cluster: Any, vector_leaves: float, cut: bool
) -> None:
    leaf_s = 0.05
    cluster.parameters = max(640, int(vector_leaves * leaf_s * WIRE_BYTES_PER_S / 4))
    beats = Beats(cluster)
    beats.leaf_s = {name: leaf_s * (4 if name == "w3" else 1) for name in WORKERS}
    beats.go(6.0)
    assert beats.moves()
    held = [sorted(cluster.shards(name)) for name in WORKERS]
    assert any(node_count(shards, len(ALL)) > 1 for shards in held if shards) == cut


@pytest.mark.parametrize("former", ["w1", "w2", "w4"])
def test_a_shard_goes_to_a_former_host_that_has_its_data(beats: Beats, former: str) -> None:
    job = beats.cluster.core.jobs["job-1"]
    assert job.train.owners[9] == "w3"
    job.had[9] = ("w3", former)
    beats.leaf_s["w3"] = 0.4
    beats.go(6.0)
    assert beats.counts() == [5, 5, 1, 5]
    assert job.train.owners[9] == former


def test_a_gain_that_reading_the_data_again_eats_up_moves_nothing(cluster: Any) -> None:
    def wide(spec: JobSpec) -> None:
        spec.data.shards = 64

    beats = Beats(cluster, edit=wide)
    beats.leaf_s["w3"] = 0.128
    beats.go(2 * LOOK_AGAIN_S)
    assert not beats.moves()
    had = cluster.core.jobs["job-1"].had
    had.update(dict.fromkeys(had, WORKERS))  # now all of them have all of it
    beats.go(2 * LOOK_AGAIN_S)
    assert beats.moves()
