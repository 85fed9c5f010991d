"""One job's ranges at run time, without server, storage and control."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator.aggregation import copying, hosting
from coordinator.aggregation.core.effects import Points
from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.hosting import HostedJob
from phalanx.copies import PATIENCE_UNMEASURED_S
from phalanx.errors import Aborted, FailedPrecondition
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.optimizers import build_optimizer
from phalanx.testing.ranges import make_plan, parameter_ranges
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.aggregation_service_pb2 import ExchangeHello
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord


class Gauges:
    """Shows nothing."""

    def ended(self) -> None:
        pass

    def checkpointed(self, _: float) -> None:
        pass

    def metrics(self, _: Any) -> None:
        pass


class Storage:
    """Takes every blob; what becomes of a checkpoint is up to the test."""

    def __init__(self, refusal: Exception | None) -> None:
        self.refusal = refusal

    async def put_blob(self, _: Any, **__: Any) -> str:
        return "ab" * 32

    async def commit_checkpoint(self, _: Any) -> storage_pb.CommitCheckpointResponse:
        if self.refusal is not None:
            raise self.refusal
        return storage_pb.CommitCheckpointResponse(complete=True)


async def outcomes_of_a_pause(
    started: Any, storage: Storage
) -> list[coordination.JobReport.Outcome.ValueType]:
    """What control is told of a job that is paused."""
    told: list[coordination.SessionRequest] = []
    job = HostedJob(
        started.root,
        storage=storage,  # type: ignore[arg-type]
        gauges=Gauges(),  # type: ignore[arg-type]
        send=told.append,
    )
    try:
        job.pause()
        assert job._ending is not None
        async with asyncio.timeout(30.0):
            await asyncio.wait([job._ending])
    finally:
        await job.close()
    return [each.job_report.outcome for each in told if each.HasField("job_report")]


@pytest.mark.parametrize("fenced", [False, True])
async def test_rule_09_paused_means_that_the_checkpoint_is_complete(
    jobs: Any, fenced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)
    refusal = Aborted("another term is in force", reason="STALE_TERM") if fenced else None
    outcomes = await outcomes_of_a_pause(jobs.started(make_plan(elements=100)), Storage(refusal))
    assert outcomes == ([] if fenced else [coordination.JobReport.OUTCOME_PAUSED])


async def test_a_last_part_that_was_taken_for_garbage_is_uploaded_again(
    jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage was full or away for longer than it spares what nothing names."""
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)
    storage = Storage(FailedPrecondition("put it and register again", reason="BLOB_MISSING"))
    uploads: list[int] = []

    async def put_blob(pieces: Any, **_: Any) -> str:
        uploads.append(sum(len(piece) for piece in pieces))
        if len(uploads) == 2:
            storage.refusal = None
        return "ab" * 32

    storage.put_blob = put_blob  # type: ignore[method-assign]
    plan = make_plan(elements=100, optimizer="adam")
    outcomes = await outcomes_of_a_pause(jobs.started(plan), storage)
    assert uploads[0] == uploads[1]
    assert outcomes == [coordination.JobReport.OUTCOME_PAUSED]


async def test_shards_of_a_round_that_a_worker_carried_here_can_be_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only range 0 opens rounds of its own accord; the others see their late shards as well."""
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)
    now_s = [100.0]
    monkeypatch.setattr(copying.time, "monotonic", lambda: now_s[0])
    plan = make_plan(elements=3 * BLOCK_ELEMENTS, ranges=2)
    owned = [each for each in parameter_ranges(plan, lambda _: "a") if each.index == 1]
    optimizer = build_optimizer(JobSpec.FromString(plan.spec).train, plan.total_steps)
    job = HostedJob(
        JobRanges(plan, 1, owned, optimizer, None),
        storage=None,  # type: ignore[arg-type]
        gauges=Gauges(),  # type: ignore[arg-type]
        send=lambda _: None,
    )
    try:
        for worker_id in ("a", "b"):
            job.open_stream(worker_id, ExchangeHello(worker_id=worker_id, takes_copies=True))
        job.go_record(GoRecord(term=1, action=GoRecord.ACTION_INITIALISE))
        now_s[0] += PATIENCE_UNMEASURED_S + 0.1
        job.copying.look()
        assert job.copying.next_order("a") or job.copying.next_order("b")
    finally:
        await job.close()


async def test_points_that_were_never_told_are_not_lost_for_those_that_were(
    jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long absence of control: as many wait as may wait, and some may have got lost."""
    monkeypatch.setattr(hosting, "POINTS_MAX", 10)
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)
    told: list[coordination.SessionRequest] = []
    connected = [True]
    job = HostedJob(
        jobs.started(make_plan(elements=100)).root,
        storage=None,  # type: ignore[arg-type]
        gauges=Gauges(),  # type: ignore[arg-type]
        send=told.append,
        connected=lambda: connected[0],
    )
    try:
        job.perform([Points(((1, "train/loss", 0.5), (2, "train/loss", 0.4)))])
        job._flush_points()
        connected[0] = False
        job.perform([Points(tuple((step, "train/loss", 0.1) for step in range(3, 12)))])
        connected[0] = True
        told.clear()
        job.session_opened()
    finally:
        await job.close()
    steps = [point.step for message in told for point in message.metric_points.points]
    assert steps == list(range(2, 12))
