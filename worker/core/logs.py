"""Lines that leaf processes print, on their way to control: split, tagged, bounded.

A job that prints without end must cost neither memory nor the control plane's time: lines are cut,
a job may send a burst and then a rate, and what is dropped is counted and said.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from phalanx.texts import number_of, verb_for
from phalanx.v1 import coordination_service_pb2 as coordination

LINE_LIMIT_BYTES = 4096
BURST_LINES = 2000
LINES_PER_S = 500.0
BATCH_LINES = 200

_TAG = b"\x1e"
_TAG_LIMIT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Line:
    """One printed line; `job` is the number of the hosting, `step` and `shard` -1 where unknown."""

    job: int
    step: int
    shard: int
    text: str


class LineSplitter:
    """Turns the bytes of one pipe into lines; tags say which leaf printed what follows."""

    def __init__(self) -> None:
        self._rest = b""
        self._job, self._step, self._shard = -1, -1, -1

    def feed(self, data: bytes) -> list[Line]:
        """Add bytes; return the lines that are complete."""
        pieces = (self._rest + data).split(b"\n")
        self._rest = pieces.pop()
        if len(self._rest) > LINE_LIMIT_BYTES and not self._awaits_tag():
            pieces.append(self._rest)
            self._rest = b""
        return [line for piece in pieces for line in self._line(piece)]

    def end(self) -> list[Line]:
        """The pipe is closed: return what was not a whole line."""
        rest, self._rest = self._rest, b""
        return self._line(rest) if rest else []

    def _awaits_tag(self) -> bool:
        """Whether what is left ends in the start of a tag line; user code may write its byte."""
        at = self._rest.rfind(_TAG)
        return at >= 0 and len(self._rest) - at <= _TAG_LIMIT_BYTES

    def _line(self, piece: bytes) -> list[Line]:
        text, tag, context = piece.partition(_TAG)
        lines = []
        if text or not tag:
            cut = text[:LINE_LIMIT_BYTES].decode("utf-8", "replace")
            lines.append(Line(self._job, self._step, self._shard, cut))
        if tag:
            self._retag(context)
        return lines

    def _retag(self, context: bytes) -> None:
        try:
            job, step, shard = map(int, context.split())
        except ValueError:
            # User code wrote the tag byte itself.
            return
        self._job, self._step, self._shard = job, step, shard


class LogLimiter:
    """Collects the lines of one job and decides which go on; times are monotonic seconds."""

    def __init__(self, job_id: str, worker_id: str) -> None:
        self._job_id = job_id
        self._worker_id = worker_id
        self._tokens = float(BURST_LINES)
        self._last_s: float | None = None
        self._waiting: deque[coordination.JobLogLine] = deque()
        self._dropped = 0

    def add(self, line: Line, level: str, unix_nanos: int, now_s: float) -> None:
        """Take a line, or count it as dropped."""
        if self._last_s is not None:
            gained = (now_s - self._last_s) * LINES_PER_S
            self._tokens = min(float(BURST_LINES), self._tokens + gained)
        self._last_s = now_s
        if self._tokens < 1 or len(self._waiting) >= BURST_LINES:
            self._dropped += 1
            return
        self._tokens -= 1
        message = coordination.JobLogLine(
            time_unix_nanos=unix_nanos, worker_id=self._worker_id, level=level, text=line.text
        )
        if line.shard >= 0:
            message.shard = line.shard
            message.step = line.step
        self._waiting.append(message)

    def take(self, unix_nanos: int) -> coordination.JobLogLines | None:
        """The next batch to send, None where there is nothing."""
        if self._dropped and len(self._waiting) < BATCH_LINES:
            were = verb_for(self._dropped, "was", "were")
            text = f"{number_of(self._dropped, 'line')} {were} dropped: the job prints too much"
            self._waiting.append(
                coordination.JobLogLine(
                    time_unix_nanos=unix_nanos,
                    worker_id=self._worker_id,
                    level="warning",
                    text=text,
                )
            )
            self._dropped = 0
        if not self._waiting:
            return None
        count = min(BATCH_LINES, len(self._waiting))
        lines = [self._waiting.popleft() for _ in range(count)]
        return coordination.JobLogLines(job_id=self._job_id, lines=lines)
