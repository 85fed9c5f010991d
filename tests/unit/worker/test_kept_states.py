"""What a call keeps for others is told with its result, or not at all: it holds no result up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phalanx.errors import ResourceExhausted
from phalanx.v1 import task_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan
from tests.unit.worker.test_calls import Driver
from worker import ipc
from worker.core.dispatch import Task
from worker.core.effects import Effect
from worker.session import tasks
from worker.session.tasks import HostedTasks

GUARD_S = 30.0
VALUE, KEPT = b"a result", b"the first steps of a training"


async def refuses(_: memoryview) -> str:
    raise ResourceExhausted("there is no room")


async def hangs(_: memoryview) -> str:
    await asyncio.Event().wait()
    raise AssertionError


async def takes(content: memoryview) -> str:
    return bytes(content).hex().ljust(64, "0")[:64]


@pytest.mark.parametrize("storage", [takes, refuses, hangs])
async def test_a_result_is_told_whatever_becomes_of_what_is_kept(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "KEEPING_S", 0.0 if storage is hangs else GUARD_S)
    driver, told = Driver(slots=1), asyncio.Event()
    spec = JobSpec()
    spec.sweep.folds = 2
    driver.core.plan = JobPlan(job_id="job-1", spec=spec.SerializeToString())

    async def store(content: memoryview) -> str:
        return await (takes if bytes(content) == VALUE else storage)(content)

    def perform(effects: list[Effect]) -> None:
        driver.take(effects)
        told.set()

    hosted = HostedTasks(driver.core, "w1", "once", perform, store)
    attempt = driver.give(4)
    (task,) = driver.running
    assert isinstance(task, Task)
    body = ipc.pack_call(task.id, 0, 0.5, VALUE, KEPT, (3, 1))
    *_, returned = ipc.unpack_call(body)
    hosted.call_done(task, 0, 0.5, returned)
    async with asyncio.timeout(GUARD_S):
        await told.wait()
    message = driver.core.next_reports()
    assert message is not None
    (report,) = message.reports
    assert (report.task, report.attempt, list(report.earlier)) == (4, attempt, [3, 1])
    assert report.stored.size_bytes == len(VALUE)
    expected = pb.KeptState(sha256=bytes.fromhex(await takes(memoryview(KEPT))), size_bytes=29)
    assert report.kept == (expected if storage is takes else pb.KeptState())
    await hosted.close()
