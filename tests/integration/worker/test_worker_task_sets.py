"""Sets of independent tasks that cannot be prepared on a worker: said, and tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phalanx.testing.worker_peers import ScriptedControl
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_spec_pb2, training_pb2

LeafFailed = coordination.LeafFailed

CODE = """
from pathlib import Path

if not Path({licence!r}).exists():
    raise RuntimeError("no licence on this machine")


def add(a):
    return a
"""


def assignment(bench: Any, digest: str) -> coordination.AssignJob:
    spec = job_spec_pb2.JobSpec(name="calls")
    spec.tasks.entrypoint = "calls:add"
    spec.tasks.arguments.add()
    bench.plan = training_pb2.JobPlan(job_id="job-22222222", spec=spec.SerializeToString())
    bench.plan.code_digests["calls.py"] = digest
    # Nobody is there: tasks are asked for only once they can run here.
    owner = training_pb2.ParameterRange(aggregator_id="aggregator-0", address="127.0.0.1:9")
    bench.ranges = [owner]
    assign: coordination.AssignJob = bench.assign([])
    return assign


async def test_code_that_cannot_be_loaded_is_told_as_that_of_the_job_and_loaded_again(
    bench: Any, tmp_path: Path
) -> None:
    licence = tmp_path / "licence"
    digest = bench.put(CODE.format(licence=str(licence)).encode())
    async with ScriptedControl() as control:
        await bench.worker(control.address, slots=2)
        session = await control.next_session()
        await session.send(assign_job=assignment(bench, digest))
        failed = await session.receive("leaf_failed")
        assert (failed.job_id, failed.term, failed.shard) == ("job-22222222", 1, -1)
        assert failed.kind == LeafFailed.KIND_RAISED
        assert failed.message == "RuntimeError: no licence on this machine"
        assert "calls.py" in failed.traceback
        assert not session.has_received("worker_job_ready")
        licence.touch()
        assert (await session.receive("worker_job_ready")).job_id == "job-22222222"
        assert not session.has_received("leaf_failed")


async def test_files_that_cannot_be_had_are_told_as_those_of_the_job(bench: Any) -> None:
    async with ScriptedControl() as control:
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=assignment(bench, "ab" * 32))
        failed = await session.receive("leaf_failed")
        assert (failed.shard, failed.kind) == (-1, LeafFailed.KIND_DATA)
        assert "no blob" in failed.message
