"""Scrubbing: all that is stored is read now and then, before anybody needs it.

What a reader would find damaged is found by then, while there is still a backup, a checkpoint or a
user's file to make it good from. A pass reads the rows and then the blobs, one fan-out folder after
another. How far it came is a record of a journal, so that a pass over a large store goes on where
it was when storage starts again; the background pass reads no faster than it is told.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial

from phalanx.errors import Aborted, DataLoss, NotFound, PhalanxError
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import StorageMetrics
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.snapshots import SCRUB_STREAM
from storage.interfaces import Backend, StoredBlob
from storage.service.operations import Operations

PREFIXES = tuple(f"{index:02x}" for index in range(256))

_TELL_S = 1.0
_FIRST_S = 60.0

_log = get_logger(__name__)


class Scrubber:
    """Reads everything: when asked, and in the background every ``interval_s`` (0: never)."""

    def __init__(
        self,
        backend: Backend,
        operations: Operations,
        metrics: StorageMetrics,
        *,
        interval_s: float,
        bytes_per_s: float,
    ) -> None:
        self._backend = backend
        self._operations = operations
        self._metrics = metrics
        self._interval_s = interval_s
        self._bytes_per_s = bytes_per_s

    async def scrub(self) -> AsyncGenerator[pb.ScrubResponse]:
        """Read everything at once; yield what is found, and now and then how far it is."""
        total = await self._scrub_rows()
        corrupt = len(total.corruptions)
        yield total
        del total.corruptions[:]
        told_s = time.monotonic()
        for prefix in PREFIXES:
            for blob in await self._list(prefix):
                _add(total, await self._scrub_blob(blob))
                if total.corruptions or time.monotonic() - told_s >= _TELL_S:
                    told_s = time.monotonic()
                    corrupt += len(total.corruptions)
                    yield total
                    del total.corruptions[:]
        self._note_pass(corrupt)
        yield total

    async def run(self) -> None:
        """Scrub in the background until cancelled; a failure is logged and tried again later."""
        if not self._interval_s:
            return
        # Soon after a start, so that one that starts often comes to an end as well.
        pause_s = min(self._interval_s / len(PREFIXES), _FIRST_S)
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._interval_s / len(PREFIXES)
            try:
                await self._go_on()
            except PhalanxError as error:
                _log.warning("scrub_failed", reason=error.reason, message=error.message)

    async def _go_on(self) -> None:
        """Scrub the next folder, and the rows before the first; note that it is done."""
        sequence, position, corrupt = await self._operations.state("scrub", self._position)
        found: list[pb.ScrubResponse] = []
        if position == 0:
            found.append(await self._scrub_rows())
        for blob in await self._list(PREFIXES[position]):
            started_s = time.monotonic()
            found.append(await self._scrub_blob(blob))
            due_s = blob.size_bytes / self._bytes_per_s - (time.monotonic() - started_s)
            await asyncio.sleep(max(due_s, 0.0))
        corrupt += sum(len(each.corruptions) for each in found)
        if position + 1 == len(PREFIXES):
            self._note_pass(corrupt)
        done = f"{position + 1} {corrupt}".encode()
        try:
            await self._operations.state("scrub", partial(self._note, sequence, done))
        except Aborted:
            _log.debug("scrubbed_elsewhere", message="another replica has done this part, too")

    def _position(self) -> tuple[int, int, int]:
        """Return the sequence of the next record, the folder that is next, and what was found."""
        sequence, last = 0, b"0 0"
        for response in self._backend.journals.read(pb.ReadJournalRequest(stream=SCRUB_STREAM)):
            sequence = response.next_sequence
            for record in response.records:
                last = record.payload
        done, corrupt = (int(number) for number in last.split())
        return (sequence, done, corrupt) if done < len(PREFIXES) else (sequence, 0, 0)

    def _note(self, sequence: int, record: bytes) -> None:
        journals = self._backend.journals
        journals.append(
            pb.AppendJournalRequest(
                stream=SCRUB_STREAM, expected_sequence=sequence, records=[record]
            )
        )
        journals.truncate(pb.TruncateJournalRequest(stream=SCRUB_STREAM, before_sequence=sequence))

    def _note_pass(self, corrupt: int) -> None:
        self._metrics.storage_scrub_corrupt_records.set(corrupt)
        self._metrics.storage_scrub_timestamp_seconds.set_to_current_time()
        _log.info("scrubbed", corruptions=corrupt)

    async def _list(self, prefix: str) -> list[StoredBlob]:
        return await self._operations.blobs("scrub", lambda: list(self._backend.blobs.scan(prefix)))

    async def _scrub_rows(self) -> pb.ScrubResponse:
        return await self._operations.blobs("scrub", self._read_rows)

    def _read_rows(self) -> pb.ScrubResponse:
        response = pb.ScrubResponse()

        def count(rows: int) -> None:
            response.rows_read = rows

        for message in self._backend.snapshots.damaged_rows(count):
            self._report(message)
            response.corruptions.add(message=message)
        return response

    async def _scrub_blob(self, blob: StoredBlob) -> pb.ScrubResponse:
        return await self._operations.blobs("scrub", lambda: self._read_blob(blob))

    def _read_blob(self, blob: StoredBlob) -> pb.ScrubResponse:
        response = pb.ScrubResponse(blobs_read=1, bytes_read=blob.size_bytes)
        try:
            reader = self._backend.blobs.open(blob.digest)
            try:
                reader.verify()
            finally:
                reader.close()
        except NotFound:
            return pb.ScrubResponse()  # it was garbage
        except DataLoss as error:
            try:
                names = list(self._backend.references.named_by(blob.digest))
            except DataLoss as damage:
                names = [f"unknown: {damage.message}"]
            self._report(f"{error.message} (named by {', '.join(names) or 'nothing'})")
            response.corruptions.add(digest=blob.digest, message=error.message, named_by=names)
        return response

    def _report(self, message: str) -> None:
        self._operations.corruption(message)


def _add(total: pb.ScrubResponse, found: pb.ScrubResponse) -> None:
    total.blobs_read += found.blobs_read
    total.bytes_read += found.bytes_read
    total.rows_read += found.rows_read
    total.corruptions.extend(found.corruptions)
