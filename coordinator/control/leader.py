"""One leadership: the core with everything that performs its effects.

Effects are performed in order, each after the record that it depends on is durable (see
`core.effects`). Everything here runs in one event loop; `dispatch` never waits.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from typing import Any

from google.protobuf.message import Message

from coordinator.control.config import ControlConfig
from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core import membership, verbs
from coordinator.control.core.clock import Instant
from coordinator.control.core.facts import Facts
from coordinator.control.core.lifecycle import CANCELLED, SUCCEEDED
from coordinator.control.core.machine import handle
from coordinator.control.core.state import Core
from coordinator.control.core.views import job_view, progress_view
from coordinator.control.event_log import EventLog
from coordinator.control.gauges import Gauges
from coordinator.control.job_streams import JobStreams
from coordinator.control.journal import JournalWriter
from coordinator.control.operations import Operations
from coordinator.control.pins import unclaimed
from coordinator.control.sessions import MemberSession, Sessions
from coordinator.control.store import Store
from coordinator.control.task_results import read_results
from coordinator.control.watching import WatchHub
from phalanx.errors import Aborted, PhalanxError, Unavailable, no_job
from phalanx.keys.caller import Service
from phalanx.quota_file import QuotaFile
from phalanx.specs.parts import all_reduces
from phalanx.telemetry import traces
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.control_journal_pb2 import ControlRecord, RememberedRequest
from phalanx.v1.job_pb2 import Event, Job, Progress
from phalanx.v1.task_service_pb2 import TaskResult

TICK_S = 0.1
ANSWER_TIMEOUT_S = 60.0
REMOVAL_WAIT_S = 2.0
WAITING_MAX = 50_000
"""Effects that may wait for their records while storage takes none; callers are sent away from half
as many on."""
CUT_OFF = (
    "this control process has not reached storage for longer than its lease: another one may "
    "lead by now, and know of more"
)
"""Why a list may lack something."""

_log = get_logger(__name__)


def leads_no_more() -> Unavailable:
    """The error for members and callers of a leadership that has ended."""
    return Unavailable(
        "this control process leads no more; try again", reason="NOT_LEADER", retry_after_s=0.2
    )


def now() -> Instant:
    """Read both clocks."""
    return Instant(time.monotonic(), time.time_ns())


class Leader:
    """The state and the tasks of one leadership; `failed` is set when it cannot go on."""

    def __init__(
        self,
        config: ControlConfig,
        store: Store,
        gauges: Gauges,
        *,
        generation: int,
        replayed: tuple[Facts, Facts],
        control_sequence: tuple[int, int],
        event_sequence: int,
        submitting: Collection[str] = (),
        history: int | None = None,
        quotas: QuotaFile | None = None,
    ) -> None:
        live, self.durable = replayed
        self._config = config
        self._store = store
        self._gauges = gauges
        self.core = Core(config.core(), generation, live, history)
        self.sessions = Sessions()
        self.watchers = WatchHub()
        self.event_log = EventLog(store, event_sequence)
        self.streams = JobStreams(store)
        self.failed: asyncio.Future[PhalanxError] = asyncio.get_running_loop().create_future()
        self._journal = JournalWriter(
            store,
            generation=generation,
            next_sequence=control_sequence[0],
            records_read=control_sequence[1],
            durable=self.durable,
            snapshot_every=config.snapshot_every_records,
            on_durable=self._on_durable,
            observe_append_s=gauges.observe_append,
        )
        self._operations = Operations(store, self.durable)
        self._submitting = submitting
        self._quotas = quotas or QuotaFile(None)
        self._quotas_version = 0
        self._durable_index = 0
        self._waiting: deque[fx.Effect] = deque()
        self._to_publish: set[fx.Publish] = set()
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._tokens = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._removals: dict[str, asyncio.Task[Any]] = {}
        self._storage_lost_s: float | None = None

    # -- life -------------------------------------------------------------------------------

    def start(self, lost: ev.LostLeader | None = None) -> None:
        """Begin to lead, in the place of a leader that was lost if there was one."""
        for work in (self._journal.run, self.event_log.run, self.streams.run):
            self._spawn(work(), vital=True)
        self._spawn(self._tick(), vital=True)
        self._spawn(self._collect_garbage(), vital=False)
        self._spawn(self._clear_up(), vital=False)
        self._store.on_change = self._storage_changed
        self.look_at_quotas()
        self.dispatch(ev.Led(self._config.id, lost))
        if not self._store.available:
            self._storage_changed(False)

    async def stop(self, error: PhalanxError) -> None:
        """Stop leading: members and callers are sent away, what is not durable is forgotten.

        Nothing is decided any more: storage would take it for the next leadership's.
        """
        if not self.failed.done():
            self.failed.set_result(error)
        self._store.on_change = lambda _: None
        self.watchers.close(error)
        self.sessions.end_all(error)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settle(self, timeout_s: float) -> None:
        """Give what is decided and observed a little time to become durable."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._journal.drained()
                await self.event_log.flushed(timeout_s)
                await self.streams.flush()
        except (TimeoutError, PhalanxError):
            _log.warning("stopped_before_all_was_written", records=self._journal.lag)

    # -- events in --------------------------------------------------------------------------

    def dispatch(self, event: ev.Event) -> None:
        """Hand one event to the core and perform what follows as far as it may be performed."""
        if self.failed.done():
            return
        try:
            effects = handle(self.core, event, now())
        except Exception as error:  # noqa: BLE001 - a defect must not leave half a decision behind
            _log.exception("core_failed", event_type=type(event).__name__)
            self._fail(Unavailable(f"control restarts after a defect: {type(error).__name__}"))
            return
        for effect in effects:
            if isinstance(effect, fx.Persist):
                self._journal.append(effect.index, effect.record)
            elif effect.after <= self._durable_index:
                self._perform(effect)
            else:
                self._hold(effect)
        self._check_room()

    def look_at_quotas(self) -> None:
        """Take note of what the file of quotas says by now."""
        version, namespaces = self._quotas.read()
        if version != self._quotas_version:
            self._quotas_version = version
            self.dispatch(ev.QuotasChanged(namespaces))

    async def request(self, make: Callable[[int], ev.Event]) -> Message:
        """Hand a caller's event to the core; return the answer once it is durable.

        Raises PhalanxError: the core's refusal, or Unavailable while storage is away, while another
        process may lead, and once this leadership has ended.
        """
        self.check_storage()
        self._check_lease()  # a refusal is told without storage
        if self.failed.done():
            raise leads_no_more()
        self.look_at_quotas()
        token = next(self._tokens)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answers[token] = answer
        try:
            self.dispatch(make(token))
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise _undecided() from None
        finally:
            del self._answers[token]

    async def answered_before(self, request: RememberedRequest) -> Message | None:
        """Return the answer to an earlier call with this request id, once that call is durable.

        Raises AlreadyExists if the id stands for another request, and Unavailable while storage
        is away and once this leadership has ended.
        """
        # Takes note of the time, and of a clock that was set.
        self.dispatch(ev.Tick())
        answer = verbs.first_answer(self.core, request)
        if answer is not None:
            self.check_storage()
            await self._all_durable()
        return answer

    async def removed(self, job_id: str) -> None:
        """Wait until storage has forgotten a deleted job: what that has used can be deleted then.

        Not for long: the deletion is durable, and storage may be away.
        """
        if job_id in self._removals:
            await asyncio.wait([self._removals[job_id]], timeout=REMOVAL_WAIT_S)

    def member_came(self, session: MemberSession, held: Iterable[str]) -> None:
        """A member is here; of the jobs that it says it has it may speak if that was believed."""
        for job_id in held:
            if self._takes_part(session, job_id):
                self.sessions.told(session, job_id)

    def _takes_part(self, session: MemberSession, job_id: str) -> bool:
        is_worker = session.service is Service.WORKER
        return membership.takes_part(self.core, job_id, session.member_id, is_worker)

    def _may_speak(self, session: MemberSession, kind: str, job_id: str) -> bool:
        """Whether a member may say this of a job; one that was never given it is not heard.

        The session goes on: under a new leader it can be late news of a job that was let go. The
        log tells of the first message of each kind, or whoever floods could fill it.
        """
        if session.caller.open_cluster or kind == "worker_job_released":
            return True
        known = self._takes_part(session, job_id) or self.sessions.was_told(session, job_id)
        facts = self.durable.jobs.get(job_id)
        if kind == "metric_points" and facts is not None:
            # Only owners of ranges have them.
            is_worker = session.service is Service.WORKER
            known = known and all_reduces(facts.spec.train) == is_worker
        if not known and kind not in session.unheard:
            session.unheard.add(kind)
            _log.warning(
                "member_not_heard",
                member_id=session.member_id,
                caller=session.caller.name,
                field=f"{kind}.job_id",
                job_id=job_id[:128],
                reason="NOT_YOURS",
            )
        return known

    def member_said(self, session: MemberSession, message: pb.SessionRequest) -> None:
        """Take in a message of a member; logs and points go past the core."""
        kind = message.WhichOneof("message")
        job_id = getattr(getattr(message, kind), "job_id", "") if kind is not None else ""
        if kind is not None and job_id and not self._may_speak(session, kind, job_id):
            return
        if kind == "job_log_lines":
            if message.job_log_lines.job_id in self.durable.jobs:
                self.streams.add_lines(message.job_log_lines, session.member_id)
        elif kind == "metric_points":
            if message.metric_points.job_id in self.durable.jobs:
                self.streams.add_points(message.metric_points)
        elif kind == "heartbeat":
            answer = pb.SessionResponse(
                generation=self.core.generation, heartbeat_answer=pb.HeartbeatAnswer()
            )
            self.sessions.send(session.number, answer)
        if kind is not None:
            self.dispatch(ev.MemberSaid(session.number, message))

    # -- looking ----------------------------------------------------------------------------

    def job_view(self, job_id: str) -> Job:
        """Return a job as far as it is durable. Raises NotFound, and Unavailable where another
        process may lead by now and this one has not found out yet."""
        self._check_lease()
        if job_id not in self.durable.jobs:
            # Cut off from storage: somebody else may lead by now, and may have taken it.
            self.check_storage()
            raise no_job(job_id)
        return self._view(job_id)

    def incomplete(self) -> str:
        """Return why what is listed may lack something; empty as long as nobody else can lead.

        Nobody can before the lease has run out by this process's own clock. Raises Unavailable as
        `job_view` does.
        """
        self._check_lease()
        return CUT_OFF if self._lapsed() else ""

    def _view(self, job_id: str) -> Job:
        runtime = self.core.jobs.get(job_id)
        return job_view(self.durable.jobs[job_id], runtime, self.core.generation)

    def progress(self, job_id: str) -> Progress:
        """Return the progress of a job."""
        facts, runtime = self.durable.jobs.get(job_id), self.core.jobs.get(job_id)
        if facts is None or runtime is None:
            return Progress()
        return progress_view(facts, runtime)

    def task_results(self, job_id: str, wanted: Collection[int]) -> AsyncIterator[list[TaskResult]]:
        """Yield what came of a job's tasks so far."""
        return read_results(self._store, job_id, wanted)

    def check_storage(self) -> None:
        """Raise Unavailable while nothing can be made durable."""
        crowded = len(self._waiting) >= WAITING_MAX // 2
        if not self._store.available or self._journal.full or crowded:
            raise Unavailable(
                "storage does not answer, or takes nothing because its disk is full, so nothing "
                "new can be decided; try again soon",
                reason="STORAGE_UNAVAILABLE",
                retry_after_s=1.0,
            )

    def _check_lease(self) -> None:
        """Raise Unavailable where the lease has run out and storage was not heard of since, as
        after a pause: soon it tells who leads. Where it is known to be away, nothing may tell for
        long, and people are shown what is known."""
        if self._lapsed() and self._store.available:
            raise leads_no_more()

    def _lapsed(self) -> bool:
        return time.monotonic() - self._store.lease_confirmed_s > self._config.lease_ttl_s

    def superseded(self, error: Aborted) -> Unavailable:
        """Storage refused a write of this generation: stop leading; return what callers are told.

        The fence is between control and storage. A caller only has to try again, elsewhere.
        """
        self._fail(Unavailable(error.message, reason=error.reason))
        return leads_no_more()

    async def _all_durable(self) -> None:
        drained = asyncio.ensure_future(self._journal.drained())
        try:
            done, _ = await asyncio.wait(
                (drained, self.failed),
                timeout=ANSWER_TIMEOUT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            drained.cancel()
        if drained not in done:
            raise leads_no_more() if self.failed in done else _undecided()

    # -- effects out ------------------------------------------------------------------------

    def _on_durable(self, index: int, record: ControlRecord) -> None:
        """A record is safe: perform what waited for it, in order."""
        self._durable_index = index
        self._after_record(record)
        kept: deque[fx.Effect] = deque()
        waiting, self._waiting = self._waiting, kept
        for effect in waiting:
            assert not isinstance(effect, fx.Persist)
            if effect.after <= index:
                if isinstance(effect, fx.Publish):
                    self._to_publish.discard(effect)
                self._perform(effect)
            else:
                kept.append(effect)

    def _hold(self, effect: fx.Effect) -> None:
        """Let an effect wait for its record."""
        if isinstance(effect, fx.Publish):
            if effect in self._to_publish:
                return  # it shows how things are by then, with all that came meanwhile
            self._to_publish.add(effect)
        self._waiting.append(effect)

    def _check_room(self) -> None:
        """End a leadership that has decided more than it may hold, as if it had been killed.

        Nobody was told of what is lost with it. Members go on by themselves, and are asked what
        they hold by whoever leads when storage is back.
        """
        overfull = self._journal.overfull or len(self._waiting) >= WAITING_MAX
        if overfull and (self._journal.stuck or not self._store.available):
            text = (
                f"storage has been away for so long that {self._journal.lag} decisions wait for "
                "it, with all that follows from them; control decides again when it is back"
            )
            self._fail(Unavailable(text, reason="STORAGE_UNAVAILABLE", retry_after_s=1.0))

    def _perform(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Send():
                self.sessions.send(effect.session, effect.message)
            case fx.Close():
                self.sessions.end(effect.session, effect.error)
            case fx.Answer():
                self._answer(effect)
            case fx.Emit():
                self.event_log.append(effect.event)
                self._gauges.told(effect.event.type)
                self._trace(effect.event)
                _log.info(
                    "event",
                    type=effect.event.type,
                    job_id=effect.event.job_id,
                    worker_id=effect.event.worker_id,
                    text=effect.event.message,
                )
            case fx.Publish():
                self._publish(effect)
            case fx.RaiseTerm() | fx.ReadRow() | fx.WriteModel():
                self._spawn(self._operate(effect), vital=True)
            case fx.RemoveJob():
                self.streams.forget(effect.job_id)
                removal = self._spawn(self._remove(effect.job_id), vital=False)
                self._removals[effect.job_id] = removal
                removal.add_done_callback(lambda _: self._removals.pop(effect.job_id, None))
            case fx.Observe():
                self._gauges.observe(effect)
            case fx.SuspectSelf():
                self._fail(Unavailable(f"a member knows generation {effect.generation}"))

    def _trace(self, event: Event) -> None:
        tracing = traces.active()
        if tracing is not None:
            from coordinator.control.incident_spans import trace_incident

            trace_incident(tracing, event)

    def _answer(self, effect: fx.Answer) -> None:
        answer = self._answers.get(effect.token)
        if answer is None or answer.done():
            return
        if isinstance(effect.response, PhalanxError):
            answer.set_exception(effect.response)
        else:
            answer.set_result(effect.response)

    def _publish(self, effect: fx.Publish) -> None:
        if not self.watchers.watched(effect.job_id):
            return
        if effect.progress_only:
            self.watchers.progressed(effect.job_id)
        elif effect.job_id in self.durable.jobs:
            self.watchers.changed(effect.job_id, self._view(effect.job_id))
        else:
            self.watchers.changed(effect.job_id, None)

    def _after_record(self, record: ControlRecord) -> None:
        """What follows from a durable fact whoever decided it."""
        changed = record.job_changed
        is_change = record.WhichOneof("fact") == "job_changed"
        if is_change and changed.state in (SUCCEEDED, CANCELLED):
            self._spawn(self._operations.release_pins(changed.job_id), vital=False)

    async def _operate(self, effect: fx.RaiseTerm | fx.ReadRow | fx.WriteModel) -> None:
        self.dispatch(await self._operations.perform(effect))

    # -- tasks ------------------------------------------------------------------------------

    async def _tick(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(min(TICK_S, self._config.heartbeat_interval_s / 4))
            self.dispatch(ev.Tick())
            ticks += 1
            if ticks % 5 == 0:
                self.look_at_quotas()
                dropped = self.event_log.dropped
                self._gauges.show(self.core, self.durable, self._journal.lag, dropped)

    async def _remove(self, job_id: str) -> None:
        """Have storage forget a job. A leader that dies over it leaves it to the next one."""
        await self._operations.remove(job_id)
        for facts in (self.core.facts, self.durable):
            facts.removing.pop(job_id, None)

    async def _clear_up(self) -> None:
        """Let storage forget what nobody came to tell it to forget."""
        for job_id in list(self.durable.removing):
            await self._remove(job_id)
        await self._let_go_of_pins()

    async def _let_go_of_pins(self) -> None:
        for job_id in await unclaimed(self._store, self.core.facts, self._submitting):
            await self._operations.release_pins(job_id)
            _log.info("pins_let_go", job_id=job_id)

    async def _collect_garbage(self) -> None:
        while True:
            await asyncio.sleep(self._config.collect_garbage_every_s)
            request = storage_pb.CollectGarbageRequest(grace_s=-1)
            try:
                await self._let_go_of_pins()
                done = await self._store.call(
                    self._store.storage.CollectGarbage, request, timeout_s=600.0
                )
            except PhalanxError as error:
                _log.warning("garbage_not_collected", message=error.message)
            else:
                _log.info("garbage_collected", blobs=done.blobs_removed, bytes=done.bytes_removed)

    def _storage_changed(self, available: bool) -> None:
        moment_s = time.monotonic()
        if not available:
            self._storage_lost_s = moment_s
            self.dispatch(ev.StorageLost(self._store.answered_s))
        else:
            self.dispatch(
                ev.StorageReturned(self._storage_lost_s or moment_s, self.event_log.dropped)
            )
            self._storage_lost_s = None

    def _spawn(self, work: Coroutine[Any, Any, Any], *, vital: bool) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, vital))
        return task

    def _ended(self, task: asyncio.Task[Any], vital: bool) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if not isinstance(error, PhalanxError):
            _log.error("task_failed", exc_info=error)
            error = Unavailable(f"control restarts after a defect: {type(error).__name__}")
        if vital:
            self._fail(error)
        else:
            _log.warning("task_failed", message=error.message)

    def _fail(self, error: PhalanxError) -> None:
        if not self.failed.done():
            _log.warning("leadership_ends", reason=error.reason, message=error.message)
            self.failed.set_result(error)


def _undecided() -> Unavailable:
    return Unavailable("storage does not take the decision; call again with the same request_id")
