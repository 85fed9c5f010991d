"""One hosted set of independent tasks in the session process: its stream to their owner."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from phalanx.errors import Aborted, Internal, PhalanxError, Unavailable
from phalanx.rpc.channel import open_channel
from phalanx.rpc.status import from_rpc_error
from phalanx.tasks import INLINE_BYTES
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import task_service_pb2 as pb
from phalanx.v1 import task_service_pb2_grpc as pb_grpc
from worker.core.calls import TaskSetCore
from worker.core.dispatch import Task
from worker.core.effects import Effect, OpenStreams
from worker.core.progress import JobProgress
from worker.session.setup import PreparedJob
from worker.session.streams import both_ways, end_of

BEAT_S = 0.5
STREAM_TIMEOUT_S = 24 * 3600.0
WELCOME_TIMEOUT_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S, _NOT_READY_WAIT_MAX_S = 0.02, 2.0, 0.1

_log = get_logger(__name__)

Store = Callable[[bytes], Awaitable[str]]


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
    ) -> None:
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
        self._stream = asyncio.create_task(self._keep_open(wanted))

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

    def call_done(self, task: Task, index: int, seconds: float, value_json: bytes) -> None:
        """A call returned; what is large is stored first."""
        self.progress.add(1, (seconds,))
        number, attempt = self.core.call_done(task, index, seconds)
        if len(value_json) <= INLINE_BYTES:
            text = value_json.decode()
            effects = self.core.report(number, attempt, seconds=seconds, value_json=text)
            self._perform(effects)
        else:
            self._spawn(self._store_value(number, attempt, seconds, value_json))

    # Inside

    async def _store_value(self, number: int, attempt: int, seconds: float, value: bytes) -> None:
        digest = await self._store(value)
        stored = pb.StoredValue(digest=digest, size_bytes=len(value))
        self._perform(self.core.report(number, attempt, seconds=seconds, stored=stored))

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

    async def _keep_open(self, wanted: OpenStreams) -> None:
        ((aggregator_id, address),) = wanted.owners
        channel = open_channel(address, own_connection=True)
        wait_s = _FIRST_WAIT_S
        try:
            while True:
                was_open, error = await self._once(channel, wanted.term)
                if was_open:
                    wait_s = _FIRST_WAIT_S
                limit_s = _LONGEST_WAIT_S
                if isinstance(error, Unavailable) and error.reason == "RANGES_NOT_READY":
                    limit_s = _NOT_READY_WAIT_MAX_S
                elif isinstance(error, Aborted):
                    # Another term is in force; control's next assignment closes this stream.
                    wait_s = limit_s / 2
                _log.info(
                    "task_stream_ended",
                    job_id=wanted.job_id,
                    aggregator_id=aggregator_id,
                    reason=error.reason,
                    message=error.message,
                )
                await asyncio.sleep(min(wait_s, limit_s) * random.uniform(0.5, 1.0))
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        finally:
            await channel.close()

    async def _once(self, channel: grpc.aio.Channel, term: int) -> tuple[bool, PhalanxError]:
        """Run one stream to its end: whether it was accepted, and why it ended."""
        call: Any = pb_grpc.TaskServiceStub(channel).Work(timeout=STREAM_TIMEOUT_S)
        opened = False
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(pb.WorkRequest(hello=self._hello(term)))
                await _read(call)
            opened = True
            self._perform(self.core.stream_opened())
            await self._both_ways(call)
        except grpc.aio.AioRpcError as error:
            return opened, from_rpc_error(error)
        except TimeoutError:
            return opened, Unavailable("the aggregator accepts no stream", reason="NO_WELCOME")
        except asyncio.InvalidStateError:
            return opened, await end_of(call)
        except PhalanxError as error:
            return opened, error
        except Exception as error:  # noqa: BLE001 - without this stream the job would stand still
            _log.exception("task_stream_failed", job_id=self.core.job_id)
            return False, Internal(f"{type(error).__name__}: {error}")
        finally:
            call.cancel()
        return opened, Unavailable("the aggregator ended the stream", reason="STREAM_ENDED")

    def _hello(self, term: int) -> pb.WorkHello:
        return pb.WorkHello(
            job_id=self.core.job_id,
            term=term,
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            slots=self.core.slots,
            held=self.core.held(),
        )

    async def _both_ways(self, call: Any) -> None:
        """Send and receive until either ends."""
        await both_ways(self._send(call), self._receive(call))

    async def _send(self, call: Any) -> None:
        while True:
            reports = self.core.next_reports()
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
            self._perform(self.core.told(await _read(call)))


async def _read(call: Any) -> pb.WorkResponse:
    message = await call.read()
    if message is grpc.aio.EOF:
        raise await end_of(call)
    assert isinstance(message, pb.WorkResponse)
    return message
