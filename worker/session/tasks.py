"""The tasks of one hosted job in the session process: its stream to their owner."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio

from phalanx.errors import PhalanxError
from phalanx.rpc.credentials import ClientKeys
from phalanx.tasks import INLINE_BYTES, is_program
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import task_service_pb2 as pb
from phalanx.v1 import task_service_pb2_grpc as pb_grpc
from phalanx.v1.job_spec_pb2 import JobSpec
from worker.core.calls import TaskSetCore
from worker.core.dispatch import Task
from worker.core.effects import Effect, OpenStreams
from worker.core.progress import JobProgress
from worker.ipc import Returned
from worker.session.setup import PreparedJob
from worker.session.streams import STREAM_TIMEOUT_S, both_ways, end_of, keep_open

BEAT_S = 0.5
KEEPING_S = 30.0
"""What spares others work is worth waiting for storage so long."""
Store = Callable[[memoryview], Awaitable[str]]

_log = get_logger(__name__)


class HostedTasks:
    """Carries out what the core of a set of tasks decides about its stream.

    `perform` carries out all other effects; `store` keeps a large value and returns its digest.
    """

    def __init__(
        self,
        core: TaskSetCore,
        worker_id: str,
        incarnation: str,
        perform: Callable[[list[Effect]], None],
        store: Store,
        keys: ClientKeys | None = None,
    ) -> None:
        self._keys = keys
        self.core = core
        self.progress = JobProgress()
        self.prepared: PreparedJob | None = None
        self.preparing: asyncio.Task[None] | None = None
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._perform = perform
        self._store = store
        self._stream: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._something = asyncio.Event()
        #: What a task of a program returns is the input of others: bytes, and one way to them.
        self._stores_all = is_program(JobSpec.FromString(core.plan.spec))

    @property
    def step(self) -> int:
        """How far the job is, as this worker knows."""
        return self.progress.leaves_done

    def became_prepared(self, prepared: PreparedJob) -> None:
        """The job's files are here."""
        self.prepared = prepared
        prepared.timeout_s = self.core.timeout_s

    def open_streams(self, wanted: OpenStreams) -> None:
        """Close the stream of the term before and open that of this one."""
        self._close_stream()
        ((owner_id, address),) = wanted.owners
        hello = partial(self._hello, wanted.term)
        stream = _TaskStream(self.core, owner_id, hello, self._perform, self._something)
        self._stream = asyncio.create_task(keep_open(stream, address, self._keys))

    def wake(self, aggregator_id: str) -> None:
        """There may be something to say."""
        self._something.set()

    async def close(self) -> None:
        """End the stream; the caller releases what was prepared."""
        if self.preparing is not None:
            self.preparing.cancel()
            await asyncio.gather(self.preparing, return_exceptions=True)
        self._close_stream()
        if self._ending:
            await asyncio.wait(self._ending)

    def call_done(self, task: Task, index: int, seconds: float, returned: Returned) -> None:
        """A call returned; what is large is stored first."""
        self.progress.add(1, (seconds,))
        number, attempt = self.core.call_done(task, index, seconds)
        if len(returned.value) <= INLINE_BYTES and not self._stores_all:
            text = str(returned.value, "utf-8")
            effects = self.core.report(number, attempt, seconds=seconds, value_json=text)
            self._perform(effects)
        else:
            self._spawn(self._store_value(number, attempt, seconds, returned))

    # Inside

    async def _store_value(
        self, number: int, attempt: int, seconds: float, returned: Returned
    ) -> None:
        digest = await self._store(returned.value)
        stored = pb.StoredValue(digest=digest, size_bytes=len(returned.value))
        kept = await self._store_kept(returned.kept)
        self._perform(
            self.core.report(
                number,
                attempt,
                seconds=seconds,
                stored=stored,
                kept=kept,
                earlier=returned.earlier,
            )
        )

    async def _store_kept(self, kept: memoryview) -> pb.KeptState | None:
        """Store what only spares others work; None where storage does not take it soon."""
        if not kept:
            return None
        try:
            async with asyncio.timeout(KEEPING_S):
                digest = await self._store(kept)
        except (TimeoutError, PhalanxError, OSError) as error:
            _log.info("state_not_kept", job_id=self.core.job_id, reason=str(error))
            return None
        return pb.KeptState(sha256=bytes.fromhex(digest), size_bytes=len(kept))

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._keep(self._stream)
            self._stream = None

    def _spawn(self, work: Any) -> None:
        self._keep(asyncio.create_task(work))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _hello(self, term: int) -> pb.WorkHello:
        return pb.WorkHello(
            job_id=self.core.job_id,
            term=term,
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            slots=self.core.slots,
            held=self.core.held(),
            given=self.core.assigned if self.core.assigned.seal else None,
        )


class _TaskStream:
    """What is said on the stream of one term."""

    def __init__(
        self,
        core: TaskSetCore,
        owner_id: str,
        hello: Callable[[], pb.WorkHello],
        perform: Callable[[list[Effect]], None],
        something: asyncio.Event,
    ) -> None:
        self.job_id = core.job_id
        self.owner_id = owner_id
        self._core = core
        self._hello = hello
        self._perform = perform
        self._something = something

    def open(self, channel: grpc.aio.Channel) -> Any:
        """See `OwnerStream`."""
        return pb_grpc.TaskServiceStub(channel).Work(timeout=STREAM_TIMEOUT_S)

    async def greet(self, call: Any) -> None:
        """See `OwnerStream`."""
        await call.write(pb.WorkRequest(hello=self._hello()))
        await _read(call)

    async def talk(self, call: Any) -> None:
        """See `OwnerStream`."""
        self._perform(self._core.stream_opened())
        await both_ways(self._send(call), self._receive(call))

    def closed(self) -> None:
        """See `OwnerStream`: the next hello says all that was not answered."""

    async def _send(self, call: Any) -> None:
        while True:
            reports = self._core.next_reports()
            if reports is None:
                self._something.clear()
                try:
                    async with asyncio.timeout(BEAT_S):
                        await self._something.wait()
                except TimeoutError:
                    reports = pb.TaskReports()
                else:
                    continue
            await call.write(pb.WorkRequest(reports=reports))

    async def _receive(self, call: Any) -> None:
        while True:
            self._perform(self._core.told(await _read(call)))


async def _read(call: Any) -> pb.WorkResponse:
    message = await call.read()
    if message is grpc.aio.EOF:
        raise await end_of(call)
    assert isinstance(message, pb.WorkResponse)
    return message
