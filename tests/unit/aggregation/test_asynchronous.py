"""Contributions that commit one by one, on the aggregator's core."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.core.asynchronous import AsynchronousRanges
from coordinator.aggregation.core.effects import (
    Committed,
    Ended,
    Failed,
    Points,
    StartCheckpoint,
    Work,
)
from coordinator.aggregation.core.making import make_ranges
from phalanx.errors import Aborted, DataLoss, InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS, decode_response
from phalanx.models.base import decay_mask
from phalanx.optimizers import Late, build_contribution_optimizer
from phalanx.testing.ranges import ROWS_PER_LEAF, make_plan
from phalanx.testing.starts import StartedLeaf, StartedLeaves, asynchronous_plan
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan

SMALL = 1000
FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""

RATE = {"sgd": {"learning_rate": 1e-6}}


def plan_of(elements: int = SMALL, **options: Any) -> JobPlan:
    train = {
        key: options.pop(key) for key in ("stale", "asynchronous", "optimizer") if key in options
    }
    train.setdefault("optimizer", RATE)
    return asynchronous_plan(make_plan(elements=elements, bitwise=False, **options), **train)


def job_of(plan: JobPlan) -> StartedLeaves:
    job = StartedLeaves(plan, make_ranges)
    job.begin()
    return job


def run(job: StartedLeaves, draw: random.Random, until: int) -> list[StartedLeaf]:
    """Deliver leaves in a random order until so many commits; all that were started."""
    under_way: list[StartedLeaf] = []
    started: list[StartedLeaf] = []
    while job.ranges.clocks.total < until:
        for worker in job.workers:
            worker.want()
            under_way += worker.receive()
        started += [leaf for leaf in under_way if leaf not in started]
        assert under_way, "nothing is under way and nothing may start"
        job.deliver(under_way.pop(draw.randrange(len(under_way))))
    return started


def test_each_contribution_makes_a_version_and_as_many_as_shards_a_step() -> None:
    job = job_of(plan_of(steps=3))
    worker = job.worker("one", range(4))
    vector = job.vector()
    optimizer = build_contribution_optimizer(JobSpec.FromString(job.plan.spec).train, 3)
    for commit in range(12):
        leaf = worker.begin()
        assert leaf is not None
        assert (leaf.shard, leaf.step, leaf.version) == (commit % 4, commit // 4, commit)
        assert leaf.parameters.tobytes() == vector.tobytes()
        out = np.empty_like(vector)
        gradient = job._scripted_leaf(vector, leaf.shard, leaf.step)[0]
        late = Late(commit // 4, commit, 0)
        decay = decay_mask(job.plan.layout)
        optimizer.apply_late(vector, gradient, ROWS_PER_LEAF, decay, {}, late, vector, out)
        job.deliver(leaf)
        vector = out
        assert job.vector().tobytes() == vector.tobytes()
        assert job.ranges.version == (commit + 1) // 4
    commits = job.of(Committed)
    assert [each.version for each in commits] == [1, 2, 3]
    assert {each.example_count for each in commits} == {4 * ROWS_PER_LEAF}
    (ended,) = job.of(Ended)
    assert (ended.go.action, ended.go.version) == (GoRecord.ACTION_STOP, 3)
    (last,) = job.of(StartCheckpoint)
    assert (last.version, last.final, last.snapshot.version) == (3, True, 3)
    assert json.loads(last.root_state)["completed_steps"] == [3, 3, 3, 3]
    assert json.loads(last.root_state)["stop_reason"] == "STOP_STEPS"


@pytest.mark.parametrize("elements", [SMALL, FRAMES])
@pytest.mark.parametrize("seed", range(4))
def test_in_any_order_each_step_of_each_shard_counts_once(elements: int, seed: int) -> None:
    draw = random.Random(seed)
    job = job_of(plan_of(elements, shards=5, steps=4))
    job.worker("one", [0, 3], slots=2)
    job.worker("two", [1, 2, 4], slots=2)
    started = run(job, draw, until=20)
    assert sorted((leaf.shard, leaf.step) for leaf in started) == [
        (shard, step) for shard in range(5) for step in range(4)
    ]
    assert sum(each.example_count for each in job.of(Committed)) == 20 * ROWS_PER_LEAF
    assert (job.ranges.examples_lost, job.ranges.examples_doubled) == (0, 0)


@pytest.mark.parametrize("bound", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_shard_starts_further_ahead_than_the_bound(bound: int, seed: int) -> None:
    draw = random.Random(seed)
    job = job_of(plan_of(shards=4, steps=12, stale=bound))
    for shard in range(4):
        job.worker(f"worker-{shard}", [shard])
    under_way: list[StartedLeaf] = []
    spreads, ahead = set(), set()
    while not job.of(Ended):
        for worker in job.workers:
            worker.want()
            for leaf in worker.receive():
                least = min(job.ranges.clocks.completed)
                assert leaf.step - least <= bound
                ahead.add(leaf.step - least)
                under_way.append(leaf)
        # Shard 0 comes last of those that can, so that the others run as far ahead as they may.
        under_way.sort(key=lambda leaf: (leaf.shard == 0, draw.random()))
        job.deliver(under_way.pop(0))
        completed = job.ranges.clocks.completed
        spreads.add(max(completed) - min(completed))
    assert max(ahead) == bound, "the bound was never reached"
    assert max(spreads) == bound + 1


def test_a_second_copy_is_ignored_and_counted() -> None:
    job = job_of(plan_of(steps=5))
    one, two = job.worker("one", [0]), job.worker("two", [0, 1, 2, 3])
    first, second = one.begin(), two.begin()
    assert first is not None
    assert second is not None
    assert (first.shard, first.step) == (second.shard, second.step) == (0, 0)
    job.deliver(second)
    vector = job.vector()
    job.deliver(first)
    assert job.vector().tobytes() == vector.tobytes()
    assert (job.ranges.clocks.completed, job.ranges.duplicates) == ((1, 0, 0, 0), 1)


def test_a_part_of_a_contribution_changes_nothing() -> None:
    job = job_of(plan_of(FRAMES, steps=5))
    one, two = job.worker("one", [0]), job.worker("two", [0])
    first, second = one.begin(), two.begin()
    assert first is not None
    assert second is not None
    vector = job.vector()
    before = job.contribution(first)
    job.contribute(*before[0], one)
    assert job.vector().tobytes() == vector.tobytes()
    # Frames of two workers never make up one contribution.
    job.contribute(*job.contribution(second)[1], two)
    assert job.vector().tobytes() == vector.tobytes()
    job.contribute(*before[1], one)
    assert job.ranges.clocks.total == 1


def test_what_becomes_whole_while_another_is_applied_waits_for_its_turn() -> None:
    job = job_of(plan_of(FRAMES, steps=5))
    workers = [
        job.worker(f"worker-{number}", shards) for number, shards in enumerate(([0], [0, 1]))
    ]
    leaves = [worker.begin() for worker in workers]
    workers[1].slots = 2
    leaves.append(workers[1].begin())
    assert [(leaf.shard, leaf.step) for leaf in leaves if leaf] == [(0, 0), (0, 0), (1, 0)]
    before = job.vector()
    for leaf in leaves:
        assert leaf is not None
        frames = job.contribution(leaf)
        for frame, payload in (*frames, frames[-1]):
            effects = job.ranges.contribute(frame, payload, 0.0, leaf.worker.key)
            assert set(map(type, effects)) <= {Work}
    assert job.ranges.work(0.0) == []
    assert job.vector().tobytes() == before.tobytes(), "a half version is seen by nobody"
    assert job.ranges.pause() == [], "a step has begun"
    while job.ranges.works:
        job.perform(job.ranges.work(0.0))
    assert (job.ranges.clocks.completed, job.ranges.duplicates) == ((1, 1, 0, 0), 1)


def test_a_leaf_whose_contribution_waits_to_be_applied_is_not_started_again() -> None:
    job = job_of(plan_of(FRAMES, steps=5))
    worker = job.worker("one", [0])
    leaf = worker.begin()
    assert leaf is not None
    for frame, payload in job.contribution(leaf):
        job.ranges.contribute(frame, payload, 0.0, worker.key)
    worker.working.clear()
    assert worker.begin() is None, "it was delivered as a whole"
    while job.ranges.works:
        job.perform(job.ranges.work(0.0))
    again = worker.begin()
    assert again is not None
    assert (again.shard, again.step) == (0, 1)


def test_what_a_broken_stream_was_given_is_started_again() -> None:
    job = job_of(plan_of(steps=5))
    one = job.worker("one", [0, 1])
    lost = one.begin()
    assert lost is not None
    one.disconnect()
    with pytest.raises(InvalidArgument, match="was not started on this stream"):
        job.deliver(lost)
    one.connect()
    again = one.begin()
    assert again is not None
    assert (again.shard, again.step) == (lost.shard, lost.step)
    job.deliver(again)
    assert job.ranges.clocks.completed == (1, 0, 0, 0)


def test_a_leaf_that_was_given_up_is_started_again_on_the_same_stream() -> None:
    job = job_of(plan_of(steps=5))
    worker = job.worker("one", [0])
    first = worker.begin()
    assert first is not None
    assert worker.begin() is None, "the shard is under way"
    worker.working.clear()
    again = worker.begin()
    assert again is not None
    assert (again.shard, again.step) == (0, 0)


def test_a_wish_that_crossed_a_start_takes_nothing_back() -> None:
    job = job_of(plan_of(steps=5))
    worker = job.worker("one", [0, 1])
    worker.want(1)
    wish = pb.StartsWanted(term=1, shards=[0, 1], working=[], received=0, wanted=1)
    (leaf,) = worker.receive()
    job.ranges.starts_wanted(worker.key, wish)
    assert worker.receive() == []
    job.deliver(leaf)
    assert job.ranges.clocks.total == 1


def test_an_evaluation_waits_for_all_shards_and_lets_none_start() -> None:
    plan = plan_of(shards=3, steps=4, evaluation_shards=2, evaluate_every=2)
    job = job_of(plan)
    workers = [job.worker(f"worker-{shard}", [shard]) for shard in range(3)]
    for worker in workers[:2]:
        for _ in range(2):
            leaf = worker.begin()
            assert leaf is not None
            job.deliver(leaf)
        assert worker.begin() is None, "it is at the evaluation"
    for _ in range(2):
        leaf = workers[2].begin()
        assert leaf is not None
        job.deliver(leaf)
    assert all(worker.begin() is None for worker in workers)
    assert {worker.go.action for worker in workers} == {GoRecord.ACTION_EVALUATE}
    assert all(worker.held[6].tobytes() == job.vector().tobytes() for worker in workers)
    job.evaluate()
    points = [point for each in job.of(Points) for point in each.points]
    assert {point[0] for point in points if point[1].startswith("test/")} == {2}
    leaf = workers[0].begin()
    assert leaf is not None
    assert (leaf.step, leaf.version) == (2, 6)


def test_what_an_evaluation_cuts_off_is_started_again() -> None:
    """A job that goes on from another one may have a shard beyond its next evaluation."""
    plan = plan_of(elements=FRAMES, shards=4, steps=4, evaluation_shards=2, evaluate_every=2)
    job = StartedLeaves(plan, make_ranges)
    numbers = ("evaluated_version", "elapsed_s", "examples", "last_count", "last_loss")
    state: dict[str, Any] = dict.fromkeys((*numbers, "interval_count", "interval_loss"), 0)
    state |= {"metrics": {}, "stop": {}, "completed_steps": [4, 0, 0, 0]}
    vectors = {0: (np.zeros(FRAMES, np.float32), {})}
    job.perform(job.ranges.begin_restored(1, vectors, json.dumps(state)))
    workers = [job.worker(f"worker-{shard}", [shard]) for shard in (1, 2, 3)]
    for worker in workers:
        leaf = worker.begin()
        assert leaf is not None
        job.deliver(leaf)
    for worker in workers[:2]:
        leaf = worker.begin()
        assert leaf is not None
        worker.working.discard(leaf.shard)
        for frame, payload in job.contribution(leaf):
            job.perform(job.ranges.contribute(frame, payload, 0.0, worker.key))
    while job.ranges.works:
        job.perform(job.ranges.work(0.0))
    assert job.ranges.clocks.completed == (4, 2, 1, 1), "the second came whole, and too late"
    assert workers[0].begin() is None
    job.evaluate()
    leaf = workers[1].begin()
    assert leaf is not None, "it was started, so nobody starts it again"
    assert (leaf.shard, leaf.step) == (2, 1)


def test_all_shards_meet_at_a_barrier() -> None:
    options = {"plain": {}, "barrierEveryClocks": 2}
    job = job_of(plan_of(shards=2, steps=5, asynchronous=options))
    one, two = job.worker("one", [0]), job.worker("two", [1])
    for _ in range(2):
        leaf = one.begin()
        assert leaf is not None
        job.deliver(leaf)
    assert one.begin() is None
    for _ in range(2):
        leaf = two.begin()
        assert leaf is not None
        job.deliver(leaf)
    leaf = one.begin()
    assert leaf is not None
    assert leaf.step == 2


def test_a_job_goes_on_from_a_checkpoint_where_each_shard_was() -> None:
    plan = plan_of(
        shards=4,
        steps=6,
        checkpoint_every=2,
        optimizer={"adam": {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}},
        asynchronous={"delayCompensated": {"strength": 1.0}, "replayLog": True},
    )
    job = job_of(plan)
    job.worker("one", [0]), job.worker("two", [1, 2, 3])
    under_way: dict[str, StartedLeaf] = {}
    while not job.of(StartCheckpoint):
        for worker in job.workers:
            if worker.name not in under_way:
                leaf = worker.begin()
                assert leaf is not None
                under_way[worker.name] = leaf
        # The first is twice as fast.
        job.deliver(under_way.pop("one"))
        if len(under_way) == 1 and job.ranges.clocks.total % 2:
            job.deliver(under_way.pop("two"))
    saved = job.of(StartCheckpoint)[0]
    completed = json.loads(saved.root_state)["completed_steps"]
    assert sum(completed) == 8
    assert len(set(completed)) > 1, "all shards were as far, so nothing is shown"
    again = StartedLeaves(plan, make_ranges)
    vector, state = vectors_of(saved)
    again.perform(again.ranges.begin_restored(2, {0: (vector, state)}, saved.root_state))
    assert (again.ranges.version, list(again.ranges.clocks.completed)) == (2, completed)
    assert again.vector().tobytes() == vector.tobytes()
    again.worker("one", range(4))
    started = run(again, random.Random(1), until=24)
    assert sorted((leaf.shard, leaf.step) for leaf in started) == [
        (shard, step) for shard in range(4) for step in range(completed[shard], 6)
    ]
    (last,) = [each for each in again.of(StartCheckpoint) if each.final]
    assert json.loads(last.root_state)["completed_steps"] == [6] * 4
    counts = np.bincount(last.snapshot.extra["replay_shards"][0].astype(int))
    assert counts.tolist() == [6] * 4


def vectors_of(saved: StartCheckpoint) -> tuple[Any, dict[str, Any]]:
    snapshot = saved.snapshot
    state = {
        name: np.concatenate([each[name] for each in snapshot.state if each is not None])
        for name in snapshot.state_names
    }
    log = {name: np.concatenate(pieces) for name, pieces in snapshot.extra.items()}
    return np.concatenate(snapshot.frames), state | log


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "how far shards are"),
        ({"completed_steps": [1, 1]}, "is not one of 4 shards"),
        ({"completed_steps": [2, 2, 2, 2]}, "is not one of 4 shards"),
        ({"completed_steps": [5, -1, 0, 0]}, "is not one of 4 shards"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(state: dict[str, Any], message: str) -> None:
    job = StartedLeaves(plan_of(), make_ranges)
    vector = np.zeros(SMALL, np.float32)
    with pytest.raises(DataLoss, match=message):
        job.ranges.begin_restored(1, {0: (vector, {})}, json.dumps(state))


def test_a_pause_comes_after_the_step_and_at_once_where_it_has_not_begun() -> None:
    job = job_of(plan_of(shards=2, steps=5))
    worker = job.worker("one", [0, 1], slots=2)
    for _ in range(3):
        leaf = worker.begin()
        assert leaf is not None
        job.deliver(leaf)
    job.perform(job.ranges.pause())
    assert job.of(Ended) == []
    leaf = worker.begin()
    assert leaf is not None
    job.deliver(leaf)
    (ended,) = job.of(Ended)
    assert (ended.go.action, ended.go.version) == (GoRecord.ACTION_PAUSE, 2)
    waiting = job_of(plan_of(shards=2, steps=5))
    late = waiting.worker("one", [0, 1]).begin()
    assert late is not None
    waiting.perform(waiting.ranges.pause())
    assert waiting.of(Ended)[0].go.action == GoRecord.ACTION_PAUSE
    waiting.deliver(late)
    assert waiting.ranges.clocks.total == 0, "what comes after the end counts no more"


def test_staleness_is_told() -> None:
    job = job_of(plan_of(shards=3, steps=2, asynchronous={"scaled": {}}))
    leaves = [job.worker(f"worker-{shard}", [shard]).begin() for shard in range(3)]
    for leaf in leaves:
        assert leaf is not None
        job.deliver(leaf)
    (committed,) = job.of(Committed)
    assert committed.staleness == (0, 1, 2)
    points = {point[1]: point[2] for each in job.of(Points) for point in each.points}
    assert points["train/staleness"] == 1.0


def test_the_version_that_was_read_is_kept_until_the_contribution_is_in() -> None:
    train = {"asynchronous": {"delayCompensated": {"strength": 0.5}}}
    job = job_of(plan_of(shards=2, steps=9, **train))
    slow, fast = job.worker("slow", [0]), job.worker("fast", [1])
    late = slow.begin()
    assert late is not None
    read = job.vector()
    for _ in range(5):
        leaf = fast.begin()
        assert leaf is not None
        job.deliver(leaf)
    optimizer = build_contribution_optimizer(JobSpec.FromString(job.plan.spec).train, 9)
    now = job.vector()
    state = {name: owned.copy() for name, owned in job.ranges._range.parameters._state[0].items()}
    gradient = job._scripted_leaf(read, 0, 0)[0]
    out = np.empty_like(now)
    decay = decay_mask(job.plan.layout)
    optimizer.apply_late(now, gradient, ROWS_PER_LEAF, decay, state, Late(2, 5, 5), read, out)
    job.deliver(late)
    assert job.vector().tobytes() == out.tobytes()
    assert len(job.ranges._range.parameters.versions.held) == 1


def test_a_version_that_was_begun_is_sent_whole() -> None:
    job = job_of(plan_of(FRAMES, shards=2, steps=9))
    slow, fast = job.worker("slow", [0]), job.worker("fast", [1])
    slow.want(1)
    cursor = slow._cursor
    for _ in range(2):
        assert decode_response(cursor.take())[0].HasField("go_record")
    first = cursor.take()
    before = job.vector()
    leaf = fast.begin()
    assert leaf is not None
    job.deliver(leaf)
    messages = [decode_response(each) for each in (first, cursor.take(), cursor.take())]
    assert cursor.take() is None
    assert [header.frame.version for header, _ in messages[:2]] == [0, 0]
    assert messages[2][0].start_leaf.version == 0
    assert b"".join(bytes(payload) for _, payload in messages) == before.tobytes()


def test_an_absent_shard_completes_its_step_and_changes_nothing() -> None:
    plan = plan_of(steps=5)
    job = StartedLeaves(plan, make_ranges, lambda *_: (np.zeros(SMALL, np.float32), 0, 0.0))
    job.begin()
    leaf = job.worker("one", [2]).begin()
    assert leaf is not None
    before = job.vector()
    job.deliver(leaf)
    assert job.vector().tobytes() == before.tobytes()
    assert job.ranges.clocks.completed == (0, 0, 1, 0)
    assert job.ranges.examples_lost == ROWS_PER_LEAF


def test_parameters_that_overflow_fail_the_job() -> None:
    huge = {"optimizer": {"sgd": {"learning_rate": 3e38}}}
    job = job_of(plan_of(steps=5, **huge))
    leaf = job.worker("one", [3]).begin()
    assert leaf is not None
    job.deliver(leaf)
    assert job.of(Failed)[0].reason == "PARAMETERS_NON_FINITE"
    assert job.of(Ended)[0].go.action == GoRecord.ACTION_FAIL


def test_frames_that_fit_no_start_are_refused() -> None:
    job = job_of(plan_of(steps=5))
    worker = job.worker("one", [0, 1])
    leaf = worker.begin()
    assert leaf is not None

    def refused(match: str, kind: type[Exception] = InvalidArgument, **fields: Any) -> None:
        frame, payload = job.contribution(leaf)[0]
        for name, value in fields.items():
            setattr(frame, name, value)
        with pytest.raises(kind, match=match):
            job.ranges.contribute(frame, payload, 0.0, worker.key)

    refused("was started at step 0 on version 0", step=1)
    refused("step 1 on version 0 came", shard_step=1)
    refused("loss nan", loss_sum=float("nan"))
    refused("is in term 1, not 2", Aborted, term=2)
    frame, payload = job.contribution(leaf)[0]
    frame.node.first = 9
    with pytest.raises(InvalidArgument, match="there is no shard 9"):
        job.ranges.contribute(frame, payload, 0.0, worker.key)
    with pytest.raises(InvalidArgument, match="there is no shard 7"):
        job.ranges.starts_wanted(worker.key, pb.StartsWanted(term=1, shards=[7]))
    job.deliver(leaf)
    assert job.ranges.clocks.total == 1


def test_who_owes_a_contribution_for_long_is_late() -> None:
    job = job_of(plan_of(shards=2, steps=50))
    slow, fast = job.worker("slow", [0]), job.worker("fast", [1])
    assert slow.begin(0.0) is not None
    assert job.ranges.late_workers(9.0) == {}
    assert job.ranges.late_workers(12.0) == {"slow": 2.0}
    for number in range(5):
        leaf = fast.begin(float(number))
        assert leaf is not None
        job.deliver(leaf, number + 0.5)
    assert job.ranges.late_workers(4.5) == {"slow": pytest.approx(4.5 - 1.1)}


def test_shards_of_a_worker_that_is_not_heard_of_are_late() -> None:
    job = job_of(plan_of(shards=3, steps=50, stale=1))
    mute, well = job.worker("mute", [0, 1]), job.worker("well", [2])
    for _ in range(2):
        leaf = mute.begin()
        assert leaf is not None
        job.deliver(leaf)
    leaf = well.begin()
    assert leaf is not None
    assert job.ranges.late_shards(1.0) == {}, "it was heard of since the last time"
    # It delivered what it had, and what it asks for since then is lost.
    assert job.ranges.late_shards(10.9) == {}
    assert job.ranges.late_shards(12.0) == {0: 1.0, 1: 1.0}
    assert job.ranges.late_workers(12.0) == {"well": 2.0}
    mute.want(1)
    assert job.ranges.late_shards(12.5) == {}, "it is there again"
    mute.disconnect()
    assert job.ranges.late_shards(22.0) == {}
    assert job.ranges.late_shards(23.5) == {0: 1.0, 1: 1.0}, "nobody hosts them"


def test_shards_that_may_not_start_are_not_late() -> None:
    job = job_of(plan_of(shards=2, steps=50, stale=1))
    job.worker("mute", [0])
    well = job.worker("well", [1])
    for _ in range(2):
        leaf = well.begin()
        assert leaf is not None
        job.deliver(leaf)
    assert job.ranges.late_shards(0.0) == {}
    assert well.begin() is None, "it is as far ahead as it may be"
    assert set(job.ranges.late_shards(20.0)) == {0}
    at_evaluation = job_of(plan_of(shards=2, steps=4, evaluation_shards=2, evaluate_every=1))
    worker = at_evaluation.worker("one", [0, 1])
    for _ in range(2):
        leaf = worker.begin()
        assert leaf is not None
        at_evaluation.deliver(leaf)
    assert at_evaluation.ranges.late_shards(20.0) == {}
    assert worker.begin() is None
    at_evaluation.evaluate()
    assert at_evaluation.ranges.late_shards(21.0) == {}, "it lasted; that is nobody's fault"
    assert at_evaluation.ranges.step_of(6) == 3


def test_several_ranges_are_refused() -> None:
    plan = plan_of(FRAMES)
    plan.range_count = 2
    with pytest.raises(InvalidArgument, match="in one range, not in 2 ranges"):
        StartedLeaves(plan, make_ranges)


def test_other_jobs_start_no_leaves_one_by_one(jobs: Any) -> None:
    job = jobs.started(make_plan(elements=SMALL))
    with pytest.raises(InvalidArgument, match="started by go records"):
        job.root.starts_wanted(None, pb.StartsWanted(term=1))


def test_the_kind_of_ranges_follows_the_plan() -> None:
    assert isinstance(StartedLeaves(plan_of(), make_ranges).ranges, AsynchronousRanges)
