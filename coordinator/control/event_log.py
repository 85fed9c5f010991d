"""The event log: every event gets the next sequence when it is durable, and is shown only then.

So sequences have no gaps and mean the same on any control process. While storage is away events are
held up to a bound, then the oldest are dropped and counted: they are observations, not facts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from coordinator.control.store import Store
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.job_pb2 import Event

STREAM = "events"
HELD_MAX = 10_000
RECENT_MAX = 5_000
KEPT_MAX = 100_000
BATCH_MAX = 500
BATCH_BYTES = 1024 * 1024
"""And one event more: storage takes no longer message than another."""

_log = get_logger(__name__)


class EventLog:
    """Appends events and hands them to readers in order."""

    def __init__(self, store: Store, next_sequence: int) -> None:
        self._store = store
        self._next = next_sequence
        self._truncated_at = next_sequence
        self._held: deque[Event] = deque()
        self._recent: deque[Event] = deque(maxlen=RECENT_MAX)
        self._filled = asyncio.Event()
        self._flushed = asyncio.Event()
        self._flushed.set()
        self._readers: set[asyncio.Event] = set()
        self.dropped = 0

    def append(self, event: Event) -> None:
        """Queue one event."""
        if len(self._held) >= HELD_MAX:
            self._held.popleft()
            self.dropped += 1
        self._held.append(event)
        self._flushed.clear()
        self._filled.set()

    async def flushed(self, timeout_s: float) -> bool:
        """Wait until every queued event is durable; return whether it is."""
        try:
            await asyncio.wait_for(self._flushed.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def subscribe(self, wake: asyncio.Event) -> None:
        """Set `wake` whenever there are new events."""
        self._readers.add(wake)

    def unsubscribe(self, wake: asyncio.Event) -> None:
        """Stop setting `wake`."""
        self._readers.discard(wake)

    async def read(self, after_sequence: int) -> AsyncIterator[Event]:
        """Yield all events after a sequence that are there now, in order."""
        position = after_sequence
        oldest = self._recent[0].sequence if self._recent else self._next + 1
        if position + 1 < oldest:
            until = oldest - 1
            async for record in self._store.read(STREAM, position, until - position):
                event = Event.FromString(record.payload)
                event.sequence = record.sequence + 1
                if event.sequence > until:
                    break
                position = event.sequence
                yield event
        for event in list(self._recent):
            if event.sequence > position:
                yield event

    async def run(self) -> None:
        """Write until an error ends it: somebody else leads. Raises PhalanxError."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._held:
                await self._write_batch()
            self._flushed.set()
            await self._truncate()

    async def _write_batch(self) -> None:
        batch: list[Event] = []
        payloads: list[bytes] = []
        size = 0
        while self._held and len(batch) < BATCH_MAX and size < BATCH_BYTES:
            event = self._held.popleft()
            event.sequence = self._next + len(batch) + 1
            batch.append(event)
            payloads.append(event.SerializeToString())
            size += len(payloads[-1])
        self._next = await self._store.append_exactly(STREAM, self._next, payloads)
        self._recent.extend(batch)
        for wake in self._readers:
            wake.set()

    async def _truncate(self) -> None:
        """Keep the newest events only, so that the log does not grow for ever."""
        before = self._next - KEPT_MAX
        if before - self._truncated_at < KEPT_MAX // 10:
            return
        request = pb.TruncateJournalRequest(
            stream=STREAM, before_sequence=before, fence=self._store.fence
        )
        await self._store.insist_call(self._store.storage.TruncateJournal, request)
        self._truncated_at = before
