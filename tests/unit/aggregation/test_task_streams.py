"""What waits for one worker on its stream of tasks has bounds, whatever the worker does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from coordinator.aggregation import tasks as tasks_module
from coordinator.aggregation.core.dispatch.dispatcher import Dispatcher
from coordinator.aggregation.core.dispatch.events import (
    Appended,
    Reported,
    Send,
    Tick,
    WorkerOpened,
)
from coordinator.aggregation.core.dispatch.pace import DEPTH_MAX
from coordinator.aggregation.task_servicer import TaskServicer
from coordinator.aggregation.tasks import HostedTasks, Outbox
from phalanx.errors import ResourceExhausted
from phalanx.telemetry.metrics import AggregatorMetrics
from phalanx.v1 import task_service_pb2 as pb
from phalanx.v1.training_pb2 import JobPlan

GUARD_S = 30.0
ROOM = 5


def hosted(total: int = 10) -> HostedTasks:
    """The tasks of a job, with a journal that takes everything; nobody is told."""
    dispatcher = Dispatcher(total, 1, 3, 0)
    dispatcher.begin()
    away: Any = None
    made = HostedTasks(
        JobPlan(job_id="job-1"),
        1,
        dispatcher,
        away,
        away,
        AggregatorMetrics(CollectorRegistry()),
        lambda _: None,
        lambda: False,
    )

    async def keep(_: pb.TaskRecord) -> None:
        made.handle(Appended())

    made._append = keep  # type: ignore[method-assign]
    return made


class Deaf:
    """The stream of a worker that reads its welcome and no more, and never ends to speak."""

    def __init__(self, request: pb.WorkRequest, watched: HostedTasks) -> None:
        self._request = request
        self._watched = watched
        self._hello = pb.WorkHello(job_id="job-1", term=1, worker_id="w1", slots=1)
        self.most = self.written = 0

    async def read(self) -> pb.WorkRequest:
        await asyncio.sleep(0)
        hello, self._hello = self._hello, None  # type: ignore[assignment]
        if hello is not None:
            return pb.WorkRequest(hello=hello)
        self.most = max([self.most, *map(len, self._watched._outboxes.values())])
        return self._request

    async def write(self, message: pb.WorkResponse) -> None:
        self.written += 1
        if not message.HasField("welcome"):
            await asyncio.Event().wait()


async def test_a_worker_that_speaks_and_never_reads_loses_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks_module, "OUTBOX_MAX", ROOM)
    job = hosted()
    # Each report of an attempt that nobody knows is answered.
    report = pb.TaskReport(task=1, attempt=77, value_json="1")
    stream = Deaf(pb.WorkRequest(reports=pb.TaskReports(reports=[report])), job)
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(ResourceExhausted, match="does not read"):
            await TaskServicer(lambda _: job).Work(None, stream)
    assert (stream.most, stream.written) == (ROOM, 2)
    assert not job._outboxes
    assert job.dispatcher.leased == 0, "what it had goes to others"


async def test_a_worker_that_reads_again_in_time_is_told_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks_module, "OUTBOX_MAX", ROOM)
    outbox = Outbox()
    overflow = asyncio.create_task(outbox.overflow())
    for attempt in range(3 * ROOM):
        if len(outbox) == ROOM:
            for _ in range(ROOM):
                await outbox.next()
        outbox.add(Send(1, settled=(attempt,)))
    assert [list((await outbox.next()).settled) for _ in range(ROOM)] == [
        [attempt] for attempt in range(2 * ROOM, 3 * ROOM)
    ]
    await asyncio.sleep(0)
    assert not overflow.done()
    overflow.cancel()


async def test_credit_bounds_the_tasks_that_wait_for_a_worker() -> None:
    slots = 2
    job = hosted(100_000)
    first, second = job.open_stream(), job.open_stream()
    job.handle(WorkerOpened(first[0], "w1", slots, ()))
    for _ in range(20):  # w1 shows that they take no time, so that many are handed out together
        message = await first[1].next()
        reports = [
            pb.TaskReport(task=task, attempt=attempt, value_json="1")
            for attempt, task in enumerate(message.tasks, message.first_attempt)
        ]
        job.handle(Reported(first[0], reports))
        await asyncio.sleep(0)
    job.handle(WorkerOpened(second[0], "w2", slots, ()))
    for _ in range(100):
        job.handle(Reported(second[0], ()))  # it lives, and says nothing of its tasks
        job.handle(Tick())
    waiting = sum(len(each.tasks) for each in second[1]._messages)
    assert slots < waiting <= slots * DEPTH_MAX


async def test_a_message_with_many_inputs_is_cut_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.aggregation.tasks.INPUTS_BYTES", 500)
    outbox = Outbox()
    inputs = tuple(
        tuple(pb.StoredValue(digest=f"{task:064}", size_bytes=9) for _ in range(task % 5))
        for task in range(10)
    )
    outbox.add(Send(1, tuple(range(10)), 70, (5,), inputs))
    messages = [await outbox.next() for _ in range(len(outbox))]
    assert len(messages) > 1
    assert [list(each.settled) for each in messages] == [[5]] + [[]] * (len(messages) - 1)
    assert [task for each in messages for task in each.tasks] == list(range(10))
    told = [
        (attempt, tuple(given.values))
        for each in messages
        for attempt, given in enumerate(each.inputs, each.first_attempt)
    ]
    assert told == list(enumerate(inputs, 70))
