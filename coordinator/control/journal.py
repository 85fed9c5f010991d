"""The writer of the control journal: facts become durable in order, then what waits is freed.

Everything that is queued while an append is under way goes into the next one. From time to time a
snapshot of the durable state replaces the records before it, so that a restart reads no more than
what is alive.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from coordinator.control.core.facts import Facts
from coordinator.control.store import Store
from phalanx.errors import DataLoss
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import ControlRecord, TermStarted

STREAM = "control"
BATCH_RECORDS = 512
BATCH_BYTES = 3 * 1024 * 1024
QUEUE_MAX = 10_000
STUCK_S = 2.0
"""An append that takes longer waits for storage, or for room on its disk."""

_log = get_logger(__name__)


async def replay(store: Store) -> tuple[Facts, int, int]:
    """Return the durable state, the next sequence of the journal, and how many records were read.

    Raises DataLoss for a record that cannot be understood.
    """
    facts, following, count = Facts(), 0, 0
    async for record in store.read(STREAM, 0):
        try:
            facts.apply(ControlRecord.FromString(record.payload))
        except ValueError as error:
            raise DataLoss(f"record {record.sequence} of the control journal is damaged") from error
        following, count = record.sequence + 1, count + 1
    if count == 0:
        following = await store.next_sequence(STREAM)
    return facts, following, count


class JournalWriter:
    """Makes records durable one batch after another.

    `on_durable(index, record)` is called for each, in order. `run` ends only by an error: somebody
    else leads, or the journal is broken.
    """

    def __init__(
        self,
        store: Store,
        *,
        generation: int,
        next_sequence: int,
        records_read: int,
        durable: Facts,
        snapshot_every: int,
        on_durable: Callable[[int, ControlRecord], None],
        observe_append_s: Callable[[float], None],
    ) -> None:
        self._store = store
        self._generation = generation
        self._next = next_sequence
        self._since_snapshot = records_read
        self._durable = durable
        self._snapshot_every = snapshot_every
        self._on_durable = on_durable
        self._observe_append_s = observe_append_s
        self._queue: deque[tuple[int, ControlRecord, bytes]] = deque()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._began_s: float | None = None

    @property
    def lag(self) -> int:
        """Records that are decided and not yet durable."""
        return len(self._queue)

    @property
    def stuck(self) -> bool:
        """Whether nothing has become durable for a while, although something waits."""
        return self._began_s is not None and time.monotonic() - self._began_s >= STUCK_S

    @property
    def full(self) -> bool:
        """Whether callers should be sent away until storage has caught up."""
        return self.stuck or len(self._queue) >= QUEUE_MAX

    @property
    def overfull(self) -> bool:
        """Whether members alone have brought more than may wait: they are never sent away."""
        return len(self._queue) >= 2 * QUEUE_MAX

    def append(self, index: int, record: ControlRecord) -> None:
        """Queue one record."""
        self._queue.append((index, record, record.SerializeToString()))
        self._drained.clear()
        self._filled.set()

    async def drained(self) -> None:
        """Wait until everything queued is durable."""
        await self._drained.wait()

    async def run(self) -> None:
        """Write until an error ends it. Raises PhalanxError."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._queue:
                await self._write_batch()
            self._drained.set()
            if self._since_snapshot >= max(self._snapshot_every, 2 * len(self._durable.jobs)):
                await self._snapshot()

    async def _write_batch(self) -> None:
        batch: list[tuple[int, ControlRecord, bytes]] = []
        size = 0
        for entry in self._queue:
            size += len(entry[2])
            if batch and (size > BATCH_BYTES or len(batch) >= BATCH_RECORDS):
                break
            batch.append(entry)
        started = self._began_s = time.monotonic()
        self._next = await self._store.append_exactly(
            STREAM,
            self._next,
            [payload for _, _, payload in batch],
            [
                _owners(record.term_started)
                for _, record, _ in batch
                if record.WhichOneof("fact") == "term_started"
            ],
        )
        self._began_s = None
        self._observe_append_s(time.monotonic() - started)
        self._since_snapshot += len(batch)
        for index, record, _ in batch:
            self._queue.popleft()
            self._durable.apply(record)
            self._on_durable(index, record)

    async def _snapshot(self) -> None:
        """Write the durable state as a run of records, then drop what came before it."""
        first = self._next
        batch, size, count = list[bytes](), 0, 0
        for record in self._durable.snapshot():
            record.generation = self._generation
            payload = record.SerializeToString()
            if batch and size + len(payload) > BATCH_BYTES:
                self._next = await self._store.append_exactly(STREAM, self._next, batch)
                batch, size = [], 0
            batch.append(payload)
            size, count = size + len(payload), count + 1
        self._next = await self._store.append_exactly(STREAM, self._next, batch)
        self._since_snapshot = 0
        request = pb.TruncateJournalRequest(
            stream=STREAM, before_sequence=first, fence=self._store.fence
        )
        await self._store.insist_call(self._store.storage.TruncateJournal, request)
        _log.info("journal_snapshot", records=count, from_sequence=first)


def _owners(started: TermStarted) -> pb.TermOwners:
    """Return from whom storage is to take parts of checkpoints in a term."""
    return pb.TermOwners(
        job_id=started.job_id,
        term=started.term,
        workers=started.workers_own,
        member_ids=[each.aggregator_id for each in started.ranges],
    )
