"""What keeps a job from running on a worker is told to control, for every shard, until it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phalanx.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from phalanx.rpc.storage_place import StoragePlace
from phalanx.testing.worker_peers import ScriptedAggregator, ScriptedControl
from phalanx.v1 import coordination_service_pb2 as pb
from worker import main
from worker.session import app
from worker.session.hosting import HostedJob


async def reports(session: Any, count: int) -> set[tuple[bool, int]]:
    told = [await session.receive("leaf_failed") for _ in range(count)]
    assert {each.kind for each in told} == {pb.LeafFailed.KIND_DATA}
    return {(each.evaluation, each.shard) for each in told}


@pytest.mark.parametrize("defect", ["missing", "damaged"])
async def test_every_shard_is_given_back_and_told_again(
    bench: Any, monkeypatch: pytest.MonkeyPatch, defect: str
) -> None:
    monkeypatch.setattr(app, "_PREPARE_RETRY_S", 0.05)
    bench.job(shards=4)
    kept = dict(bench.blobs)
    if defect == "missing":
        bench.blobs.clear()
    else:
        bench.plan.manifest_digest = bench.put(b"{}")
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2), (3, 1)]))
        assert await reports(session, 3) == {(False, 0), (False, 1), (False, 3)}
        # Nobody else could take shard 3: it comes back and fails again.
        await session.send(assign_job=bench.assign([(3, 1)], placement=2))
        while await reports(session, 1) != {(False, 3)}:
            pass
        if defect == "missing":
            bench.blobs.update(kept)
            await session.receive("worker_job_ready")


async def test_a_description_that_fails_in_any_way_is_answered(bench: Any) -> None:
    bench.job(shards=2)
    bench.plan.manifest_digest = bench.put(b"{}")
    async with ScriptedControl() as control:
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(describe_job=pb.DescribeJob(plan=bench.plan))
        described = await session.receive("job_described")
        assert described.failure.code == "JOB_DATA"
        assert described.failure.message


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("gone"),
        DeadlineExceeded("stopped"),
        ResourceExhausted("too many calls", retry_after_s=1.0),
    ],
)
async def test_a_storage_that_is_stopped_or_busy_is_waited_for_like_one_that_is_gone(
    tmp_path: Path, error: Exception
) -> None:
    place = StoragePlace("127.0.0.1:1")
    downloads = main.Transfers(place)
    failures = [error]

    async def get_blob_to(digest: str, path: Path) -> int:
        if failures:
            raise failures.pop()
        return path.write_bytes(digest.encode())

    client = await place.client()
    client.get_blob_to = get_blob_to  # type: ignore[method-assign]
    try:
        await downloads.to_file("ab", tmp_path / "blob")
    finally:
        await place.close()
    assert (tmp_path / "blob").read_text() == "ab"


async def test_a_defect_costs_one_stream_and_not_the_job(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = HostedJob.version_frame
    failures = [ValueError("odd")]

    def version_frame(job: HostedJob, *frame: Any) -> None:
        if failures:
            raise failures.pop()
        taken(job, *frame)

    monkeypatch.setattr(HostedJob, "version_frame", version_frame)
    bench.job(shards=2)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        again = await aggregator.next_stream()
        await again.send_version(0, 0, bench.version(0))
        await again.send_go(bench.go(0))
        frame, _ = await again.receive_frame()
        assert frame.step == 0
