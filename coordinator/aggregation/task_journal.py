"""The journal of one job's tasks: what is reported as done stands here first.

There is no fence but the place of a record: a new owner appends the first record of its term, and
whoever wrote before finds another record where its own should be, and is out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from coordinator.aggregation.checkpoints import PATIENCE, may_be_stored_later
from phalanx.clients.storage import StorageClient
from phalanx.errors import Aborted, DataLoss, NotFound, PhalanxError, Unavailable
from phalanx.rpc.patience import insist
from phalanx.tasks import journal_stream, kept_holder, pins_holder
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.task_service_pb2 import TaskRecord, TaskResult

Tell = Callable[[PhalanxError, int], None]


class ResultsGone(Exception):
    """Storage does not have values that a record names."""

    def __init__(self, digests: Iterable[str]) -> None:
        super().__init__(f"storage lacks {', '.join(digests)}")
        self.digests = frozenset(digests)


class TaskJournal:
    """Reads all records, then appends one after another; waits as long as storage is away."""

    def __init__(self, storage: StorageClient, job_id: str, waits: Tell) -> None:
        self._storage = storage
        self._job_id = job_id
        self._stream = journal_stream(job_id)
        self._waits = waits
        self._next = 0
        self._appender = storage.journal_appender()

    def close(self) -> None:
        """Nothing is appended any more."""
        self._appender.close()

    async def read(self, term: int) -> list[TaskRecord]:
        """Return the records that were not read yet.

        Raises Aborted where a later term has begun, and DataLoss for a damaged record.
        """
        records = []
        for sequence, payload in await insist(
            self._read, PATIENCE, passes=may_be_stored_later, on_failure=self._waits
        ):
            try:
                record = TaskRecord.FromString(payload)
            except ValueError as error:
                text = f"record {sequence} of journal {self._stream!r} is damaged"
                raise DataLoss(text, reason="JOURNAL_CORRUPT") from error
            if record.term > term:
                raise Aborted(f"term {record.term} has begun", reason="STALE_TERM")
            records.append(record)
            self._next = sequence + 1
        return records

    async def append(self, record: TaskRecord) -> None:
        """Make a record durable.

        Raises Aborted (SEQUENCE_MISMATCH) if somebody else wrote, and ResultsGone.
        """
        payload = record.SerializeToString()
        stored = [each for each in record.results if each.HasField("stored")]
        # Its own: the owner of the next term may be told of the same attempts, and pins as well.
        holder = kept_holder(self._job_id, f"{record.term}-{self._next}")

        async def attempt() -> int:
            if stored:
                # Large values are kept by what stands in the journal, so they are pinned first.
                await self._pin(stored)
                await self._pin_kept(holder, stored)
            try:
                return await self._appender.append(self._stream, [payload], self._next)
            except Aborted:
                # The answer to an earlier attempt may have been lost.
                found = self._storage.read_journal(self._stream, self._next, 1)
                if [each.payload async for each in found] != [payload]:
                    raise
                return self._next + 1

        try:
            self._next = await insist(
                attempt, PATIENCE, passes=may_be_stored_later, on_failure=self._waits
            )
        except Aborted:
            # The job may have ended without this owner: nobody lets go of this any more.
            if any(each.HasField("kept") for each in stored):
                with contextlib.suppress(PhalanxError):
                    await self._storage.set_pins(holder, [])
            raise

    async def _pin(self, stored: Sequence[TaskResult]) -> None:
        holder = pins_holder(self._job_id, stored[0].attempt)
        digests = sorted({each.stored.digest for each in stored})
        try:
            await self._storage.set_pins(holder, [pb.Pin(blob=digest) for digest in digests])
        except NotFound as error:
            gone = await self._storage.missing_blobs(digests)
            if gone:
                raise ResultsGone(gone) from error
            # They came back meanwhile, by another attempt, and are young now.
            raise Unavailable(error.message, reason=error.reason) from error

    async def _pin_kept(self, holder: str, results: Sequence[TaskResult]) -> None:
        """Have what tasks have kept for others stay until the job ends. What is gone is gone: they
        do without it."""
        digests = sorted({each.kept.sha256.hex() for each in results if each.HasField("kept")})
        if not digests:
            return
        gone = frozenset(await self._storage.missing_blobs(digests))
        pins = [pb.Pin(blob=digest) for digest in digests if digest not in gone]
        if pins:
            with contextlib.suppress(NotFound):
                await self._storage.set_pins(holder, pins)

    async def _read(self) -> list[tuple[int, bytes]]:
        found = self._storage.read_journal(self._stream, self._next)
        return [(each.sequence, each.payload) async for each in found]
