"""One hosted all-reduce job in the session process: both ends of its streams, updates, checkpoints.

The session adds and applies here what an aggregator does elsewhere: a frame, or a slice of an
update, at a time, so that heartbeats and other jobs have their turn in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, ClassVar

from prometheus_client import Counter

from phalanx.clients.storage import StorageClient
from phalanx.errors import Aborted, PhalanxError, Unavailable
from phalanx.frames import decode_request
from phalanx.keys.caller import Service
from phalanx.rpc.credentials import ClientKeys
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_pb2, job_spec_pb2
from worker.core import effects as do
from worker.core.all_reduce.job import AllReduceJob
from worker.core.all_reduce.owner import stale_term
from worker.core.all_reduce.replica import Array
from worker.core.all_reduce.root import TERMINAL_ACTIONS
from worker.session.all_reduce import checkpoints
from worker.session.all_reduce.reports import REPORT_EVERY_S, RootReports
from worker.session.hosting import HostedJob
from worker.session.setup import PreparedJob

GetStorage = Callable[[], Awaitable[StorageClient]]
Perform = Callable[[list[do.Effect]], None]

LOOK_EVERY_S = 0.025
"""Between two looks at what is late."""

_log = get_logger(__name__)


class HostedAllReduce(HostedJob):
    """Carries out what the core decides; `send` hands a message to control, if `connected`."""

    owners: ClassVar[Service] = Service.WORKER

    def __init__(
        self,
        core: AllReduceJob,
        worker_id: str,
        incarnation: str,
        perform: Perform,
        keys: ClientKeys | None = None,
        *,
        send: Callable[[coordination.SessionRequest], None],
        connected: Callable[[], bool],
        storage: GetStorage,
        sent_bytes: Counter,
    ) -> None:
        super().__init__(core, worker_id, incarnation, perform, keys)
        self.all_reduce = core
        core.elapsed = lambda: time.monotonic() - self._began_s
        self.reports = RootReports(core, send, connected)
        self._send_to_control = send
        self._storage = storage
        self._sent_bytes = sent_bytes
        self._keep = job_spec_pb2.JobSpec.FromString(core.plan.spec).train.checkpoints.keep
        self._began_s = time.monotonic()
        self._wakers: dict[object, asyncio.Event] = {}
        self._over: asyncio.Future[PhalanxError] = asyncio.get_running_loop().create_future()
        #: Tasks of the term.
        self._tasks: set[asyncio.Task[None]] = set()
        self._looping = self._working = False
        #: Version → the copy that was hashed, until it is written or not needed.
        self._copies: dict[int, dict[str, Array]] = {}
        self._loops = [
            asyncio.create_task(self._report_often()),
            asyncio.create_task(self._look_often()),
        ]

    # -- the term

    def became_prepared(self, prepared: PreparedJob) -> None:
        """The shared memory is here: what is held is kept in it."""
        self.all_reduce.attach(prepared.arena.array)
        super().became_prepared(prepared)

    def open_streams(self, wanted: do.OpenStreams | None) -> None:
        """A term begins, or what the job needs is here: open streams to the other members."""
        if wanted is not None and wanted is not self._wanted:
            self._end_term(stale_term(self.core.job_id, wanted.term - 1, wanted.term))
            self._began_s = time.monotonic()
            self.reports.begin(self.reports.checkpoint_step)
        super().open_streams(wanted)

    def _hello(self, wanted: do.OpenStreams) -> exchange.ExchangeHello:
        hello = super()._hello(wanted)
        if wanted.held >= 0:
            hello.held_version = wanted.held
        return hello

    async def close(self) -> None:
        """End everything; the caller releases what was prepared."""
        job_id = self.core.job_id
        gone = Unavailable(f"job {job_id} is not here any more", reason="RANGES_RELEASED")
        tasks = [*self._loops, *self._tasks]
        self._end_term(gone)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().close()

    def _end_term(self, error: PhalanxError) -> None:
        if not self._over.done():
            self._over.set_result(error)
        self._over = asyncio.get_running_loop().create_future()
        for task in self._tasks:
            task.cancel()
        self._looping = self._working = False
        self._copies.clear()

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # What is begun only here leaves nothing that was never awaited if the term ends before.
        term = self.core.term
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - the job would stand still, and nobody know why
            _log.exception("all_reduce_failed", job_id=self.core.job_id)
            self._fail(term, "ALL_REDUCE_FAILED", f"{type(error).__name__}: {error}")

    # -- streams of other members

    @property
    def term(self) -> int:
        """The term in which this worker is a member."""
        return self.core.term

    @property
    def joined(self) -> bool:
        """Members may open streams."""
        return self.all_reduce.joined

    def open_member(self, key: object, hello: exchange.ExchangeHello) -> asyncio.Event:
        """A member's stream is open."""
        self._perform(self.all_reduce.member_opened(key, hello))
        waker = self._wakers[key] = asyncio.Event()
        return waker

    def close_member(self, key: object) -> None:
        """A member's stream has ended."""
        self._wakers.pop(key, None)
        self.all_reduce.member_closed(key)

    def member_said(
        self, key: object, header: exchange.ExchangeRequestHeader, payload: memoryview
    ) -> None:
        """A member sent a message."""
        self._perform(self.all_reduce.member_said(key, header, payload))

    def next_served(self, key: object) -> bytes | None:
        """What to send on a member's stream."""
        return self._counted(self.all_reduce.next_served(key))

    async def term_over(self) -> None:
        """Wait for the end of the term, then raise what ends its streams."""
        raise await asyncio.shield(self._over)

    # -- streams to other members

    def owner_said(self, header: exchange.ExchangeResponseHeader, payload: memoryview) -> None:
        """The owner of a range sent a message."""
        self._perform(self.all_reduce.owner_said(header, payload))

    def next_message(self, aggregator_id: str) -> bytes | None:
        """The next message of a stream, encoded."""
        due = self.all_reduce.next_due(aggregator_id)
        return self._counted(due or super().next_message(aggregator_id))

    def _counted(self, message: bytes | None) -> bytes | None:
        if message is not None:
            self._sent_bytes.inc(len(message))
        return message

    def wake(self, aggregator_id: str) -> None:
        """A stream has something to send; the one to this worker itself is none."""
        if aggregator_id != self._worker_id:
            super().wake(aggregator_id)
        elif not self._looping and self.prepared is not None:
            self._looping = True
            self._spawn(self._loop_back)

    async def _loop_back(self) -> None:
        while (message := self._next_of_core(self._worker_id)) is not None:
            header, payload = decode_request(message)
            self._perform(self.all_reduce.contribute(header.frame, payload))
            await asyncio.sleep(0)
        self._looping = False

    # -- what the core wants

    def carry_out(self, effect: do.OfAllReduce) -> None:
        """Do what the core asks for."""
        match effect:
            case do.Serve():
                for waker in self._wakers.values():
                    waker.set()
            case do.Work():
                if not self._working:
                    self._working = True
                    self._spawn(self._work)
            case do.Restore():
                self._spawn(partial(self._restore, effect))
            case do.Snapshot():
                self._spawn(partial(self._hash, effect, self._copy(effect.version)))
            case do.Store():
                self._spawn(partial(self._store, effect))
            case do.Committed():
                self.reports.committed(effect.version, effect.example_count)
            case do.Points():
                self.reports.keep_points(effect.points)
            case do.Fail():
                self._fail(effect.term, effect.reason, effect.message)

    async def _work(self) -> None:
        while self.all_reduce.works:
            self._perform(self.all_reduce.work())
            await asyncio.sleep(0)
        self._working = False

    def _fail(self, term: int, reason: str, message: str) -> None:
        if term == self.core.term:
            _log.error("job_failed", job_id=self.core.job_id, reason=reason, message=message)
            self.reports.failed(reason, message)

    def session_opened(self) -> None:
        """Control is new or back: tell it where the job is."""
        self.reports.session_opened()

    async def _report_often(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self.reports.look()

    async def _look_often(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if effects := self.all_reduce.look():
                self._perform(effects)

    # -- checkpoints

    async def _restore(self, effect: do.Restore) -> None:
        manifest = effect.manifest
        try:
            vectors = await checkpoints.read(await self._storage(), manifest)
            self.reports.checkpoint_step = manifest.step
            self.reports.steps_replayed = max(0, self.all_reduce.reached_step - manifest.step)
            self._perform(self.all_reduce.restored(manifest.step, *vectors, manifest.root_state))
        except PhalanxError as error:
            _log.error("checkpoint_refused", job_id=self.core.job_id, message=error.message)
            failure = job_pb2.Failure(code=error.reason, message=error.message)
            ready = coordination.RangesReady(
                job_id=self.core.job_id, term=effect.term, failure=failure
            )
            self._send_to_control(coordination.SessionRequest(ranges_ready=ready))

    def _copy(self, version: int) -> dict[str, Array]:
        replica = self.all_reduce.replica
        assert replica is not None
        assert replica.version == version
        copy = self._copies[version] = replica.copy()
        return copy

    async def _hash(self, effect: do.Snapshot, copy: dict[str, Array]) -> None:
        sha256 = await asyncio.to_thread(checkpoints.sha256_of, copy)
        if self.all_reduce.root is None:
            self._copies.pop(effect.version, None)
        self._perform(self.all_reduce.hashed(effect.version, sha256))

    async def _store(self, effect: do.Store) -> None:
        go = effect.go
        terminal = go.action in TERMINAL_ACTIONS
        try:
            vectors = self._copies.pop(go.version)
            client = await self._storage()
            await checkpoints.write(client, self.core.plan, go, vectors, self._keep)
        except PhalanxError as error:
            _log.warning(
                "checkpoint_given_up",
                job_id=self.core.job_id,
                step=go.version,
                reason=error.reason,
                message=error.message,
            )
            # A fence says that the term is over, and then nothing is left to be said about it.
            if terminal and not isinstance(error, Aborted):
                text = f"the last checkpoint cannot be stored: {error.message}"
                self._fail(go.term, "CHECKPOINT_FAILED", text)
            return
        finally:
            self.all_reduce.checkpoint_done(go.version)
        self.reports.checkpoint_step = max(self.reports.checkpoint_step, go.version)
        if terminal:
            self.reports.stopped(go)
