"""What tasks keep for others: who gets it, that it is pinned until the job ends, and not longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import pytest

from coordinator.aggregation.core.dispatch.dispatcher import Dispatcher
from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Effect,
    Reported,
    Send,
    WorkerOpened,
)
from coordinator.aggregation.task_journal import TaskJournal
from coordinator.control.core.facts import Facts, JobFacts
from coordinator.control.core.lifecycle import CANCELLED, FAILED, PAUSED, RUNNING, SUCCEEDED
from coordinator.control.pins import unclaimed
from phalanx.errors import Aborted, NotFound
from phalanx.ids import new_id
from phalanx.programs.base import Graph
from phalanx.tasks import kept_holder, pins_holder
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import JobChanged, JobSnapshot, JobSubmitted
from phalanx.v1.task_service_pb2 import (
    KeptState,
    StoredValue,
    TaskRecord,
    TaskReport,
    TaskResult,
)

GUARD_S = 30.0
GRAPH = Graph(((), (), (0, 1), (2,), (2,), (3, 4)))
"""Two begin, one says who goes on, and two may go on from what the first two have kept."""


def kept(task: int) -> KeptState:
    return KeptState(sha256=bytes([task]) * 32, size_bytes=100 + task)


def value(task: int) -> StoredValue:
    return StoredValue(digest=f"of {task}", size_bytes=1)


def report(task: int, attempt: int, **more: Any) -> TaskReport:
    return TaskReport(task=task, attempt=attempt, stored=value(task), **more)


class Ran:
    """A dispatcher with one worker, which reports what it is told to."""

    def __init__(self, journal: Sequence[TaskRecord] = ()) -> None:
        self.journal = list(journal)
        self.dispatcher = Dispatcher(6, len(self.journal) + 1, 3, 0, GRAPH)
        for record in self.journal:
            self.dispatcher.restore(record)
        self.journal.append(self.dispatcher.begin())
        self.given: dict[int, int] = {}
        self.inputs: dict[int, tuple[StoredValue, ...]] = {}
        self._do(self.dispatcher.handle(WorkerOpened(1, "w1", 4), 0.0))

    def report(self, task: int, **more: Any) -> None:
        self._do(self.dispatcher.handle(Reported(1, [report(task, self.given[task], **more)]), 1.0))

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Append):
                self.journal.append(effect.record)
                self._do(self.dispatcher.handle(Appended(), 1.0))
            elif isinstance(effect, Send):
                for place, task in enumerate(effect.tasks):
                    self.given[task] = effect.first_attempt + place
                    self.inputs[task] = effect.inputs[place]


def as_value(task: int) -> StoredValue:
    return StoredValue(digest=(bytes([task]) * 32).hex(), size_bytes=100 + task)


def test_those_that_go_on_get_what_was_kept_after_what_they_need() -> None:
    ran = Ran()
    ran.report(0, kept=kept(0))
    ran.report(1, kept=kept(1))
    assert ran.inputs[2] == (value(0), value(1))
    ran.report(2, earlier=[1, 0])
    assert ran.inputs[3] == (value(2), as_value(1))
    assert ran.inputs[4] == (value(2), as_value(0))
    # Whoever takes over reads the same.
    after = Ran(ran.journal)
    assert (after.inputs[3], after.inputs[4]) == (ran.inputs[3], ran.inputs[4])


@pytest.mark.parametrize("earlier", [[], [-1, 1], [5, 77], [1, 1, 1, 1], [2**62, -(2**62)]])
def test_whatever_is_said_of_earlier_tasks_the_job_goes_on(earlier: list[int]) -> None:
    ran = Ran()
    ran.report(0)
    ran.report(1, kept=kept(1))
    ran.report(2, earlier=earlier)
    for place, task in enumerate((3, 4)):
        goes_on = earlier[place : place + 1] == [1]
        assert ran.inputs[task] == (value(2), *([as_value(1)] if goes_on else []))
        ran.report(task)
    assert ran.inputs[5] == (value(3), value(4))


@pytest.mark.parametrize("sha256", [b"", b"short", bytes(33)])
def test_what_is_no_digest_is_not_kept(sha256: bytes) -> None:
    ran = Ran()
    ran.report(0, kept=KeptState(sha256=sha256, size_bytes=1))
    assert not any(each.HasField("kept") for record in ran.journal for each in record.results)


class Storage:
    """Pins, and blobs that somebody has to put there."""

    def __init__(self, blobs: Collection[str]) -> None:
        self.blobs = set(blobs)
        self.pins: dict[str, list[str]] = {}
        self.records: list[bytes] = []
        self.on_missing = lambda: None

    def journal_appender(self) -> Storage:
        return self

    async def append(self, stream: str, payloads: Sequence[bytes], expected: int) -> int:
        self.records += payloads
        return len(self.records)

    async def set_pins(self, holder: str, pins: Sequence[pb.Pin]) -> None:
        if not self.blobs.issuperset(each.blob for each in pins):
            raise NotFound("a blob is not stored", reason="BLOB_NOT_FOUND")
        self.pins[holder] = [each.blob for each in pins]

    async def missing_blobs(self, digests: Collection[str]) -> list[str]:
        missing = [each for each in digests if each not in self.blobs]
        self.on_missing()
        return missing


def record(term: int = 1) -> TaskRecord:
    results = [
        TaskResult(task=task, attempt=7 + task, stored=value(task), kept=kept(task))
        for task in (1, 2)
    ]
    return TaskRecord(term=term, results=results)


@pytest.mark.parametrize("gone", ["none", "before", "meanwhile"])
async def test_what_was_kept_is_pinned_and_no_result_waits_for_what_is_gone(gone: str) -> None:
    one, two = (as_value(task).digest for task in (1, 2))
    storage: Any = Storage({"of 1", "of 2", one, two})
    if gone == "before":
        storage.blobs.remove(one)
    elif gone == "meanwhile":
        storage.on_missing = lambda: storage.blobs.discard(one)
    journal = TaskJournal(storage, "job-1", lambda *_: None)
    async with asyncio.timeout(GUARD_S):
        await journal.append(record())
    assert storage.records == [record().SerializeToString()]
    expected = {"none": [one, two], "before": [two], "meanwhile": None}[gone]
    assert storage.pins.get(kept_holder("job-1", "1-0")) == expected
    assert storage.pins[pins_holder("job-1", 8)] == ["of 1", "of 2"]
    # A record keeps what it names by its digits, as long as the journal is there.
    assert one.encode() not in storage.records[0]


async def test_an_owner_that_was_replaced_lets_go_of_what_it_pinned() -> None:
    """Control let go of all pins when the job ended, maybe before this one was made."""

    class Later(Storage):
        async def append(self, stream: str, payloads: Sequence[bytes], expected: int) -> int:
            raise Aborted("another record stands there", reason="SEQUENCE_MISMATCH")

        async def read_journal(self, stream: str, first: int, limit: int) -> AsyncIterator[Any]:
            yield pb.JournalRecord(payload=b"of another")

    storage: Any = Later({"of 1", "of 2", *(as_value(task).digest for task in (1, 2))})
    journal = TaskJournal(storage, "job-1", lambda *_: None)
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Aborted):
            await journal.append(record())
    assert storage.pins[kept_holder("job-1", "1-0")] == []


async def test_an_owner_that_was_replaced_lets_go_of_nothing_that_the_next_one_pinned() -> None:
    """A worker reports to both what it was given by the first: the same attempts."""
    digests = [as_value(task).digest for task in (1, 2)]

    class Later(Storage):
        async def append(self, stream: str, payloads: Sequence[bytes], expected: int) -> int:
            if payloads[0] == record(term=1).SerializeToString():
                await after.append(record(term=2))
                raise Aborted("another record stands there", reason="SEQUENCE_MISMATCH")
            return await super().append(stream, payloads, expected)

        async def read_journal(self, stream: str, first: int, limit: int) -> AsyncIterator[Any]:
            yield pb.JournalRecord(payload=self.records[0])

    storage: Any = Later({"of 1", "of 2", *digests})
    before, after = (TaskJournal(storage, "job-1", lambda *_: None) for _ in range(2))
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Aborted):
            await before.append(record(term=1))
    kept_now = [pins for holder, pins in storage.pins.items() if "/kept-" in holder and pins]
    assert kept_now == [digests]


@pytest.mark.parametrize(
    ("state", "goes"),
    [(RUNNING, False), (PAUSED, False), (FAILED, False), (SUCCEEDED, True), (CANCELLED, True)],
)
async def test_pins_that_were_made_late_go_once_the_job_has_ended(state: Any, goes: bool) -> None:
    """Its last owner may pin after control has let go; a job that failed may be tried again."""
    job_id, facts = new_id("job"), Facts()
    snapshot = JobSnapshot(submitted=JobSubmitted(job_id=job_id), changed=JobChanged(state=state))
    facts.jobs[job_id] = JobFacts(snapshot)
    deleted = new_id("job")
    holders = [kept_holder(job_id, "1-7"), pins_holder(job_id, 7), kept_holder(deleted, "1-7")]

    class Store:
        storage: Any = type("Stub", (), {"ListPins": None})()

        async def call(self, _: Any, request: pb.ListPinsRequest) -> pb.ListPinsResponse:
            return pb.ListPinsResponse(holders=[] if request.after_holder else sorted(holders))

    store: Any = Store()
    found = await unclaimed(store, facts, ())
    assert set(found) == {
        kept_holder(deleted, "1-7"),
        *([kept_holder(job_id, "1-7")] if goes else []),
    }
