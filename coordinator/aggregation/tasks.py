"""One job's tasks at run time: performs what the dispatcher wants, and tells control about it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from coordinator.aggregation.checkpoints import PATIENCE, may_be_stored_later
from coordinator.aggregation.core.dispatch.dispatcher import INDEPENDENT, Dispatcher
from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Durable,
    Event,
    Failed,
    Finished,
    Moved,
    PauseAsked,
    Paused,
    Send,
    Tick,
    ValuesGone,
    WorkerClosed,
)
from coordinator.aggregation.task_journal import ResultsGone, TaskJournal
from phalanx.clients.storage import StorageClient
from phalanx.errors import Aborted, Internal, PhalanxError, ResourceExhausted, Unavailable
from phalanx.given import GivenWork
from phalanx.last_commit import LastCommit
from phalanx.programs import graph_of
from phalanx.rpc.patience import insist
from phalanx.tasks import OUTCOME, TASKS_DONE, attempts_max, failures_max, is_program
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import AggregatorMetrics
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_pb2
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import TaskRecord, WorkResponse
from phalanx.v1.training_pb2 import JobPlan

TICK_S = 0.05
REPORT_EVERY_S = 0.2
TELL_EVERY_S = 1.0
OUTBOX_MAX = 1000
"""Messages that wait for one worker to read."""

INPUTS_BYTES = 1024 * 1024
"""A message with the inputs of more tasks is cut in two."""

_RATE_WINDOW_S = 2.0
_SPECULATION = ("late", "silent")

_log = get_logger(__name__)

Report = coordination.JobReport
SendToControl = Callable[[coordination.SessionRequest], None]


@dataclass(frozen=True)
class TaskRange:
    """What stands for the ranges of a job's parameters: all of its tasks, with one owner."""

    plan: JobPlan
    term: int
    range_indexes: tuple[int, ...] = (0,)
    version: int = 0


class Outbox:
    """What one worker is to be told on one stream.

    The dispatcher's credit bounds the tasks in it. A worker that says more and more and reads
    nothing of what it is answered loses its stream; the next one begins with what it holds then.
    """

    def __init__(self) -> None:
        self.filled = asyncio.Event()
        self._full = asyncio.Event()
        self._messages: deque[WorkResponse] = deque()

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, effect: Send) -> None:
        """Add a message, if there is room: without it the stream ends."""
        if len(self._messages) >= OUTBOX_MAX:
            self._full.set()
            return
        self._messages.extend(_messages(effect))
        self.filled.set()

    async def next(self) -> WorkResponse:
        """Wait for the next message."""
        while not self._messages:
            self.filled.clear()
            await self.filled.wait()
        return self._messages.popleft()

    async def overflow(self) -> None:
        """Wait until there was no room. Raises ResourceExhausted then."""
        await self._full.wait()
        raise ResourceExhausted("the worker does not read what it is sent")


def _messages(effect: Send) -> Iterator[WorkResponse]:
    """Yield what is said to a worker; inputs may make it long."""
    message = WorkResponse(first_attempt=effect.first_attempt, settled=effect.settled)
    size = 0
    for attempt, task in enumerate(effect.tasks, effect.first_attempt):
        if size >= INPUTS_BYTES:
            yield message
            message, size = WorkResponse(first_attempt=attempt), 0
        message.tasks.append(task)
        if effect.inputs:
            inputs = message.inputs.add(values=effect.inputs[attempt - effect.first_attempt])
            size += inputs.ByteSize()
    yield message


