"""Watchers of jobs: the job first, on every change and last; all events; thinned progress."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from coordinator.control.core.lifecycle import ENDED
from phalanx.errors import NotFound, PhalanxError
from phalanx.v1.job_pb2 import Job
from phalanx.v1.job_service_pb2 import WatchJobResponse

if TYPE_CHECKING:
    from coordinator.control.leader import Leader

PROGRESS_EVERY_S = 0.2
CHANGES_MAX = 256
LAST_EVENTS_WAIT_S = 5.0


class Watcher:
    """What one watcher has not been shown yet."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.changes: deque[Job] = deque(maxlen=CHANGES_MAX)
        self.progress = False
        self.removed = False


class WatchHub:
    """Hands changes of jobs to their watchers."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[Watcher]] = {}
        self._closed: PhalanxError | None = None

    def watched(self, job_id: str) -> bool:
        """Return whether anybody watches the job."""
        return job_id in self._watchers

    def changed(self, job_id: str, view: Job | None) -> None:
        """Show a new state of a job; None: it is removed."""
        for watcher in self._watchers.get(job_id, ()):
            if view is None:
                watcher.removed = True
            elif not watcher.changes or watcher.changes[-1] != view:
                watcher.changes.append(view)
            watcher.wake.set()

    def progressed(self, job_id: str) -> None:
        """Say that the progress of a job is new."""
        for watcher in self._watchers.get(job_id, ()):
            watcher.progress = True
            watcher.wake.set()

    def close(self, error: PhalanxError) -> None:
        """End all watching with an error: this process leads no more."""
        self._closed = error
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.wake.set()

    def check_open(self) -> None:
        """Raise the error with which the hub was closed, if it was."""
        if self._closed is not None:
            raise self._closed

    def add(self, job_id: str) -> Watcher:
        """Begin to watch."""
        watcher = Watcher()
        self._watchers.setdefault(job_id, set()).add(watcher)
        return watcher

    def remove(self, job_id: str, watcher: Watcher) -> None:
        """Stop watching."""
        watchers = self._watchers.get(job_id, set())
        watchers.discard(watcher)
        if not watchers:
            self._watchers.pop(job_id, None)


async def watch(
    leader: Leader, job_id: str, after_sequence: int
) -> AsyncIterator[WatchJobResponse]:
    """Yield everything about one job until it has ended. Raises NotFound, Unavailable."""
    view = leader.job_view(job_id)
    watcher = leader.watchers.add(job_id)
    leader.event_log.subscribe(watcher.wake)
    try:
        async for update in _updates(leader, job_id, watcher, view, after_sequence):
            yield update
    finally:
        leader.event_log.unsubscribe(watcher.wake)
        leader.watchers.remove(job_id, watcher)


async def _updates(
    leader: Leader, job_id: str, watcher: Watcher, view: Job, after_sequence: int
) -> AsyncIterator[WatchJobResponse]:
    loop = asyncio.get_running_loop()
    shown_s, sequence = -math.inf, after_sequence
    yield WatchJobResponse(job=view)
    while True:
        leader.watchers.check_open()
        watcher.wake.clear()
        if view.state in ENDED and not watcher.changes:
            # Its last events were decided before its last state; they come first.
            await leader.event_log.flushed(LAST_EVENTS_WAIT_S)
        async for event in leader.event_log.read(sequence):
            sequence = event.sequence
            if event.job_id == job_id:
                yield WatchJobResponse(event=event)
        if view.state in ENDED and not watcher.changes:
            yield WatchJobResponse(job=view)
            return
        while watcher.changes:
            shown, view = view, watcher.changes.popleft()
            if view != shown and (view.state not in ENDED or watcher.changes):
                yield WatchJobResponse(job=view)
        if watcher.removed:
            raise NotFound(f"job {job_id} was deleted", reason="JOB_NOT_FOUND")
        due_s = shown_s + PROGRESS_EVERY_S
        if watcher.progress and loop.time() >= due_s:
            watcher.progress, shown_s = False, loop.time()
            yield WatchJobResponse(progress=leader.progress(job_id))
        if view.state not in ENDED:
            await _wait(watcher, due_s - loop.time() if watcher.progress else None)


async def _wait(watcher: Watcher, timeout_s: float | None) -> None:
    """Wait for something new, or until held back progress is due."""
    if timeout_s is not None and timeout_s <= 0:
        return
    try:
        await asyncio.wait_for(watcher.wake.wait(), timeout_s)
    except TimeoutError:
        return
