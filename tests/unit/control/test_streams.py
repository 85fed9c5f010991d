"""Event log, job logs, metric points and journal writer over a store that a test controls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from coordinator.control import event_log, job_streams
from coordinator.control.core.facts import Facts
from coordinator.control.event_log import EventLog
from coordinator.control.job_streams import JobStreams, Series
from coordinator.control.journal import JournalWriter, replay
from coordinator.control.paging import Page
from coordinator.control.store import Store
from phalanx.errors import Aborted, InvalidArgument, Unavailable
from phalanx.rpc.channel import MESSAGE_LIMIT_BYTES
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import ControlRecord, JobSubmitted, TermStarted
from phalanx.v1.coordination_service_pb2 import JobLogLine, JobLogLines, MetricPoints
from phalanx.v1.job_pb2 import Event, MetricPoint

GUARD_S = 30.0


class MemoryStore:
    """The part of `Store` that streams use, in memory; `open` is cleared while it is away."""

    def __init__(self) -> None:
        self.streams: dict[str, list[bytes]] = {}
        self.first: dict[str, int] = {}
        self.open = asyncio.Event()
        self.open.set()
        self.fence = pb.Fence(lease="leader", token=1)
        self.storage = self

    async def append_exactly(
        self, stream: str, expected: int, payloads: Sequence[bytes], owners: Sequence[Any] = ()
    ) -> int:
        await self.open.wait()
        records = self.streams.setdefault(stream, [])
        if expected != len(records):
            raise Aborted("somebody else wrote", reason="SEQUENCE_MISMATCH")
        records.extend(payloads)
        return len(records)

    async def read(
        self, stream: str, from_sequence: int, max_records: int = 0
    ) -> AsyncIterator[pb.JournalRecord]:
        records = self.streams.get(stream, [])
        start = max(from_sequence, self.first.get(stream, 0))
        stop = len(records) if max_records == 0 else min(len(records), start + max_records)
        for sequence in range(start, stop):
            yield pb.JournalRecord(sequence=sequence, payload=records[sequence])

    async def next_sequence(self, stream: str) -> int:
        return len(self.streams.get(stream, []))

    async def insist(self, attempt: Any) -> Any:
        return await attempt()

    TruncateJournal = "truncate"

    async def insist_call(self, method: str, request: pb.TruncateJournalRequest) -> None:
        assert method == "truncate"
        self.first[request.stream] = request.before_sequence


async def sequences(log: EventLog, after: int) -> list[int]:
    return [event.sequence async for event in log.read(after)]


async def test_events_get_their_sequence_when_they_are_durable() -> None:
    store: Any = MemoryStore()
    log = EventLog(store, next_sequence=0)
    wake = asyncio.Event()
    log.subscribe(wake)
    running = asyncio.create_task(log.run())
    store.open.clear()
    for number in range(3):
        log.append(Event(type=f"E{number}"))
    assert not await log.flushed(0.01)
    assert await sequences(log, 0) == [], "what is not durable is not shown"
    store.open.set()
    assert await log.flushed(GUARD_S)
    assert wake.is_set()
    assert await sequences(log, 0) == [1, 2, 3]
    assert await sequences(log, 2) == [3]
    running.cancel()
    other = EventLog(store, next_sequence=3)
    assert await sequences(other, 0) == [1, 2, 3], "another process reads the same"


async def test_long_events_come_in_messages_that_storage_takes() -> None:
    class Bounded(MemoryStore):
        async def append_exactly(
            self, stream: str, expected: int, payloads: Sequence[bytes], owners: Sequence[Any] = ()
        ) -> int:
            assert sum(map(len, payloads)) < MESSAGE_LIMIT_BYTES // 2
            return await super().append_exactly(stream, expected, payloads)

    store: Any = Bounded()
    log = EventLog(store, next_sequence=0)
    for _ in range(40):
        log.append(Event(type="E", message="x" * 200_000))
    running = asyncio.create_task(log.run())
    assert await log.flushed(GUARD_S)
    running.cancel()
    assert await sequences(log, 0) == list(range(1, 41))


async def test_old_events_are_dropped_and_counted_while_storage_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_log, "HELD_MAX", 10)
    store: Any = MemoryStore()
    log = EventLog(store, next_sequence=0)
    for number in range(25):
        log.append(Event(type=f"E{number}"))
    assert log.dropped == 15
    running = asyncio.create_task(log.run())
    assert await log.flushed(GUARD_S)
    running.cancel()
    kept = [event async for event in log.read(0)]
    assert [event.type for event in kept] == [f"E{number}" for number in range(15, 25)]
    assert [event.sequence for event in kept] == list(range(1, 11)), "without gaps all the same"


async def test_readers_far_behind_get_old_events_from_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_log, "RECENT_MAX", 5)
    store: Any = MemoryStore()
    log = EventLog(store, next_sequence=0)
    running = asyncio.create_task(log.run())
    for number in range(20):
        log.append(Event(type=f"E{number}"))
    assert await log.flushed(GUARD_S)
    running.cancel()
    assert await sequences(log, 0) == list(range(1, 21))
    assert await sequences(log, 12) == list(range(13, 21))
    assert await sequences(log, 17) == [18, 19, 20]


async def test_the_event_log_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEPT_MAX", 50)
    store: Any = MemoryStore()
    log = EventLog(store, next_sequence=0)
    running = asyncio.create_task(log.run())
    for number in range(200):
        log.append(Event(type=f"E{number}"))
    assert await log.flushed(GUARD_S)
    async with asyncio.timeout(GUARD_S):
        while store.first.get("events", 0) != 150:
            await asyncio.sleep(0)
    running.cancel()


def point(step: int, value: float, name: str = "train/loss") -> MetricPoint:
    return MetricPoint(step=step, name=name, value=value)


def test_points_are_keyed_by_step() -> None:
    series = Series()
    assert series.add(point(1, 0.5))
    assert series.add(point(2, 0.4))
    assert not series.add(point(1, 0.5)), "a replayed step brings nothing new"
    assert series.add(point(2, 0.3)), "a step that changed does"
    assert [(each.step, each.value) for each in series.points()] == [(1, 0.5), (2, 0.3)]


def test_long_series_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_streams, "SERIES_POINTS_MAX", 100)
    series = Series()
    written = sum(series.add(point(step, 1.0)) for step in range(100_000))
    steps = [each.step for each in series.points()]
    assert 50 <= len(steps) <= 101
    assert written < 100 + 51 * 12
    gaps = {after - before for before, after in pairwise(steps)}
    assert len(gaps) <= 2
    assert steps[-1] > 98_000


async def test_points_and_lines_are_written_and_read_again() -> None:
    store: Any = MemoryStore()
    streams = JobStreams(store)
    for _ in range(2):
        points = [point(step, 1.0 / (step + 1)) for step in range(5)]
        streams.add_points(MetricPoints(job_id="job-1", points=points))
    lines = [JobLogLine(time_unix_nanos=n, text=f"line {n}") for n in range(3)]
    streams.add_lines(JobLogLines(job_id="job-1", lines=lines), "w1")
    await streams.flush()
    again = JobStreams(store)
    read = await again.points("job-1", [], -1, 0)
    assert [each.step for each in read] == [0, 1, 2, 3, 4]
    assert [each.step for each in await again.points("job-1", ["none"], -1, 0)] == []
    assert [each.step for each in await again.points("job-1", [], 2, 0)] == [3, 4]
    assert [each.step for each in await again.points("job-1", [], -1, 2)] == [1, 4]
    kept = [(line.worker_id, line.text) async for _, line in again.lines("job-1", 0)]
    assert kept == [("w1", "line 0"), ("w1", "line 1"), ("w1", "line 2")]


async def test_a_line_is_its_sender_s_whatever_it_says() -> None:
    store: Any = MemoryStore()
    streams = JobStreams(store)
    forged = JobLogLine(worker_id="w2", text="all is well")
    streams.add_lines(JobLogLines(job_id="job-1", lines=[forged]), "w1")
    await streams.flush()
    assert [line.worker_id async for _, line in streams.lines("job-1", 0)] == ["w1"]


class AwayStore(MemoryStore):
    """Reads fail, too, while it is away; `insist` tries again once it is back."""

    async def read(
        self, stream: str, from_sequence: int, max_records: int = 0
    ) -> AsyncIterator[pb.JournalRecord]:
        if not self.open.is_set():
            raise Unavailable("storage is away")
        async for record in super().read(stream, from_sequence, max_records):
            yield record

    async def insist(self, attempt: Any) -> Any:
        while True:
            try:
                return await attempt()
            except Unavailable:
                await self.open.wait()


async def test_what_members_say_never_waits_for_storage() -> None:
    store: Any = AwayStore()
    store.open.clear()
    streams = JobStreams(store)
    writing = asyncio.create_task(streams.run())
    streams.add_points(MetricPoints(job_id="job-1", points=[point(1, 0.5), point(2, 0.25)]))
    streams.add_lines(JobLogLines(job_id="job-1", lines=[JobLogLine(text="hello")]), "w1")
    flushing = asyncio.create_task(streams.flush())
    await asyncio.sleep(0)
    assert not flushing.done()
    store.open.set()
    await flushing
    assert not writing.done()
    writing.cancel()
    again = JobStreams(store)
    assert [each.step for each in await again.points("job-1", [], -1, 0)] == [1, 2]
    assert [line.text async for _, line in again.lines("job-1", 0)] == ["hello"]


async def test_points_that_wait_are_bounded_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_streams, "HELD_POINTS_MAX", 5)
    streams = JobStreams(MemoryStore())  # type: ignore[arg-type]
    streams.add_points(MetricPoints(job_id="job-1", points=[point(n, 1.0) for n in range(20)]))
    shown = await streams.points("job-1", [], -1, 0)
    assert [each.step for each in shown] == [15, 16, 17, 18, 19]


async def test_memory_does_not_grow_with_the_number_of_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_streams, "SERIES_JOBS_MAX", 3)
    store: Any = MemoryStore()
    streams = JobStreams(store)
    for number in range(20):
        job_id = f"job-{number}"
        streams.add_points(MetricPoints(job_id=job_id, points=[point(1, 0.5)]))
        streams.add_lines(JobLogLines(job_id=job_id, lines=[JobLogLine(text="x")]), "w1")
        await streams.flush()
    held = (streams._series, streams._bytes, streams._lines, streams._loading, streams._next)
    assert [len(each) for each in held] == [3, 3, 0, 3, 6]
    assert [each.step for each in await streams.points("job-0", [], -1, 0)] == [1]
    streams.add_points(MetricPoints(job_id="job-0", points=[point(2, 0.5)]))
    await streams.flush()
    assert [each.step for each in await JobStreams(store).points("job-0", [], -1, 0)] == [1, 2]


async def test_a_job_that_is_removed_while_its_series_is_read_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class SlowStore(MemoryStore):
        async def read(self, *place: Any) -> AsyncIterator[pb.JournalRecord]:
            await self.open.wait()
            async for record in super().read(*place):
                yield record

    monkeypatch.setattr(job_streams, "SERIES_JOBS_MAX", 1)
    store: Any = SlowStore()
    store.open.clear()
    streams = JobStreams(store)
    reading = asyncio.create_task(streams.points("removed", [], -1, 0))
    await asyncio.sleep(0)
    streams.forget("removed")
    store.open.set()
    async with asyncio.timeout(GUARD_S):
        assert await reading == []
        await streams.points("other", [], -1, 0)
        await streams.flush()
    assert list(streams._series) == ["other"]


async def test_logs_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_streams.LOG_LIMIT_BYTES == 10 * 2**20
    monkeypatch.setattr(job_streams, "LOG_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(job_streams, "RECORD_BYTES", 1000)
    store: Any = MemoryStore()
    for part in range(2):  # a restart does not forget how much is there
        streams = JobStreams(store)
        lines = [JobLogLine(time_unix_nanos=n, text="x" * 500) for n in range(part, part + 40)]
        streams.add_lines(JobLogLines(job_id="job-1", lines=lines), "w1")
        await streams.flush()
    assert sum(len(each) for each in store.streams["logs/job-1"]) < 12_000
    texts = [line.text async for _, line in JobStreams(store).lines("job-1", 0)]
    assert texts[-1].startswith("the log is full")
    assert sum(text.startswith("the log is full") for text in texts) == 1


async def test_lines_are_held_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_streams, "HELD_LINES_MAX", 5)
    store: Any = MemoryStore()
    streams = JobStreams(store)
    lines = [JobLogLine(text=str(n)) for n in range(20)]
    streams.add_lines(JobLogLines(job_id="job-1", lines=lines), "w1")
    await streams.flush()
    assert [line.text async for _, line in streams.lines("job-1", 0)] == ["0", "1", "2", "3", "4"]


def submitted(number: int) -> ControlRecord:
    return ControlRecord(job_submitted=JobSubmitted(job_id=f"job-{number}"))


async def write(store: Any, records: list[ControlRecord], every: int) -> tuple[Facts, list[int]]:
    durable, order = Facts(), list[int]()
    writer = JournalWriter(
        store,
        generation=1,
        next_sequence=0,
        records_read=0,
        durable=durable,
        snapshot_every=every,
        on_durable=lambda index, _: order.append(index),
        observe_append_s=lambda _: None,
    )
    running = asyncio.create_task(writer.run())
    for index, record in enumerate(records, start=1):
        writer.append(index, record)
        if index % 7 == 0:
            async with asyncio.timeout(GUARD_S):
                await writer.drained()
                await asyncio.sleep(0)
    async with asyncio.timeout(GUARD_S):
        await writer.drained()
    running.cancel()
    return durable, order


async def test_the_journal_keeps_order_and_stays_short() -> None:
    store: Any = MemoryStore()
    records = []
    for number in range(60):
        records.append(submitted(number % 4))
        records.append(
            ControlRecord(term_started=TermStarted(job_id=f"job-{number % 4}", term=number))
        )
    durable, order = await write(store, records, every=20)
    assert order == list(range(1, len(records) + 1))
    assert store.first["control"] > 0
    facts, following, count = await replay(store)
    assert facts.digest() == durable.digest()
    assert following == len(store.streams["control"])
    assert count < 60


async def test_a_writer_that_is_not_alone_stops() -> None:
    store: Any = MemoryStore()
    store.streams["control"] = [b""]
    writer = JournalWriter(
        store,
        generation=1,
        next_sequence=0,
        records_read=0,
        durable=Facts(),
        snapshot_every=100,
        on_durable=lambda index, _: pytest.fail(f"record {index} is not durable"),
        observe_append_s=lambda _: None,
    )
    writer.append(1, submitted(1))
    with pytest.raises(Aborted):
        await writer.run()


async def test_an_append_whose_answer_got_lost_is_recognised() -> None:
    store = Store("127.0.0.1:1")
    there = [b"one", b"two"]

    async def refused(*_: Any, **__: Any) -> Any:
        raise Aborted("the next record gets another sequence", reason="SEQUENCE_MISMATCH")

    async def read(*_: Any) -> AsyncIterator[pb.JournalRecord]:
        for payload in there:
            yield pb.JournalRecord(payload=payload)

    store.insist_call = refused  # type: ignore[method-assign]
    store.read = read  # type: ignore[method-assign]
    assert await store.append_exactly("control", 5, [b"one", b"two"]) == 7
    with pytest.raises(Aborted):
        await store.append_exactly("control", 5, [b"one", b"other"])
    await store.close()


def test_pages_follow_one_another() -> None:
    items = [(-number, f"job-{number}") for number in range(7)]
    token, seen = "", []
    while True:
        taken, token = Page(3, token).take(items, lambda item: item)
        seen += taken
        if not token:
            break
    assert seen == sorted(items)
    with pytest.raises(InvalidArgument, match="page_token"):
        Page(3, "nonsense")
    with pytest.raises(InvalidArgument, match="page_size"):
        Page(-1, "")
