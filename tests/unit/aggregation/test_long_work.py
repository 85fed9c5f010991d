"""What takes long is done in slices: everybody else of the process has his turn in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation import hosting, process
from coordinator.aggregation.config import AggregatorConfig
from coordinator.aggregation.core.effects import Committed, Failed, StartCheckpoint, Work
from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.hosting import HostedJob
from coordinator.aggregation.process import Aggregator
from phalanx.config import build
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.reducers import rules, slices
from phalanx.reducers.rules import Median
from phalanx.reduction import Node
from phalanx.telemetry.metrics import AggregatorMetrics, new_registry
from phalanx.testing.ranges import make_plan, parameter_ranges
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1.job_spec_pb2 import JobSpec, Krum, Reduction, TrimmedMean
from phalanx.v1.job_spec_pb2 import Median as MedianSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan

SHARDS = 5
FRAMES = 5 * BLOCK_ELEMENTS + 11
"""Elements of a vector of two frames."""

BLOCKS = 6

RULES = {
    "median": JobSpec(),
    "trimmed": JobSpec(),
    "krum": JobSpec(),
    "shortened": JobSpec(),
    "tree": JobSpec(),
}
RULES["median"].train.reduction.median.CopyFrom(MedianSpec())
RULES["trimmed"].train.reduction.trimmed_mean.CopyFrom(TrimmedMean(trim=1))
RULES["krum"].train.reduction.krum.CopyFrom(Krum(faulty=1))
RULES["shortened"].train.reduction.CopyFrom(Reduction(clip_norm=50.0))
RULES["tree"].train.optimizer.clip_norm = 2.5


def plan_of(rule: str, backup_shards: int = 0, **options: Any) -> JobPlan:
    plan = make_plan(elements=FRAMES, shards=SHARDS, bitwise=not backup_shards, **options)
    spec = JobSpec.FromString(plan.spec)
    spec.MergeFrom(RULES[rule])
    spec.train.synchronous.backup_shards = backup_shards
    plan.spec = spec.SerializeToString()
    plan.unit_span = 1
    return plan


def frames_of(job: Any, shards: Sequence[int] = range(SHARDS)) -> list[Any]:
    return job.nodes_frames([Node(shard, 1) for shard in shards])


def contribute(job: Any, frames: Sequence[Any]) -> list[Any]:
    """Hand frames over, and leave what takes long undone."""
    return [each for frame in frames for each in job.root.contribute(*frame, 0.0)]


def commits(effects: Sequence[Any]) -> list[int]:
    return [each.version for each in effects if isinstance(each, Committed)]


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (slices, rules):
        monkeypatch.setattr(module, "SLICE_ELEMENTS", BLOCK_ELEMENTS)


@pytest.mark.parametrize("rule", RULES)
def test_no_slice_is_the_whole_of_it(jobs: Any, rule: str) -> None:
    job = jobs.started(plan_of(rule))
    assert contribute(job, frames_of(job)) == [Work()]
    count = 0
    while job.root.works:
        assert job.root.version == 0
        job.root.work(0.0)
        count += 1
    assert job.root.version == 1
    assert count >= (BLOCKS if rule == "tree" else BLOCKS * SHARDS)


def test_frames_become_available_one_by_one(jobs: Any) -> None:
    job = jobs.started(plan_of("median"))
    contribute(job, frames_of(job))
    growing = job.root.versions_of(0)
    while growing.get(1) is None:
        job.root.work(0.0)
    assert not growing.get(1).whole


def test_what_comes_meanwhile_changes_nothing(jobs: Any) -> None:
    job = jobs.started(plan_of("median", backup_shards=1))
    contribute(job, frames_of(job, range(4)))
    assert job.root.works
    assert job.root.open_round.missing() == 0, "nobody needs a copy of what is left out"
    assert contribute(job, frames_of(job)) == []
    assert job.root.pause() == []
    effects = []
    while job.root.works:
        effects += job.root.work(0.0)
    assert commits(effects) == [1]
    job.pull()
    assert job.go.action == GoRecord.ACTION_PAUSE
    assert [each.version for each in effects if isinstance(each, StartCheckpoint)] == [1]


def test_copies_of_held_frames_do_not_close_the_round_twice(jobs: Any) -> None:
    job = jobs.started(plan_of("tree"))
    frames = frames_of(job)
    contribute(job, frames)
    job.root.work(0.0)
    assert contribute(job, frames) == []
    job.work(job.root)
    assert job.root.version == 1


def test_a_failure_ends_it(jobs: Any) -> None:
    job = jobs.started(plan_of("median"))
    contribute(job, frames_of(job))
    job.root.work(0.0)
    assert Failed("CANCELLED", "by a person") in job.root.fail("CANCELLED", "by a person")
    assert not job.root.works
    assert job.root.work(0.0) == []
    assert job.root.version == 0


class Gauges:
    """Shows nothing."""

    def ended(self) -> None:
        pass

    def committed(self, *_: Any) -> None:
        pass

    def metrics(self, _: Any) -> None:
        pass


@pytest.fixture
async def hosted(
    jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Any, HostedJob, list[coordination.SessionRequest]]]:
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)
    job, told = jobs.started(plan_of("median")), []
    made = HostedJob(
        job.root,
        storage=None,  # type: ignore[arg-type]
        gauges=Gauges(),  # type: ignore[arg-type]
        send=told.append,
    )
    yield job, made, told
    await made.close()


async def until(job: Any, condition: Any) -> int:
    """Turns of the loop until something holds."""
    turns = 0
    async with asyncio.timeout(30.0):
        while not condition():
            await asyncio.sleep(0)
            turns += 1
    return turns


async def test_the_loop_turns_while_a_rule_computes(hosted: Any) -> None:
    job, made, _ = hosted
    for frame in frames_of(job):
        made.contribute("stream", *frame)
    assert await until(job, lambda: job.root.version == 1) >= BLOCKS * SHARDS


async def test_a_job_that_is_let_go_computes_no_more(hosted: Any) -> None:
    job, made, _ = hosted
    for frame in frames_of(job):
        made.contribute("stream", *frame)
    await asyncio.sleep(0)
    await made.close()
    assert job.root.works
    assert job.root.version == 0


async def test_what_breaks_in_it_fails_the_job(
    hosted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(*_: Any) -> Iterator[None]:
        yield
        raise MemoryError("no room for a block")

    monkeypatch.setattr(Median, "steps", steps)
    job, made, told = hosted
    for frame in frames_of(job):
        made.contribute("stream", *frame)
    await until(job, lambda: told)
    (report,) = [each.job_report for each in told if each.HasField("job_report")]
    assert report.outcome == coordination.JobReport.OUTCOME_FAILED
    assert report.failure.code == "AGGREGATION_FAILED"
    assert "no room for a block" in report.failure.message


async def test_vectors_are_copied_outside_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and optimizer state of gigabytes, when a range is restored."""
    threads: list[threading.Thread] = []
    made, begun = JobRanges.__init__, JobRanges.begin_restored

    def make(self: JobRanges, *arguments: Any) -> None:
        threads.append(threading.current_thread())
        made(self, *arguments)

    def begin(self: JobRanges, *arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return begun(self, *arguments)

    async def read_part(*_: Any) -> tuple[Any, Any]:
        return np.ones(10, np.float32), {}

    monkeypatch.setattr(JobRanges, "__init__", make)
    monkeypatch.setattr(JobRanges, "begin_restored", begin)
    monkeypatch.setattr(process, "read_part", read_part)
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)
    plan = make_plan(elements=10)
    flags = {"id": "a", "control": "127.0.0.1:1", "storage": "127.0.0.1:1"}
    aggregator = Aggregator(
        build(AggregatorConfig, flags, {}), AggregatorMetrics(new_registry()), "fingerprint"
    )
    message = coordination.AssignRanges(
        plan=plan, term=1, ranges=parameter_ranges(plan, lambda _: "a")
    )
    message.restore.step = 2
    try:
        await aggregator._load(message)
    finally:
        await aggregator.close()
    assert len(threads) == 2
    assert threading.main_thread() not in threads
