"""Results that were collected as garbage before the journal named them are made again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from coordinator.aggregation.core.dispatch.dispatcher import Dispatcher, State
from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Effect,
    Reported,
    Send,
    ValuesGone,
    WorkerOpened,
)
from coordinator.aggregation.task_journal import TaskJournal
from coordinator.aggregation.tasks import HostedTasks, Outbox
from phalanx.errors import NotFound
from phalanx.programs.base import Graph
from phalanx.telemetry.metrics import AggregatorMetrics
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.task_service_pb2 import StoredValue, TaskRecord, TaskReport, WorkResponse
from phalanx.v1.training_pb2 import JobPlan

GUARD_S = 30.0


def stored(task: int, attempt: int) -> TaskReport:
    return TaskReport(task=task, attempt=attempt, stored=StoredValue(digest=f"of {task}"))


def sends(effects: list[Effect]) -> list[Send]:
    return [each for each in effects if isinstance(each, Send)]


def record_of(effects: list[Effect]) -> TaskRecord:
    (append,) = (each for each in effects if isinstance(each, Append))
    return append.record


def test_what_is_gone_is_made_again_and_the_rest_of_its_record_is_kept() -> None:
    dispatcher = Dispatcher(5, 1, 3, 0, Graph(((), (), (), (), (0, 1, 2, 3))))
    dispatcher.begin()
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "w1", 4), 0.0))
    first = send.first_attempt
    # The first record is under way, and all else waits for it.
    dispatcher.handle(Reported(1, [stored(3, first + 3)]), 0.1)
    failure = TaskReport(task=2, attempt=first + 2, failure=Failure(code="RAISED"))
    dispatcher.handle(Reported(1, [stored(0, first), stored(1, first + 1), failure]), 0.1)
    record = record_of(dispatcher.handle(Appended(), 0.2))
    assert [each.task for each in record.results] == [0, 1]

    effects = dispatcher.handle(ValuesGone(frozenset({"of 0"})), 0.3)
    kept = record_of(effects)
    assert [each.task for each in kept.results] == [1]
    assert list(kept.failed_tries) == list(record.failed_tries) != []
    told = [each for each in sends(effects) if each.settled]
    assert [attempt for each in told for attempt in each.settled] == [first]
    assert 0 in [task for each in sends(effects) for task in each.tasks]
    assert dispatcher.state(0) is State.LEASED

    again = next(each for each in sends(effects) if 0 in each.tasks)
    attempt = again.first_attempt + again.tasks.index(0)
    assert attempt > first + 3
    dispatcher.handle(Appended(), 0.4)
    dispatcher.handle(Reported(1, [stored(0, attempt)]), 0.5)
    dispatcher.handle(Appended(), 0.6)
    assert dispatcher.state(0) is State.DONE
    assert dispatcher.state(4) is State.BLOCKED  # the failed one is tried again, too


class Storage:
    """A journal, and blobs that somebody has to put there."""

    def __init__(self) -> None:
        self.blobs: set[str] = set()
        self.records: list[TaskRecord] = []

    def journal_appender(self) -> Storage:
        return self

    async def append(self, stream: str, payloads: Sequence[bytes], expected: int) -> int:
        self.records += [TaskRecord.FromString(each) for each in payloads]
        return len(self.records)

    def close(self) -> None:
        pass

    async def read_journal(self, stream: str, first: int) -> AsyncIterator[Any]:
        return
        yield

    async def set_pins(self, holder: str, pins: Sequence[storage_pb.Pin]) -> None:
        missing = await self.missing_blobs([each.blob for each in pins])
        if missing:
            raise NotFound(f"blob {missing[0]} is not stored", reason="BLOB_NOT_FOUND")

    async def missing_blobs(self, digests: Collection[str]) -> list[str]:
        return [each for each in digests if each not in self.blobs]


async def given(outbox: Outbox) -> WorkResponse:
    """Read on until a task is handed out."""
    while True:
        message = await outbox.next()
        if message.tasks:
            return message


async def test_a_job_goes_on_although_storage_lacks_what_a_worker_has_reported() -> None:
    storage: Any = Storage()
    said: list[Any] = []
    dispatcher = Dispatcher(3, 1, 3, 0)
    dispatcher.begin()
    hosted = HostedTasks(
        JobPlan(job_id="job-1"),
        1,
        dispatcher,
        TaskJournal(storage, "job-1", lambda *_: None),
        storage,
        AggregatorMetrics(CollectorRegistry()),
        said.append,
        lambda: True,
    )
    async with asyncio.timeout(GUARD_S):
        session, outbox = hosted.open_stream()
        hosted.handle(WorkerOpened(session, "w1", 2))
        first = await given(outbox)
        attempts = dict(zip(first.tasks, range(first.first_attempt, 1 << 62), strict=False))
        storage.blobs = {"of 1"}
        reports = [stored(task, attempts[task]) for task in (0, 1)]
        hosted.handle(Reported(session, reports))
        again = await given(outbox)
        while 0 not in again.tasks:
            again = await given(outbox)
        storage.blobs.add("of 0")
        attempt = again.first_attempt + list(again.tasks).index(0)
        hosted.handle(Reported(session, [stored(0, attempt)]))
        while dispatcher.done < 2:
            await asyncio.sleep(0)
        await hosted.close()
    assert said == []
    assert [each.task for record in storage.records for each in record.results] == [1, 0]
