"""What cannot be loaded or stored is told to control by whoever owns the range: nobody waits."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.aggregation import hosting, process
from coordinator.aggregation.core.roots import OptimizerRoot
from phalanx.errors import DataLoss, PhalanxError
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.testing.aggregator_peers import share, streams
from phalanx.testing.ranges import Leaves, make_plan
from phalanx.v1 import coordination_service_pb2 as pb


async def last_report(session: Any) -> pb.JobReport:
    while True:
        report: pb.JobReport = await session.receive("job_report")
        if report.outcome != pb.JobReport.OUTCOME_RUNNING:
            return report


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError("3 TiB"), "AGGREGATOR_MEMORY"), (ValueError("odd"), "INTERNAL")],
)
async def test_whatever_keeps_ranges_from_being_taken_is_told(
    bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    member = await bench.aggregator()
    with monkeypatch.context() as patched:
        patched.setattr(process, "make_ranges", fails)
        await member.session.send(assign_ranges=bench.assignment(make_plan(elements=10)))
        failure = (await member.session.receive("ranges_ready")).failure
    assert failure.code == code
    assert str(error) in failure.message
    assert member.aggregator.find("job-test") is None
    await bench.assign(make_plan(elements=10))


@pytest.mark.parametrize("error", [DataLoss("the blob came out wrong"), ValueError("odd")])
async def test_a_last_part_that_cannot_be_stored_fails_the_job_from_any_range(
    bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stored = hosting.write_part

    async def write_part(client: Any, snapshot: Any, part: Any) -> Any:
        if part.final and snapshot.range.index == 1:
            raise error
        return await stored(client, snapshot, part)

    monkeypatch.setattr(hosting, "write_part", write_part)
    plan = make_plan(elements=3 * BLOCK_ELEMENTS, ranges=2, steps=2)
    leaves = Leaves(plan)
    members = [await bench.aggregator(name) for name in ("a", "b")]
    await bench.assign(plan, ("a", "b"))
    async with streams(leaves, [member.address for member in members], 1) as worker:
        await worker.work(share(leaves, 0, 1))
        # Its stream breaks at the end, and could take along the go record that it carried last.
        report = await last_report(members[1].session)
    assert (report.outcome, report.reason) == (pb.JobReport.OUTCOME_FAILED, "CHECKPOINT_FAILED")


@pytest.mark.parametrize("error", [MemoryError("3 TiB"), ValueError("odd")])
async def test_a_round_that_was_taken_by_half_fails_the_job(
    bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def frame_complete(*_: object) -> bool:
        raise error

    plan = make_plan(elements=1000, steps=2)
    leaves = Leaves(plan)
    member = await bench.aggregator()
    await bench.assign(plan)
    monkeypatch.setattr(OptimizerRoot, "frame_complete", frame_complete)
    with pytest.raises(PhalanxError):
        async with streams(leaves, [member.address], 1) as worker:
            await worker.work(share(leaves, 0, 1))
            raise await worker.root.ended()
    report = await last_report(member.session)
    assert (report.outcome, report.reason) == (pb.JobReport.OUTCOME_FAILED, "AGGREGATION_FAILED")
    assert str(error) in report.message
