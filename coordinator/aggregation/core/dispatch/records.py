"""What is to be journalled: one record at a time, with all that came in meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Container

from phalanx.model_failures import common
from phalanx.texts import number_of
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.task_service_pb2 import FailedTry, TaskRecord, TaskResult

BATCH_BYTES = 2 * 1024 * 1024
BATCH_COUNT = 2000
QUEUE_COUNT = 8000
QUEUE_BYTES = 32 * 1024 * 1024
"""With more than this waiting for the journal nothing is handed out."""

_ENVELOPE_BYTES = 96


class Unwritten:
    """Results and failed tries that are not durable yet, in order."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._queue: deque[tuple[int, TaskResult | FailedTry]] = deque()
        self._bytes = 0
        self._under_way: TaskRecord | None = None

    def __bool__(self) -> bool:
        """Whether anything is not durable yet."""
        return bool(self._queue) or self._under_way is not None

    @property
    def full(self) -> bool:
        """Whether the journal has to catch up first."""
        return len(self._queue) >= QUEUE_COUNT or self._bytes >= QUEUE_BYTES

    def add_result(self, result: TaskResult) -> None:
        """Queue the result of a task."""
        self._add(result)

    def add_try(self, tried: FailedTry) -> None:
        """Queue a try that failed."""
        self._add(tried)

    def next(self) -> TaskRecord | None:
        """Return the record to append now; None: one is under way, or there is nothing."""
        if self._under_way is not None or not self._queue:
            return None
        record, size = TaskRecord(term=self._term), 0
        while self._queue and len(record.results) + len(record.failed_tries) < BATCH_COUNT:
            each_bytes, each = self._queue[0]
            if size and size + each_bytes > BATCH_BYTES:
                break
            self._queue.popleft()
            size += each_bytes
            if isinstance(each, TaskResult):
                record.results.append(each)
            else:
                record.failed_tries.append(each)
        self._bytes -= size
        self._under_way = record
        return record

    def written(self) -> TaskRecord:
        """The record under way is durable; return it."""
        record, self._under_way = self._under_way, None
        assert record is not None
        return record

    def refused(self, gone: Container[str]) -> list[TaskResult]:
        """The record under way cannot be made durable: forget and return its results whose values
        are gone; the rest of it comes next, before all that is queued."""
        record = self.written()
        lost = [each for each in record.results if each.stored.digest in gone]
        kept = [each for each in record.results if each.stored.digest not in gone]
        first: list[TaskResult | FailedTry] = [*record.failed_tries, *kept]
        sized = [(_size_of(each), each) for each in first]
        self._queue.extendleft(reversed(sized))
        self._bytes += sum(size for size, _ in sized)
        return lost

    def _add(self, each: TaskResult | FailedTry) -> None:
        self._queue.append((_size_of(each), each))
        self._bytes += _size_of(each)


def _size_of(each: TaskResult | FailedTry) -> int:
    """About how many bytes it takes in a record."""
    if isinstance(each, FailedTry) or each.HasField("failure"):
        return each.ByteSize() + _ENVELOPE_BYTES
    return len(each.value_json) + 4 * len(each.earlier) + _ENVELOPE_BYTES


def poisoned(task: int, failures: list[Failure]) -> Failure:
    """The failure of a task that is given up: its last one, with all workers that tried it."""
    workers = sorted({name for each in failures for name in each.worker_ids})
    last = failures[-1]
    text = (
        f"task {task} failed {number_of(len(failures), 'time')} on {', '.join(workers)}: "
        f"{last.code.lower().replace('_', ' ')}: {last.message}"
    )
    return Failure(
        code=common(each.code for each in failures) or "POISON_TASK",
        message=text,
        shard=-1,
        attempts=len(failures),
        worker_ids=workers,
        traceback=next((each.traceback for each in reversed(failures) if each.traceback), ""),
        task=task,
    )
