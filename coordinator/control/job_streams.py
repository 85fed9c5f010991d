"""Job logs and metric points: observations, kept per job in streams of their own.

Logs are capped at 10 MiB per job. Metric points are keyed by (step, name), so that steps computed
again after a roll-back change nothing; long series are thinned. Taking something in never waits for
storage: whoever brings it has more to say, above all that it lives.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from functools import partial

from coordinator.control.store import Store
from phalanx.errors import Aborted
from phalanx.v1.coordination_service_pb2 import JobLogLine, JobLogLines, MetricPoints
from phalanx.v1.job_pb2 import MetricPoint

LOG_LIMIT_BYTES = 10 * 1024 * 1024
LINE_LIMIT_CHARACTERS = 16 * 1024
HELD_LINES_MAX = 20_000
HELD_POINTS_MAX = 20_000
SERIES_JOBS_MAX = 100
"""Jobs whose series stay in memory; those of others are read again when they are asked for."""
RECORD_BYTES = 256 * 1024
SERIES_POINTS_MAX = 2000
NAMES_MAX = 64
FLUSH_EVERY_S = 0.3


class Series:
    """The points of one metric of one job by step; thinned by doubling the gap between steps."""

    def __init__(self) -> None:
        self._points: dict[int, MetricPoint] = {}
        self._gap = 1
        self._newest = -1

    def add(self, point: MetricPoint) -> bool:
        """Take a point; return whether it is new and should be written down."""
        known = self._points.get(point.step)
        if known is not None:
            changed = known.value != point.value
            self._points[point.step] = point
            return changed
        if self._newest >= 0 and point.step < self._newest + self._gap:
            return False
        self._points[point.step] = point
        self._newest = point.step
        if len(self._points) > SERIES_POINTS_MAX:
            self._thin()
        return True

    def points(self) -> list[MetricPoint]:
        """Return the points in the order of their steps."""
        return [self._points[step] for step in sorted(self._points)]

    def _thin(self) -> None:
        steps = sorted(self._points)
        self._points = {step: self._points[step] for step in steps[::2]}
        self._gap = max(self._gap * 2, 2 * (steps[1] - steps[0]))


class JobStreams:
    """Buffers logs and points of all jobs and writes them in the background."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lines: dict[str, deque[JobLogLine]] = {}
        self._bytes: dict[str, int] = {}
        self._series: dict[str, dict[str, Series]] = {}
        self._arrived: dict[str, deque[MetricPoint]] = {}
        self._new_points: dict[str, list[MetricPoint]] = {}
        self._next: dict[str, int] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._readers: dict[str, set[asyncio.Event]] = {}

    def add_lines(self, message: JobLogLines, member_id: str) -> None:
        """Take log lines of a job; above the bounds the newest are dropped."""
        held = self._lines.setdefault(message.job_id, deque())
        for line in message.lines:
            if len(held) >= HELD_LINES_MAX:
                return
            # Whoever sends it: a line cannot say that it is somebody else's.
            line.worker_id = member_id
            line.text = line.text[:LINE_LIMIT_CHARACTERS]
            held.append(line)

    def add_points(self, message: MetricPoints) -> None:
        """Take metric points of a job; while storage is away the oldest above a bound are lost."""
        arrived = self._arrived.setdefault(message.job_id, deque(maxlen=HELD_POINTS_MAX))
        arrived.extend(message.points)

    async def points(
        self, job_id: str, names: Iterable[str], after_step: int, max_points: int
    ) -> list[MetricPoint]:
        """Return points by step and name; evenly thinned to `max_points` per name where given."""
        series, wanted = await self._series_of(job_id), set(names)
        found: list[MetricPoint] = []
        for name in sorted(series):
            if wanted and name not in wanted:
                continue
            points = [each for each in series[name].points() if each.step > after_step]
            if 0 < max_points < len(points):
                stride = -(-len(points) // max_points)
                points = points[::-1][::stride][::-1]  # the newest always stays
            found.extend(points)
        return sorted(found, key=lambda point: (point.step, point.name))

    async def lines(self, job_id: str, from_sequence: int) -> AsyncIterator[tuple[int, JobLogLine]]:
        """Yield (sequence to go on from, line) of what is durable."""
        async for record in self._store.read(f"logs/{job_id}", from_sequence):
            for line in JobLogLines.FromString(record.payload).lines:
                yield record.sequence + 1, line

    def subscribe(self, job_id: str, wake: asyncio.Event) -> None:
        """Set `wake` whenever log lines of the job were written."""
        self._readers.setdefault(job_id, set()).add(wake)

    def unsubscribe(self, job_id: str, wake: asyncio.Event) -> None:
        """Stop setting `wake`."""
        readers = self._readers.get(job_id, set())
        readers.discard(wake)
        if not readers:
            self._readers.pop(job_id, None)

    def forget(self, job_id: str) -> None:
        """Drop what is held of a job that is removed, or has ended: it can be read again."""
        self._lines.pop(job_id, None)
        self._bytes.pop(job_id, None)
        self._series.pop(job_id, None)
        self._arrived.pop(job_id, None)
        self._new_points.pop(job_id, None)
        self._loading.pop(job_id, None)
        for stream in (f"logs/{job_id}", f"metrics/{job_id}"):
            self._next.pop(stream, None)

    async def run(self) -> None:
        """Write what is held, again and again, until somebody else leads. Raises PhalanxError."""
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            await self.flush()

    async def flush(self) -> None:
        """Write everything that is held now."""
        for job_id in list(self._lines):
            await self._write_lines(job_id)
            if not self._lines.get(job_id):
                self._lines.pop(job_id, None)
        for job_id in list(self._arrived):
            await self._store.insist(partial(self._series_of, job_id))
        for job_id in list(self._new_points):
            await self._write_points(job_id)
        self._forget_idle()

    async def _write_lines(self, job_id: str) -> None:
        held = self._lines.get(job_id, deque())
        wrote = False
        while held:
            record, size = JobLogLines(job_id=job_id), 0
            while held and size < RECORD_BYTES:
                line = held.popleft()
                size += line.ByteSize()
                record.lines.append(line)
            if not await self._has_room(job_id, record):
                continue
            await self._append(f"logs/{job_id}", record.SerializeToString())
            wrote = True
        for wake in self._readers.get(job_id, ()) if wrote else ():
            wake.set()

    async def _has_room(self, job_id: str, record: JobLogLines) -> bool:
        """Count the record; at the limit a last line says so, above it nothing is written."""
        if job_id not in self._bytes:
            self._bytes[job_id] = await self._store.insist(lambda: self._written_bytes(job_id))
        before = self._bytes[job_id]
        if before >= LOG_LIMIT_BYTES:
            return False
        self._bytes[job_id] = before + record.ByteSize()
        if self._bytes[job_id] >= LOG_LIMIT_BYTES:
            text = f"the log is full ({LOG_LIMIT_BYTES // 2**20} MiB); the rest is dropped"
            time = record.lines[-1].time_unix_nanos
            record.lines.add(time_unix_nanos=time, level="warning", text=text)
        return True

    async def _written_bytes(self, job_id: str) -> int:
        size = 0
        async for each in self._store.read(f"logs/{job_id}", 0):
            size += len(each.payload)
        return size

    async def _write_points(self, job_id: str) -> None:
        points = self._new_points.pop(job_id, [])
        for first in range(0, len(points), 2000):
            record = MetricPoints(job_id=job_id, points=points[first : first + 2000])
            await self._append(f"metrics/{job_id}", record.SerializeToString())

    async def _append(self, stream: str, payload: bytes) -> None:
        if stream not in self._next:
            self._next[stream] = await self._store.insist(lambda: self._store.next_sequence(stream))
        try:
            self._next[stream] = await self._store.append_exactly(
                stream, self._next[stream], [payload]
            )
        except Aborted as error:
            if error.reason != "SEQUENCE_MISMATCH":
                raise
            del self._next[stream]  # the stream was deleted with its job

    async def _series_of(self, job_id: str) -> dict[str, Series]:
        """The series of a job with all that has arrived; read from storage when first asked for."""
        async with self._loading.setdefault(job_id, asyncio.Lock()):
            series = self._series.pop(job_id, None)
            if series is None:
                series = await self._stored_series(job_id)
            self._series[job_id] = series  # the last one used is the last to be forgotten
            for point in self._arrived.pop(job_id, ()):
                if point.name not in series and len(series) >= NAMES_MAX:
                    continue
                if series.setdefault(point.name, Series()).add(point):
                    self._new_points.setdefault(job_id, []).append(point)
        return series

    async def _stored_series(self, job_id: str) -> dict[str, Series]:
        series: dict[str, Series] = {}
        async for record in self._store.read(f"metrics/{job_id}", 0):
            for point in MetricPoints.FromString(record.payload).points:
                series.setdefault(point.name, Series()).add(point)
        return series

    def _forget_idle(self) -> None:
        """Keep what is in memory bounded however many jobs there were."""
        for job_id in list(self._series)[: max(0, len(self._series) - SERIES_JOBS_MAX)]:
            busy = job_id in self._lines or job_id in self._arrived or job_id in self._new_points
            # A job that was removed while its series was read has no lock any more.
            loading = self._loading.get(job_id)
            if not busy and (loading is None or not loading.locked()):
                self.forget(job_id)
        for job_id in list(self._bytes)[: max(0, len(self._bytes) - SERIES_JOBS_MAX)]:
            if job_id not in self._lines and job_id not in self._series:
                self.forget(job_id)
