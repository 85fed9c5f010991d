"""One job's ranges at run time: performs what the core asks for, and tells control about it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from coordinator.aggregation.checkpoints import PATIENCE, Part, may_be_stored_later, write_part
from coordinator.aggregation.copying import LOOK_EVERY_S, Copying
from coordinator.aggregation.core.effects import (
    Ask,
    Caught,
    Committed,
    Effect,
    Ended,
    Failed,
    Points,
    Refused,
    StartCheckpoint,
    Verified,
    Wake,
    Work,
)
from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.gauges import JobGauges
from coordinator.aggregation.step_spans import StepSpans
from phalanx.clients.storage import StorageClient
from phalanx.errors import (
    Aborted,
    FailedPrecondition,
    Internal,
    PhalanxError,
    Unavailable,
)
from phalanx.given import GivenWork
from phalanx.go_seals import opened_go
from phalanx.last_commit import LastCommit
from phalanx.rpc.patience import insist
from phalanx.telemetry.logs import get_logger
from phalanx.training.states import STATE_VECTOR
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_pb2
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, TreeNode

REPORT_EVERY_S = 0.2
COMMITS_TOLD_AFTER_A_BREAK = 4
"""A worker that dies may have delivered its part of the open round, so the first commit after its
stream broke can be one that needed nothing of it any more, and others can have copied its shards
for the next before control has noticed. One of these is the first that control counts from."""

POINTS_MAX = 20_000
POINTS_SAID_AGAIN = 500
_POINTS_PER_MESSAGE = 1000
_RATE_WINDOW_S = 2.0
_POLL_FIRST_S = 0.02
_POLL_LONGEST_S = 0.5
OTHER_PARTS_WAIT_S = 60.0
"""How long the root waits for other owners' parts before it may order the next checkpoint."""
UPLOADS_MAX = 3
"""How often the part of a last checkpoint is uploaded before the job fails of it."""

ResultT = TypeVar("ResultT")

_log = get_logger(__name__)

Report = coordination.JobReport
Send = Callable[[coordination.SessionRequest], None]

_OUTCOMES = {
    GoRecord.ACTION_STOP: Report.OUTCOME_STOPPED,
    GoRecord.ACTION_PAUSE: Report.OUTCOME_PAUSED,
    GoRecord.ACTION_FAIL: Report.OUTCOME_FAILED,
}


