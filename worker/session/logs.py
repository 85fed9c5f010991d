"""Collects what leaf processes print and hands it to control in batches."""

from __future__ import annotations

import time
from collections.abc import Callable

from phalanx.telemetry.logs import get_logger
from phalanx.v1 import coordination_service_pb2 as coordination
from worker.core.logs import Line, LineSplitter, LogLimiter
from worker.session.process import LeafProcess

_OWN_LINES_MAX = 500

_log = get_logger(__name__)

Send = Callable[[coordination.SessionRequest], None]


class LogCollector:
    """Lines of all leaf processes, by job."""

    def __init__(self, worker_id: str, send: Send) -> None:
        self._worker_id = worker_id
        self._send = send
        self._splitters: dict[tuple[LeafProcess, str], LineSplitter] = {}
        self._limiters: dict[int, LogLimiter] = {}
        self._own_lines = 0

    def hosted(self, number: int, job_id: str) -> None:
        """From now on lines with this number belong to the job."""
        self._limiters[number] = LogLimiter(job_id, self._worker_id)

    def released(self, number: int) -> None:
        """The job was let go: send what is left."""
        self.flush()
        self._limiters.pop(number, None)

    def printed(self, process: LeafProcess, level: str, data: bytes) -> None:
        """A leaf process printed something."""
        splitter = self._splitters.setdefault((process, level), LineSplitter())
        self._add(splitter.feed(data), level)

    def process_gone(self, process: LeafProcess) -> None:
        """The process has ended; its last words may lack an end of line."""
        for key in [key for key in self._splitters if key[0] is process]:
            self._add(self._splitters.pop(key).end(), key[1])

    def add(self, number: int, step: int, shard: int, level: str, text: str) -> None:
        """Add lines that the worker itself has to say about a job, such as a traceback."""
        self._add([Line(number, step, shard, line) for line in text.splitlines()], level)

    def flush(self) -> None:
        """Send what was collected; call it a few times per second."""
        for limiter in self._limiters.values():
            while (lines := limiter.take(time.time_ns())) is not None:
                self._send(coordination.SessionRequest(job_log_lines=lines))

    def _add(self, lines: list[Line], level: str) -> None:
        for line in lines:
            limiter = self._limiters.get(line.job)
            if limiter is not None:
                limiter.add(line, level, time.time_ns(), time.monotonic())
            elif line.job < 0 and self._own_lines < _OWN_LINES_MAX:
                # Said before any job was: why the process could not even start.
                self._own_lines += 1
                _log.warning("leaf_process_said", text=line.text)