class HostedTasks:
    """The tasks of one job in one term. Make it with `open`, in the event loop."""

    def __init__(
        self,
        plan: JobPlan,
        term: int,
        dispatcher: Dispatcher,
        journal: TaskJournal,
        storage: StorageClient,
        metrics: AggregatorMetrics,
        send: SendToControl,
        connected: Callable[[], bool],
        seal_key: bytes = b"",
    ) -> None:
        self.ranges = TaskRange(plan, term)
        self.given = GivenWork(plan, term, seal_key)
        self.dispatcher = dispatcher
        self._journal = journal
        self._storage = storage
        self._metrics = metrics
        self._admitted = metrics.per_job.admits(plan.job_id)
        self._send = send
        self._connected = connected
        self._outboxes: dict[int, Outbox] = {}
        self._sessions = 0
        self._commits: deque[tuple[float, int]] = deque()
        self._last_commit = LastCommit()
        self._reported: tuple[int, int, frozenset[str]] | None = None
        self._told_s = 0.0
        self._final: Report | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._closed: asyncio.Future[PhalanxError] = asyncio.get_running_loop().create_future()
        if self._admitted:
            metrics.per_job.resume(plan.job_id)
            metrics.task_round_trip_seconds.labels(plan.job_id)  # counted from zero

    @classmethod
    async def open(
        cls,
        plan: JobPlan,
        term: int,
        storage: StorageClient,
        metrics: AggregatorMetrics,
        send: SendToControl,
        connected: Callable[[], bool],
        seal_key: bytes = b"",
    ) -> HostedTasks:
        """Read what is done and begin the term in the journal. Raises PhalanxError."""
        spec = JobSpec.FromString(plan.spec)
        graph = graph_of(plan) if is_program(spec) else INDEPENDENT
        total = graph.count or len(spec.tasks.arguments)
        waits = partial(_journal_waits, plan.job_id)
        journal = TaskJournal(storage, plan.job_id, waits)
        records: list[TaskRecord] = []
        while True:
            records += await journal.read(term)
            dispatcher = Dispatcher(total, term, attempts_max(spec), failures_max(spec), graph)
            for record in records:
                dispatcher.restore(record)
            try:
                await journal.append(dispatcher.begin())
            except Aborted:
                continue  # the owner before was still writing: its records count
            break
        return cls(plan, term, dispatcher, journal, storage, metrics, send, connected, seal_key)

    def begin(self) -> None:
        """Start to hand tasks out."""
        self._spawn(self._tick())
        self._spawn(self._report_often())
        self.handle(Tick())

    # -- streams

    def open_stream(self) -> tuple[int, Outbox]:
        """Register a stream; return the number of its session and what is to be sent on it."""
        self._sessions += 1
        outbox = self._outboxes[self._sessions] = Outbox()
        return self._sessions, outbox

    def close_stream(self, session: int) -> None:
        """A stream broke: what its worker had goes to others."""
        del self._outboxes[session]
        self.handle(WorkerClosed(session))

    async def closed(self) -> None:
        """Wait until the tasks are let go, then raise what ends their streams."""
        raise await asyncio.shield(self._closed)

    # -- control

    def session_opened(self) -> None:
        """Control is new or back: tell it where the job is."""
        if self._final is not None:
            self._send_report(self._final)
        else:
            self._report()

    def pause(self) -> None:
        """Hand out nothing more and end the term."""
        self.handle(PauseAsked())

    def fail(self, reason: str, message: str) -> None:
        """End the term as failed."""
        failure = job_pb2.Failure(code=reason, message=message, shard=-1)
        self._finish(Report.OUTCOME_FAILED, reason, message, failure)

    async def close(self, error: PhalanxError | None = None) -> None:
        """Let the tasks go; streams end with the error."""
        if not self._closed.done():
            gone = f"job {self.ranges.plan.job_id} is not held here any more"
            self._closed.set_result(error or Unavailable(gone, reason="RANGES_RELEASED"))
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._journal.close()
        if self._admitted:
            self._metrics.per_job.end(self.ranges.plan.job_id, time.monotonic())

    # -- the dispatcher

    def handle(self, event: Event) -> None:
        """Tell the dispatcher and do what it wants."""
        if self._closed.done():
            return
        try:
            effects = self.dispatcher.handle(event, time.monotonic())
        except Exception as error:  # noqa: BLE001 - half of a decision may be taken
            _log.exception("dispatch_failed", job_id=self.ranges.plan.job_id)
            self.fail("DISPATCH_FAILED", f"{type(error).__name__}: {error}")
            return
        for effect in effects:
            match effect:
                case Send():
                    outbox = self._outboxes.get(effect.session)
                    if outbox is not None:
                        outbox.add(effect)
                case Append():
                    self._spawn(self._append(effect.record))
                case Durable() if self._admitted:
                    self._observe(effect.round_trips_s)
                case Moved():
                    self._moved(effect)
                case Finished():
                    self._spawn(self._succeed())
                case Failed():
                    failure = effect.failure
                    self._finish(Report.OUTCOME_FAILED, failure.code, failure.message, failure)
                case Paused():
                    self._finish(Report.OUTCOME_PAUSED, "PAUSE_REQUESTED")

    async def _append(self, record: TaskRecord) -> None:
        try:
            await self._journal.append(record)
        except Aborted as error:
            # A later term has begun: nothing that is said here counts any more.
            _log.warning("tasks_fenced", job_id=self.ranges.plan.job_id, message=error.message)
            if not self._closed.done():
                self._closed.set_result(Aborted(error.message, reason="STALE_TERM"))
            return
        except ResultsGone as error:
            _log.warning("results_gone", job_id=self.ranges.plan.job_id, message=str(error))
            self.handle(ValuesGone(error.digests))
            return
        except Exception as error:  # noqa: BLE001 - control must hear of it
            _log.exception("results_not_journalled", job_id=self.ranges.plan.job_id)
            known = error if isinstance(error, PhalanxError) else Internal(repr(error))
            self.fail("RESULTS_NOT_JOURNALLED", known.message)
            return
        now_s = time.monotonic()
        self._last_commit.committed()
        self._commits.append((now_s, len(record.results)))
        while self._commits[0][0] < now_s - _RATE_WINDOW_S and len(self._commits) > 2:
            self._commits.popleft()
        self.handle(Appended())

    def _observe(self, round_trips_s: Iterable[float]) -> None:
        histogram = self._metrics.task_round_trip_seconds.labels(self.ranges.plan.job_id)
        for seconds in round_trips_s:
            histogram.observe(seconds)

    def _moved(self, effect: Moved) -> None:
        """Tell of tasks that others run as well, at most once a second."""
        _log.info(
            "tasks_moved",
            job_id=self.ranges.plan.job_id,
            cause=effect.cause,
            tasks=len(effect.tasks),
            worker_id=effect.worker_id,
        )
        now_s = time.monotonic()
        if effect.cause not in _SPECULATION or now_s - self._told_s < TELL_EVERY_S:
            return
        self._told_s = now_s
        event = coordination.MemberEvent(
            type="SPECULATION_STARTED",
            job_id=self.ranges.plan.job_id,
            message=f"{number_of(len(effect.tasks), 'task')} of {effect.worker_id}, "
            f"{'which takes long' if effect.cause == 'late' else 'which says nothing'}, "
            "may be run by others as well",
            details={
                "cause": effect.cause,
                "tasks": ",".join(str(task) for task in effect.tasks[:20]),
                "worker_id": effect.worker_id,
            },
        )
        if self._connected():
            self._send(coordination.SessionRequest(member_event=event))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.handle(Tick())

    # -- the end

    async def _succeed(self) -> None:
        """Register the final manifest, which is the job's success, and report it."""
        plan, dispatcher = self.ranges.plan, self.dispatcher
        document: dict[str, Any] = {
            "metrics": self._numbers(),
            "stop_reason": TASKS_DONE,
            "tasks": dispatcher.total,
            "done": dispatcher.done,
        }
        if dispatcher.outcome is not None:
            document[OUTCOME] = dispatcher.outcome.digest
        summary = json.dumps(document).encode()

        async def attempt() -> None:
            digest = await self._storage.put_blob(summary)
            request = storage_pb.CommitCheckpointRequest(
                job_id=plan.job_id,
                term=self.ranges.term,
                step=dispatcher.total,
                final=True,
                range_count=1,
                part=storage_pb.CheckpointPart(
                    element_count=dispatcher.total, digest=digest, size_bytes=len(summary)
                ),
                root_state=summary.decode(),
                spec_sha256=plan.spec_sha256,
                keep=1,
            )
            await self._storage.commit_checkpoint(request)

        try:
            await insist(
                attempt,
                PATIENCE,
                passes=may_be_stored_later,
                on_failure=partial(_journal_waits, plan.job_id),
            )
        except Aborted:
            return  # the term is over: nothing is left to be said about it
        except PhalanxError as error:
            self.fail("CHECKPOINT_FAILED", f"the end cannot be stored: {error.message}")
            return
        self._finish(Report.OUTCOME_STOPPED, TASKS_DONE)

    def _finish(
        self,
        outcome: Report.Outcome.ValueType,
        reason: str,
        message: str = "",
        failure: job_pb2.Failure | None = None,
    ) -> None:
        if self._final is not None:
            return
        self._final = self._make_report(outcome)
        self._final.reason, self._final.message = reason, message
        if failure is not None:
            self._final.failure.CopyFrom(failure)
        if self._connected():
            self._send_report(self._final)

    # -- reports

    async def _report_often(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            dispatcher = self.dispatcher
            state = self._state()
            if self._final is None and state != self._reported:
                self._report()
            if self._admitted:
                done = dispatcher.done + dispatcher.given_up
                self._metrics.job_step.labels(self.ranges.plan.job_id).set(done)

    def _state(self) -> tuple[int, int, frozenset[str]]:
        """What is reported whenever it is not what it was."""
        dispatcher = self.dispatcher
        late = frozenset(dispatcher.late_workers())
        return dispatcher.done + dispatcher.given_up, dispatcher.failed_tries, late

    def _report(self) -> None:
        if not self._connected():
            return
        self._reported = self._state()
        report = self._make_report(Report.OUTCOME_RUNNING)
        self._send_report(report)

    def _send_report(self, report: Report) -> None:
        aged = self._last_commit.aged(report)
        self._send(coordination.SessionRequest(job_report=aged))

    def _make_report(self, outcome: Report.Outcome.ValueType) -> Report:
        return Report(
            job_id=self.ranges.plan.job_id,
            term=self.ranges.term,
            outcome=outcome,
            step=self.dispatcher.done + self.dispatcher.given_up,
            examples=self.dispatcher.done,
            examples_per_second=self._per_second(),
            metrics=self._numbers(),
            late_workers=[
                coordination.LateWorker(worker_id=name, late_s=late_s)
                for name, late_s in self.dispatcher.late_workers().items()
            ],
        )

    def _numbers(self) -> dict[str, float]:
        return {
            "tasks/given_up": float(self.dispatcher.given_up),
            "tasks/failed_tries": float(self.dispatcher.failed_tries),
        }

    def _per_second(self) -> float:
        if len(self._commits) < 2:
            return 0.0
        seconds = self._commits[-1][0] - self._commits[0][0]
        count = sum(count for _, count in self._commits) - self._commits[0][1]
        return count / seconds if seconds > 0 else 0.0

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _journal_waits(job_id: str, error: PhalanxError, number: int) -> None:
    say = _log.warning if number == 1 else _log.debug
    say("tasks_wait_for_storage", job_id=job_id, reason=error.reason, message=error.message)