class HostedJob:
    """The owned ranges of one job in one term, with its streams, checkpoints and reports.

    Made in the event loop. `send` hands a message to control. While control is away (not
    `connected`) nothing is handed over: the newest report stands for all before it, and metric
    points wait here. `settled` says whether control moves the shards of the dead at once. With a
    `seal_key` workers show what they were given, and what the root decided.
    """

    def __init__(
        self,
        ranges: JobRanges,
        storage: StorageClient,
        gauges: JobGauges,
        send: Send,
        connected: Callable[[], bool] = lambda: True,
        settled: Callable[[], bool] = lambda: True,
        seal_key: bytes = b"",
    ) -> None:
        self.ranges = ranges
        self.given = GivenWork(ranges.plan, ranges.term, seal_key)
        self._seal_key = seal_key
        self.gauges = gauges
        self._storage = storage
        self._send = send
        self._connected = connected
        self._spec = JobSpec.FromString(ranges.plan.spec)
        self._started_s = time.monotonic()
        self._spans = StepSpans(ranges.plan.job_id, ranges.term)
        self._wakers: dict[object, asyncio.Event] = {}
        self._checkpoints: dict[asyncio.Task[None], int] = {}
        self._points: deque[job_pb2.MetricPoint] = deque(maxlen=POINTS_MAX)
        # Said again on the next session: a control that died may not have stored them.
        self._points_sent: deque[job_pb2.MetricPoint] = deque(maxlen=POINTS_SAID_AGAIN)
        self._commits: deque[tuple[float, int]] = deque()
        self._examples = 0
        self._last_commit = LastCommit()
        self._arrived_s: float | None = None
        #: The newest complete checkpoint; -1: none.
        self._checkpoint_step = -1
        self._steps_replayed = 0
        self._refused_shards: tuple[int, ...] = ()
        #: In every report, so that no control that comes later misses one.
        self._outvoted: list[coordination.OutvotedWorker] = []
        self._waits_for_storage: tuple[float, PhalanxError] | None = None
        """Since when a checkpoint waits, and for what."""
        self._reported: tuple[int, int] | None = None
        self._missing = False
        self._commits_to_report = 0
        self._final: Report | None = None
        self._ending: asyncio.Task[None] | None = None
        self._worker: asyncio.Task[None] | None = None
        self.copying = Copying(ranges, send, lambda: not settled(), self.given)
        self._watchman = asyncio.create_task(self._watch_round())
        self._reporter = asyncio.create_task(self._report_often())
        self._closed: asyncio.Future[PhalanxError] = asyncio.get_running_loop().create_future()

    @property
    def elapsed_s(self) -> float:
        """Time since the ranges were assigned."""
        return time.monotonic() - self._started_s

    # -- streams

    def open_stream(self, key: object, hello: pb.ExchangeHello) -> asyncio.Event:
        """Register a stream; the event is set whenever there may be something to send."""
        waker = self._wakers[key] = asyncio.Event()
        self.copying.stream_opened(key, hello, waker.set)
        self.ranges.stream_opened(key, hello.worker_id, hello.incarnation)
        return waker

    def close_stream(self, key: object) -> None:
        """Forget a stream. A broken one may be a death: the next commits are reported at once."""
        self._wakers.pop(key, None)
        self._commits_to_report = COMMITS_TOLD_AFTER_A_BREAK
        self.copying.stream_closed(key)
        self.ranges.stream_closed(key)

    def contribute(self, key: object, frame: pb.ContributionFrame, payload: memoryview) -> None:
        """Take a frame that arrived on a stream."""
        self._arrived_s = time.monotonic()
        # What is late there the ranges know themselves; a state says nothing of a contribution.
        if not self.ranges.plan.asynchronous and frame.vector != STATE_VECTOR:
            self.copying.frame(key, frame)
        self.perform(self.ranges.contribute(frame, payload, self.elapsed_s, key))

    def go_record(self, go: GoRecord) -> None:
        """Take a go record that a worker carried from the root, which has sealed it."""
        if go.term == self.ranges.term:  # else it was sealed with another key, and is refused
            go = opened_go(self._seal_key, go, self.ranges.plan.job_id)
        self.perform(self.ranges.go_record(go))
        # It may open a round without any effect, and what is missing of that can be late as well.
        self.copying.turn()

    # -- from control

    def pause(self) -> None:
        """Pause at the next step boundary."""
        self.perform(self.ranges.pause())

    def fail(self, reason: str, message: str) -> None:
        """End the term as failed."""
        self.perform(self.ranges.fail(reason, message))

    def restored(self, step: int, steps_replayed: int) -> None:
        """The ranges were loaded from the checkpoint at `step`, or begun anew (0)."""
        self._checkpoint_step = step
        self._steps_replayed = steps_replayed
        self.gauges.replayed(steps_replayed)

    def session_opened(self) -> None:
        """Control is new or back: tell it where the job is."""
        # As many as there is room for: what was never said comes before what is said again.
        room = POINTS_MAX - len(self._points)
        again = list(self._points_sent)[-room:] if room else []
        self._points.extendleft(reversed(again))
        self._points_sent.clear()
        self._flush_points()
        self._tell_that_it_waits()
        if self._final is not None:
            self._send_report(self._final)
        elif self.ranges.is_root:
            self._report()

    async def closed(self) -> None:
        """Wait until the ranges are let go, then raise what ends their streams."""
        raise await asyncio.shield(self._closed)

    async def close(self, error: PhalanxError | None = None) -> None:
        """Let the ranges go; what is being written is given up. Streams end with the error."""
        if not self._closed.done():
            gone = f"job {self.ranges.plan.job_id} is not held here any more"
            self._closed.set_result(error or Unavailable(gone, reason="RANGES_RELEASED"))
        tasks = [self._reporter, self._watchman, *self._checkpoints]
        tasks += [task for task in (self._ending, self._worker) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flush_points()
        self.gauges.ended()

    # -- effects

    def perform(self, effects: list[Effect]) -> None:
        """Do what the core asks for, in order."""
        for effect in effects:
            match effect:
                case Wake():
                    for waker in self._wakers.values():
                        waker.set()
                case Work():
                    if self._worker is None or self._worker.done():
                        self._worker = asyncio.create_task(self._work())
                case Committed():
                    self._committed(effect)
                case Refused():
                    self._refused(effect)
                case Points():
                    self._keep_points(effect)
                case StartCheckpoint():
                    self._start_checkpoint(effect)
                case Ask():
                    self.copying.ask(effect.order)
                case Verified():
                    self.gauges.verified()
                case Caught():
                    self._caught(effect)
                case Ended():
                    self._ending = asyncio.create_task(self._end(effect.go))
                case Failed():
                    self._failed(effect)
        if self._final is None and any(isinstance(effect, Caught) for effect in effects):
            # Only now: the step that was made with it would be told to be as old as the last one.
            self._report()
        if effects:
            self.copying.turn()

    async def _work(self) -> None:
        """Do what takes long, slice by slice: heartbeats and other jobs have their turn between."""
        try:
            while self.ranges.works:
                self.perform(self.ranges.work(self.elapsed_s))
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - the round could never complete any more
            _log.exception("aggregation_failed", job_id=self.ranges.plan.job_id)
            self.fail("AGGREGATION_FAILED", f"{type(error).__name__}: {error}")

    def _committed(self, effect: Committed) -> None:
        now_s = time.monotonic()
        self._last_commit.committed(self._arrived_s)
        self._examples += effect.example_count
        # The first commit after a stall ends an incident: its time is told, not a later one's.
        stalled = bool(self._commits) and now_s - self._commits[-1][0] > REPORT_EVERY_S
        self._commits.append((now_s, effect.example_count))
        while self._commits[0][0] < now_s - _RATE_WINDOW_S and len(self._commits) > 2:
            self._commits.popleft()
        self.gauges.committed(effect, now_s)
        self._spans.committed(effect, self._arrived_s)
        if self._commits_to_report or stalled:
            self._commits_to_report = max(0, self._commits_to_report - 1)
            self._report()

    def _refused(self, effect: Refused) -> None:
        """Tell who lies, once for each set of shards: it may be in every step."""
        if effect.shards == self._refused_shards:
            return
        self._refused_shards = effect.shards
        names = ", ".join(str(shard) for shard in effect.shards)
        text = f"not finite, and left out of step {effect.version}: what came of shards {names}"
        self._tell("NON_FINITE_REFUSED", text, shards=names)

    def _caught(self, effect: Caught) -> None:
        """Note who computes something else than others; control is told at once."""
        self.gauges.outvoted()
        node = effect.node
        outvoted = coordination.OutvotedWorker(
            worker_id=effect.worker_id,
            incarnation=effect.incarnation,
            step=self.ranges.step_of(max(0, effect.version)),
            node=TreeNode(first=node.first, span=node.span),
            evaluation=effect.action == GoRecord.ACTION_EVALUATE,
            sha256=effect.digest,
            majority_sha256=effect.majority,
            agreed=effect.agreed,
        )
        self._outvoted.append(outvoted)
        _log.warning(
            "worker_outvoted",
            job_id=self.ranges.plan.job_id,
            worker_id=effect.worker_id,
            step=outvoted.step,
            shard=node.first,
            sha256=effect.digest,
            majority_sha256=effect.majority,
        )

    def _verifiers_missing(self) -> coordination.VerifiersMissing | None:
        missing = self.ranges.verifiers_missing(self.elapsed_s)
        if missing is None:
            return None
        return coordination.VerifiersMissing(
            leaves=missing.leaves,
            step=self.ranges.step_of(missing.version),
            node=TreeNode(first=missing.node.first, span=missing.node.span),
            evaluation=missing.action == GoRecord.ACTION_EVALUATE,
            copies=missing.copies,
            results=missing.results,
            needed=missing.needed,
        )

    def _keep_points(self, effect: Points) -> None:
        seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
        for step, name, value in effect.points:
            if math.isfinite(value):
                point = job_pb2.MetricPoint(step=step, name=name, value=value)
                point.time.seconds, point.time.nanos = seconds, nanos
                self._points.append(point)

    def _failed(self, effect: Failed) -> None:
        _log.error(
            "job_failed",
            job_id=self.ranges.plan.job_id,
            reason=effect.reason,
            message=effect.message,
        )
        self._finish(
            self._make_report(
                Report.OUTCOME_FAILED,
                reason=effect.reason,
                message=effect.message,
                failure=job_pb2.Failure(
                    code=effect.reason, message=effect.message, step=self.ranges.version
                ),
            )
        )

    # -- the end of the term

    async def _end(self, go: GoRecord) -> None:
        """Report how the term ended, once the checkpoint that belongs to it is complete."""
        if self._checkpoints:
            await asyncio.wait(set(self._checkpoints))
        if not self.ranges.is_root or self._final is not None or self._checkpoint_step < go.version:
            return
        outcome = _OUTCOMES[go.action]
        self._finish(self._make_report(outcome, reason=go.reason))

    def _finish(self, report: Report) -> None:
        if self._final is None:
            self._final = report
            self._flush_points()
            if self._connected():
                self._send_report(report)
            # The last evaluation is as new as the end.
            self.gauges.metrics(self.ranges.decider)

    # -- checkpoints

    def _start_checkpoint(self, effect: StartCheckpoint) -> None:
        # Of one version all ranges go at once, of several versions one after the other: once the
        # final checkpoint is complete, storage takes no part of an older one any more.
        earlier = {task for task, version in self._checkpoints.items() if version < effect.version}
        task = asyncio.create_task(self._checkpoint(effect, earlier))
        self._checkpoints[task] = effect.version
        task.add_done_callback(self._checkpoints.pop)

    async def _checkpoint(self, effect: StartCheckpoint, earlier: set[asyncio.Task[None]]) -> None:
        """Write and register one range; retries until storage is back or the term is over."""
        plan = self.ranges.plan
        part = Part(
            job_id=plan.job_id,
            term=self.ranges.term,
            final=effect.final,
            range_count=plan.range_count,
            root_state=effect.root_state if effect.snapshot.range.index == 0 else "",
            spec_sha256=plan.spec_sha256,
            keep=self._spec.train.checkpoints.keep,
        )
        started_s = time.monotonic()
        try:
            if earlier:
                await asyncio.wait(earlier)
            response = await self._store_part(effect, part)
            seconds = time.monotonic() - started_s
            self.gauges.checkpointed(seconds)
            self._spans.checkpointed(effect.version, effect.snapshot.range.index, seconds)
            if response.complete or await self._completed(effect):
                self._checkpoint_step = max(self._checkpoint_step, effect.version)
        except PhalanxError as error:
            self._given_up(effect, error)
        except Exception as error:  # noqa: BLE001 - control must hear of it, whatever it is
            _log.exception("checkpoint_failed", job_id=plan.job_id, step=effect.version)
            self._given_up(effect, Internal(f"{type(error).__name__}: {error}"))
        finally:
            effect.snapshot.release()
            self.ranges.checkpoint_done()

    async def _store_part(
        self, effect: StartCheckpoint, part: Part
    ) -> storage_pb.CommitCheckpointResponse:
        """Upload and register one range. What nothing names for long is garbage to storage, and a
        registration may have to wait: a part that is gone by then is uploaded again."""
        uploads = 0
        while True:
            request = await self._insist(lambda: write_part(self._storage, effect.snapshot, part))
            uploads += 1
            if not effect.terminal:
                # Steps go on, and have to copy what this snapshot still needs.
                effect.snapshot.release()
            try:
                return await self._insist(partial(self._storage.commit_checkpoint, request))
            except FailedPrecondition as error:
                gone = effect.terminal and error.reason == "BLOB_MISSING"
                if not gone or uploads == UPLOADS_MAX:
                    raise

    async def _insist(self, attempt: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Return what `attempt` returns, however long storage is away; training goes on."""
        result = await insist(
            attempt, PATIENCE, passes=may_be_stored_later, on_failure=self._storage_away
        )
        self._storage_back()
        return result

    def _storage_away(self, error: PhalanxError, _number: int) -> None:
        _log.warning(
            "checkpoint_waits",
            job_id=self.ranges.plan.job_id,
            reason=error.reason,
            message=error.message,
        )
        if self._waits_for_storage is None:
            self._waits_for_storage = time.monotonic(), error
            self._tell_that_it_waits()

    def _tell_that_it_waits(self) -> None:
        """To each leader anew: one that has taken over knows nothing of it."""
        if self._waits_for_storage is not None:
            since_s, error = self._waits_for_storage
            self._tell(
                "STORAGE_UNAVAILABLE",
                f"a checkpoint waits, training goes on: {error.message}",
                reason=error.reason,
                waited_s=f"{time.monotonic() - since_s:.6f}",
            )

    def _storage_back(self) -> None:
        if self._waits_for_storage is not None:
            away_s = time.monotonic() - self._waits_for_storage[0]
            self._waits_for_storage = None
            self._tell(
                "STORAGE_RESTORED",
                f"checkpoints are written again after {away_s:.1f} s",
                waited_s=f"{away_s:.6f}",
            )

    def _tell(self, type_: str, message: str, **details: str) -> None:
        event = coordination.MemberEvent(
            type=type_,
            job_id=self.ranges.plan.job_id,
            message=message,
            step=max(0, self.ranges.version),
            details=details,
        )
        self._send(coordination.SessionRequest(member_event=event))

    async def _completed(self, effect: StartCheckpoint) -> bool:
        """Wait for the other ranges' parts; without an end only where the term ends with them."""
        if not self.ranges.is_root:
            return False
        job_id, key = self.ranges.plan.job_id, (self.ranges.term, effect.version)
        give_up_s = time.monotonic() + OTHER_PARTS_WAIT_S
        wait_s = _POLL_FIRST_S
        while effect.terminal or time.monotonic() < give_up_s:
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _POLL_LONGEST_S)
            manifests = await self._insist(lambda: self._storage.list_checkpoints(job_id))
            if any((each.term, each.step) == key for each in manifests):
                return True
        return False

    def _given_up(self, effect: StartCheckpoint, error: PhalanxError) -> None:
        _log.warning(
            "checkpoint_given_up",
            job_id=self.ranges.plan.job_id,
            step=effect.version,
            reason=error.reason,
            message=error.message,
        )
        # The root waits for the part of every range, so each owner has to say that none will come.
        # A fence says that the term is over, and then nothing is left to be said about it.
        if effect.terminal and not isinstance(error, Aborted):
            message = f"the last checkpoint cannot be stored: {error.message}"
            self._failed(Failed("CHECKPOINT_FAILED", message))

    # -- reports

    async def _watch_round(self) -> None:
        """Nothing happens when a shard does not come, so somebody has to look."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.copying.look()
            self.perform(self.ranges.look(self.elapsed_s))

    async def _report_often(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self._flush_points()
            if self.ranges.is_root and self._final is None:
                moved = (self.ranges.version, self._checkpoint_step) != self._reported
                missing = self.ranges.verifiers_missing(self.elapsed_s) is not None
                # Where nothing moves without them, nobody else would tell.
                waits = self.copying.waits_for_starts(self.elapsed_s) or missing or self._missing
                if moved or waits:
                    self._missing = missing
                    self._report()
                self.gauges.metrics(self.ranges.decider)

    def _report(self) -> None:
        if not self._connected():
            return
        self._reported = (self.ranges.version, self._checkpoint_step)
        report = self._make_report(Report.OUTCOME_RUNNING)
        self._send_report(report)

    def _send_report(self, report: Report) -> None:
        aged = self._last_commit.aged(report)
        self._send(coordination.SessionRequest(job_report=aged))

    def _make_report(
        self,
        outcome: Report.Outcome.ValueType,
        *,
        reason: str = "",
        message: str = "",
        failure: job_pb2.Failure | None = None,
    ) -> Report:
        decider = self.ranges.decider
        metrics = {} if decider is None else decider.metrics
        return Report(
            job_id=self.ranges.plan.job_id,
            term=self.ranges.term,
            outcome=outcome,
            reason=reason,
            message=message,
            step=max(0, self.ranges.version),
            epoch=0.0 if decider is None else decider.epoch,
            examples=0 if decider is None else decider.examples,
            examples_per_second=self._examples_per_s(),
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            checkpoint_step=max(0, self._checkpoint_step),
            failure=failure,
            examples_lost=self.ranges.examples_lost,
            examples_doubled=self.ranges.examples_doubled,
            steps_replayed=self._steps_replayed,
            late_workers=self.copying.late_workers(self.elapsed_s),
            outvoted_workers=self._outvoted,
            verifiers_missing=self._verifiers_missing(),
            best=None if decider is None or decider.best is None else decider.best.message(),
        )

    def _examples_per_s(self) -> float:
        if len(self._commits) < 2:
            return 0.0
        seconds = self._commits[-1][0] - self._commits[0][0]
        count = sum(count for _, count in self._commits) - self._commits[0][1]
        return count / seconds if seconds > 0 else 0.0

    def _flush_points(self) -> None:
        while self._points and self._connected():
            count = min(len(self._points), _POINTS_PER_MESSAGE)
            points = [self._points.popleft() for _ in range(count)]
            self._points_sent.extend(points)
            message = coordination.MetricPoints(job_id=self.ranges.plan.job_id, points=points)
            self._send(coordination.SessionRequest(metric_points=message))
