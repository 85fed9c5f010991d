"""Many short jobs leave journal, disk and restart as they were after a few."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from coordinator.control.core import machine
from phalanx.testing.members import ScriptedAggregator, ScriptedWorker
from phalanx.v1 import job_service_pb2, job_spec_pb2
from phalanx.v1 import storage_service_pb2 as pb

GUARD_S = 60.0
ENDED_MAX = 10
SNAPSHOT_EVERY = 100
FILES_MAX = 60
"""Half of what would be there if every job left one file."""


async def run_short_jobs(
    cluster: Any, aggregator: ScriptedAggregator, first: int, count: int
) -> None:
    """Jobs with code, logs, metrics and a checkpoint of their own, cancelled half way."""
    for number in range(first, first + count):
        code = job_spec_pb2.Code(files={"net.py": f"NUMBER = {number}\n"})
        job = await cluster.submit(code=code)
        await cluster.wait_for_state(job.id, "RUNNING")
        await aggregator.wait_for("assign_ranges", lambda each, job=job: each.plan.job_id == job.id)
        await cluster.commit(job.id, number)
        aggregator.report(job.id, number, metrics={"train/loss": 0.5})
        request = job_service_pb2.CancelJobRequest(job_id=job.id)
        await cluster.jobs().CancelJob(request, timeout=GUARD_S)


async def settled_sizes(cluster: Any) -> dict[str, int]:
    """What is kept once everything that may go has gone."""
    control = cluster.control
    async with asyncio.timeout(GUARD_S):
        while len(control.leading().durable.jobs) > ENDED_MAX:
            await asyncio.sleep(0.02)
        while rows(cluster.folder, "jobs") > ENDED_MAX:  # removed in the background
            await asyncio.sleep(0.02)
        needed = rows(cluster.folder, "blob_references", "count(DISTINCT digest)")
        collect = pb.CollectGarbageRequest(grace_s=0)
        # Blobs of the last moment are spared.
        while (await cluster.store().CollectGarbage(collect, timeout=GUARD_S)).blobs_kept > needed:
            await asyncio.sleep(0.1)
    files = [path for path in (cluster.folder / "state").rglob("*") if path.is_file()]
    return {
        "journal": len([each async for each in control.store.read("control", 0)]),
        "streams": rows(cluster.folder, "streams"),
        "pins": rows(cluster.folder, "pins"),
        "checkpoints": rows(cluster.folder, "checkpoints"),
        "files": len(files),
    }


def rows(folder: Path, table: str, what: str = "count(*)") -> int:
    database = folder / "state" / "metadata.sqlite3"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return int(connection.execute(f"SELECT {what} FROM {table}").fetchone()[0])


@pytest.mark.parametrize(
    ("rounds", "jobs"),
    [
        (3, 40),
        pytest.param(5, 2_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)], id="10,000"),
    ],
)
async def test_many_short_jobs_leave_everything_flat(
    storage_only: Any, monkeypatch: pytest.MonkeyPatch, rounds: int, jobs: int
) -> None:
    monkeypatch.setattr(machine, "EXPIRE_EVERY_S", 0.0)
    settings = {"ended_jobs_max": ENDED_MAX, "snapshot_every_records": SNAPSHOT_EVERY}
    await storage_only.start_control(**settings)
    sizes = []
    async with (
        ScriptedAggregator(storage_only.control_address, "a1") as aggregator,
        ScriptedWorker(storage_only.control_address, "w1"),
    ):
        for number in range(rounds):
            await run_short_jobs(storage_only, aggregator, number * jobs, jobs)
            sizes.append(await settled_sizes(storage_only))
    assert sizes[0]["checkpoints"] == ENDED_MAX
    for later in sizes[1:]:
        # The journal goes up and down with the snapshots, each of which stands for all before it.
        assert later.pop("journal") <= SNAPSHOT_EVERY + 8 * ENDED_MAX
        # Records that are still there hold on to the code that they name.
        assert later.pop("files") <= FILES_MAX
        assert later == {name: sizes[0][name] for name in later}
    # What a restart reads.
    live = storage_only.control.leading().core.facts.digest()
    await storage_only.stop_control()
    await storage_only.start_control(**settings)
    assert len(storage_only.control.leading().durable.jobs) <= ENDED_MAX
    assert storage_only.control.leading().core.facts.digest() == live
