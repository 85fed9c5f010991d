"""The parameters of the best evaluation: kept by every range, in every checkpoint, over terms."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.checkpoints import Part, layout_part, parse_part, write_part
from coordinator.aggregation.core.effects import StartCheckpoint
from coordinator.aggregation.core.making import make_ranges
from phalanx.errors import DataLoss, Internal
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.testing.ranges import ScriptedJob, make_plan, reference
from phalanx.testing.starts import StartedLeaves, asynchronous_plan
from phalanx.training.best import BEST_VECTOR
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan

ELEMENTS = BLOCK_ELEMENTS + 77
"""So few that there are two ranges."""
CORRECT = (0.0, 3.0, 6.0, 4.0, 9.0, 9.0, 5.0, 1.0)
"""Of ten rows, by version: versions 1, 2 and 4 are better than what was before."""
STEPS, BEST = 7, 4
OWNERS = [[[0, 1]], [[0], [1]]]


def plan_of(**options: Any) -> JobPlan:
    known = {"elements": ELEMENTS, "ranges": 2, "steps": STEPS, "evaluation_shards": 2}
    return make_plan(**{**known, "evaluate_every": 1, "best": "test/accuracy", **options})


def scripted(plan: JobPlan, owners: Any = ((0,), (1,)), term: int = 1) -> ScriptedJob:
    job = ScriptedJob(make_ranges, plan, owners, term)
    job.leaves.correct = lambda version: CORRECT[version]
    return job


def finished(plan: JobPlan, owners: Any, *, done: bool = True) -> ScriptedJob:
    """A job that has ended; its checkpoints are written at once, or (not `done`) never."""
    job = scripted(plan, owners)
    job.begin()
    terminal = (GoRecord.ACTION_STOP, GoRecord.ACTION_PAUSE)
    while job.go.action not in terminal:
        job.run_round()
        if done:
            job.root.checkpoint_done()
    job.carry()
    return job


def saved_of(job: ScriptedJob, version: int) -> list[StartCheckpoint]:
    """What the ranges save of a version, in their order."""
    found = [each for each in job.effects if isinstance(each, StartCheckpoint)]
    found = [each for each in found if each.version == version]
    return sorted(found, key=lambda each: each.snapshot.range.index)


def vectors_of(saved: StartCheckpoint) -> tuple[Any, dict[str, Any]]:
    """A part as it is read back."""
    header, buffers = layout_part(saved.snapshot)
    parameters, vectors = parse_part(header + b"".join(buffers))
    return parameters, dict(vectors)


def best_bytes(parts: Sequence[StartCheckpoint]) -> bytes:
    """The best version that a checkpoint holds beside its own."""
    return b"".join(vectors_of(each)[1][BEST_VECTOR].tobytes() for each in parts)


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_last_checkpoint_holds_the_best_version(
    owners: list[list[int]], optimizer: str
) -> None:
    plan = plan_of(optimizer=optimizer)
    job = finished(plan, owners)
    last = saved_of(job, STEPS)
    assert len(last) == 2
    assert best_bytes(last) == reference(plan)[BEST].tobytes()
    own = b"".join(vectors_of(each)[0].tobytes() for each in last)
    assert own == reference(plan)[STEPS].tobytes()
    assert json.loads(last[0].root_state)["best"]["step"] == BEST


@pytest.mark.parametrize("owners", OWNERS)
def test_each_better_version_has_a_checkpoint_of_its_own(owners: list[list[int]]) -> None:
    job = finished(plan_of(), owners)
    for version in range(STEPS + 1):
        parts = saved_of(job, version)
        assert bool(parts) is (version in (1, 2, 4, STEPS)), version
        for each in parts:
            itself = version != STEPS
            assert (BEST_VECTOR not in each.snapshot.extra) is itself, "it is the best one itself"


def test_a_better_version_is_not_lost_while_an_earlier_checkpoint_is_written() -> None:
    plan = plan_of()
    job = finished(plan, [[0], [1]], done=False)
    assert [saved_of(job, version) for version in (2, 4)] == [[], []], "one at a time"
    assert best_bytes(saved_of(job, STEPS)) == reference(plan)[BEST].tobytes()


def test_where_nothing_is_within_the_bound_the_last_version_is_all_that_is_saved() -> None:
    plan = plan_of()
    spec = JobSpec.FromString(plan.spec)
    spec.output.best.at_least = 0.95
    plan.spec = spec.SerializeToString()
    job = finished(plan, [[0], [1]])
    assert not any(each.snapshot.extra for each in saved_of(job, STEPS))
    assert "best" not in json.loads(saved_of(job, STEPS)[0].root_state)


def restored(
    plan: JobPlan, owners: list[list[int]], parts: Sequence[StartCheckpoint], version: int
) -> ScriptedJob:
    job = scripted(plan, owners, term=2)
    for owner in job.owners:
        vectors = {index: vectors_of(parts[index]) for index in owner.range_indexes}
        job.effects += owner.begin_restored(version, vectors, parts[0].root_state)
    job.pull()
    return job


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_a_job_that_is_rolled_back_ends_with_the_same(
    owners: list[list[int]], version: int
) -> None:
    plan = plan_of(optimizer="adam", checkpoint_every=1)
    first = finished(plan, owners)
    again = restored(plan, owners, saved_of(first, version), version)
    again.run()
    expected, found = saved_of(first, STEPS), saved_of(again, STEPS)
    assert [vectors_of(each)[0].tobytes() for each in found] == [
        vectors_of(each)[0].tobytes() for each in expected
    ]
    assert best_bytes(found) == best_bytes(expected) == reference(plan)[BEST].tobytes()
    states = [json.loads(each[0].root_state)["best"] for each in (expected, found)]
    assert states[0] == states[1]


def test_a_checkpoint_that_lacks_it_is_refused() -> None:
    plan = plan_of(checkpoint_every=1)
    parts = saved_of(finished(plan, [[0], [1]]), 3)
    for index in (0, 1):
        parameters, vectors = vectors_of(parts[index])
        for wrong in ({}, {BEST_VECTOR: vectors[BEST_VECTOR][:-1]}):
            job = scripted(plan)
            with pytest.raises(DataLoss, match="no vector 'best'"):
                job.owner_of(index).begin_restored(
                    3, {index: (parameters, wrong)}, parts[0].root_state
                )
    broken = json.loads(parts[0].root_state)
    del broken["best"]["step"]
    with pytest.raises(DataLoss, match="no state of range 0 that can be read"):
        scripted(plan).root.begin_restored(3, {0: vectors_of(parts[0])}, json.dumps(broken))


@pytest.mark.parametrize("other", ["test/loss", ""])
def test_a_job_that_goes_on_with_another_rule_keeps_nothing_of_it(other: str) -> None:
    parts = saved_of(finished(plan_of(checkpoint_every=1), [[0], [1]]), 5)
    assert best_bytes(parts)
    plan = plan_of(best=other)
    job = restored(plan, [[0], [1]], parts, 5)
    assert not job.go.HasField("best_version")
    job.run_round()  # step 6
    job.run_round()  # its evaluation
    job.carry()
    assert job.go.HasField("best_version") is bool(other)
    assert not other or job.go.best_version == 6, "its first evaluation is its best"
    job.run()
    last = saved_of(job, STEPS)
    # Every loss is the same, and of equal ones the first is kept.
    found = [BEST_VECTOR in each.snapshot.extra for each in last]
    assert found == [bool(other)] * 2
    assert not other or best_bytes(last) == reference(plan)[6].tobytes()


def test_a_record_that_names_a_version_that_is_gone_opens_nothing() -> None:
    """No root issues one: whoever carries it has made it up."""
    job = scripted(plan_of())
    job.begin()
    while job.go.version < 3:
        job.run_round()
    other = job.owner_of(1)
    made_up = GoRecord(term=1, version=3, round=7, action=GoRecord.ACTION_TRAIN, best_version=1)
    with pytest.raises(Internal, match="does not have the best version, 1"):
        other.go_record(made_up)
    job.run()
    assert best_bytes(saved_of(job, STEPS)) == reference(job.plan)[BEST].tobytes()


def test_a_pause_at_the_best_version_and_a_resume() -> None:
    plan = plan_of()
    job = scripted(plan, [[0, 1]])
    job.begin()
    while (job.go.version, job.go.action) != (BEST, GoRecord.ACTION_TRAIN):
        job.run_round()
        job.root.checkpoint_done()
    job.effects += job.root.pause()
    job.pull()
    assert (job.go.action, job.go.best_version) == (GoRecord.ACTION_PAUSE, BEST)
    parts = [each for each in saved_of(job, BEST) if each.terminal]
    assert not any(each.snapshot.extra for each in parts), "it is saved as the version itself"
    again = restored(plan, [[0], [1]], parts, BEST)
    assert not again.go.checkpoint
    again.run()
    assert best_bytes(saved_of(again, STEPS)) == reference(plan)[BEST].tobytes()


def test_what_workers_see_with_a_loss_is_kept_without_one() -> None:
    plan = plan_of(ranges=1, elements=1000)
    spec = JobSpec.FromString(plan.spec)
    spec.train.compression.down_cast_to = "bfloat16"
    plan.spec = spec.SerializeToString()
    job = scripted(plan, [[0]])
    job.begin()
    while job.go.version < BEST or job.go.action != GoRecord.ACTION_TRAIN:
        job.run_round()
    exact = job.root.versions_of(0).get(BEST).values[0].tobytes()
    assert exact != job.vector(BEST).tobytes(), "nothing is lost, so nothing is shown"
    job.run()
    assert best_bytes(saved_of(job, STEPS)) == exact


# Other kinds of ranges


LOGGED: list[dict[str, Any]] = [
    {"asynchronous": {"replay_log": True}},
    {"stale": {"bound": 2, "replay_log": True}},
]


@pytest.mark.parametrize("options", [{}, *LOGGED])
def test_contributions_that_commit_one_by_one(options: dict[str, Any]) -> None:
    made = make_plan(
        elements=1000, shards=3, steps=6, evaluation_shards=2, evaluate_every=2,
        checkpoint_every=1, best="test/accuracy", bitwise=False,
    )  # fmt: skip
    rate = {"sgd": {"learning_rate": 1e-6}}
    plan = asynchronous_plan(made, optimizer=rate, **options)
    job = StartedLeaves(plan, make_ranges)
    job.begin()
    job.worker("one", [0, 2]), job.worker("two", [1])
    draw, versions = random.Random(2), {}
    correct = {2: 3.0, 4: 8.0, 6: 5.0}
    under_way: list[Any] = []
    while job.ranges.clocks.total < 18 or job.ranges.version not in versions:
        for worker in job.workers:
            worker.want()
            under_way += worker.receive()
        if under_way:
            job.deliver(under_way.pop(draw.randrange(len(under_way))))
            job.ranges.checkpoint_done()
            continue
        step = job.ranges.version
        versions[step] = job.vector().copy()
        job.evaluate(correct[step])
        job.ranges.checkpoint_done()
    parts = {each.version: each for each in job.of(StartCheckpoint)}
    assert best_bytes([parts[6]]) == versions[4].tobytes() != versions[6].tobytes()
    assert best_bytes([parts[3]]) == versions[2].tobytes()
    assert BEST_VECTOR not in parts[4].snapshot.extra
    assert ("replay_shards" in parts[6].snapshot.extra) is (options in LOGGED)
    again = StartedLeaves(plan, make_ranges)
    kept = parts[5]
    again.perform(again.ranges.begin_restored(5, {0: vectors_of(kept)}, kept.root_state))
    again.worker("one", range(3))
    while again.ranges.clocks.total < 18:
        leaf = again.workers[0].begin()
        assert leaf is not None
        again.deliver(leaf)
    again.workers[0].receive()
    again.evaluate(correct[6])
    (last,) = [each for each in again.of(StartCheckpoint) if each.final]
    assert best_bytes([last]) == versions[4].tobytes()


def test_nodes_with_a_state() -> None:
    """Their states are in checkpoints, too, but for the last one."""
    plan = plan_of()
    plan.state_every, plan.unit_span = 2, 1
    spec = JobSpec.FromString(plan.spec)
    spec.train.compression.sign.SetInParent()
    plan.spec = spec.SerializeToString()
    best = {"step": 2, "metric": "test/accuracy", "direction": 1, "value": 0.6, "metrics": {}}
    numbers = ("elapsed_s", "examples", "last_count", "last_loss", "interval_count")
    state = {**dict.fromkeys(numbers, 0), "interval_loss": 0.0, "metrics": {}, "stop": {}}
    state |= {"evaluated_version": 3, "best": best}
    for index in (0, 1):
        piece = scripted(plan).pieces[index]
        owner = make_ranges(plan, 1, [piece])
        zeros = np.zeros(piece.element_count, np.float32)
        kept = {f"state/2/{shard}/0": zeros for shard in range(plan.shards)}
        kept |= {"version/2": zeros, BEST_VECTOR: zeros + 1}
        owner.begin_restored(3, {index: (zeros, kept)}, json.dumps(state))
        (ranges,) = owner._ranges.values()
        for action, names in (
            (GoRecord.ACTION_PAUSE, {BEST_VECTOR, *kept}),
            (GoRecord.ACTION_STOP, {BEST_VECTOR}),
        ):
            (saved,) = owner._checkpoint(ranges, GoRecord(version=3, action=action))
            assert saved.snapshot.extra.keys() == names
            assert vectors_of(saved)[1][BEST_VECTOR].tobytes() == (zeros + 1).tobytes()


# The file


class Blobs:
    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    async def put_blob(self, source: Any, **_: Any) -> str:
        data = b"".join(source)
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_manifest_says_where_it_lies(optimizer: str) -> None:
    plan = plan_of(optimizer=optimizer, checkpoint_every=1)
    job, store = finished(plan, [[0], [1]]), Blobs()
    part = Part("job-1", 1, False, 2, "", "5" * 64, 3)
    for version in (2, 3):
        found = b""
        for each in saved_of(job, version):
            request = asyncio.run(write_part(store, each.snapshot, part))  # type: ignore[arg-type]
            told = request.part
            assert bool(told.best_offset) is (version == 3)
            offset = told.best_offset or told.parameters_offset
            found += store.blobs[told.digest][offset:][: told.parameters_length]
        assert found == reference(plan)[2].tobytes()
