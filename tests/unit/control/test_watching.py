"""What a watcher of a job is shown, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coordinator.control import watching
from coordinator.control.watching import WatchHub, watch
from phalanx.v1.job_pb2 import Event, Job, Progress
from phalanx.v1.job_service_pb2 import WatchJobResponse

GUARD_S = 30.0


class EventLog:
    """One that nothing happens in."""

    def subscribe(self, _: asyncio.Event) -> None:
        pass

    def unsubscribe(self, _: asyncio.Event) -> None:
        pass

    async def flushed(self, _: float) -> None:
        pass

    async def read(self, _: int) -> AsyncIterator[Event]:
        for event in ():
            yield event


class Leader:
    """Has one job, whose newest step is that of its newest report."""

    def __init__(self) -> None:
        self.watchers = WatchHub()
        self.event_log = EventLog()
        self.step = 0

    def job_view(self, job_id: str) -> Job:
        return Job(id=job_id, state=Job.STATE_RUNNING)

    def progress(self, _: str) -> Progress:
        return Progress(step=self.step)

    def report(self, step: int) -> None:
        self.step = step
        self.watchers.progressed("j")


class Watched:
    """A watcher of the job, and what it was shown."""

    def __init__(self, leader: Leader) -> None:
        self._updates: Any = watch(leader, "j", 0)  # type: ignore[arg-type]

    async def next(self) -> WatchJobResponse:
        async with asyncio.timeout(GUARD_S):
            update: WatchJobResponse = await anext(self._updates)
            return update

    async def rest(self) -> list[WatchJobResponse]:
        async with asyncio.timeout(GUARD_S):
            return [update async for update in self._updates]


async def test_progress_in_between_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PROGRESS_EVERY_S", 3600.0)
    leader = Leader()
    watched = Watched(leader)
    assert (await watched.next()).job.state == Job.STATE_RUNNING
    leader.report(1)
    assert (await watched.next()).progress.step == 1
    leader.report(2)
    paused = Job(id="j", state=Job.STATE_PAUSED)
    leader.watchers.changed("j", paused)
    assert (await watched.next()).job == paused, "what is no progress is shown at once"
    leader.report(3)
    ended = Job(id="j", state=Job.STATE_SUCCEEDED)
    leader.watchers.changed("j", ended)
    assert await watched.rest() == [WatchJobResponse(job=ended)]


async def test_what_was_held_back_comes_later_and_the_latest_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "PROGRESS_EVERY_S", 0.05)
    leader = Leader()
    watched = Watched(leader)
    await watched.next()
    leader.report(1)
    assert (await watched.next()).progress.step == 1
    # Held back, without anything else that would wake the watcher up.
    leader.report(2)
    leader.report(3)
    assert (await watched.next()).progress.step == 3


def test_progress_comes_at_most_five_times_a_second() -> None:
    assert watching.PROGRESS_EVERY_S >= 1 / 5
