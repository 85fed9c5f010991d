"""Scripted members: workers and aggregators that speak to real control and compute nothing.

    async with ScriptedWorker(control_address, "w1") as worker:
        assigned = await worker.wait_for("assign_job")
        worker.heartbeat(job_id, step=3)
        worker.kill()                      # as kill -9: the stream just breaks

They answer what control asks at once (a description of one small tensor, ready, released), unless
`scripted` is set to False. Every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Self

import grpc.aio

from phalanx.errors import DeadlineExceeded, PhalanxError
from phalanx.ids import new_incarnation
from phalanx.keys.caller import Service
from phalanx.rpc.channel import open_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.status import from_rpc_error
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.coordination_service_pb2_grpc import CoordinationServiceStub
from phalanx.v1.training_pb2 import Layout, TensorSpec

WAIT_S = 20.0
"""Longest wait of a test; a guard against a hang, not a measure."""

LAYOUT = Layout(
    tensors=[TensorSpec(name="weights", shape=[8, 2], decay=True)],
    dtype="float32",
    element_count=16,
)


def held_jobs(told: Iterable[pb.SessionResponse]) -> tuple[pb.HeldWorkerJob, ...]:
    """Return what a worker says it holds after what control has told it."""
    held: dict[str, pb.HeldWorkerJob] = {}
    for message in told:
        if message.WhichOneof("message") == "assign_job":
            assign = message.assign_job
            held[assign.plan.job_id] = pb.HeldWorkerJob(
                job_id=assign.plan.job_id,
                term=assign.term,
                placement=assign.placement,
                train_nodes=assign.train_nodes,
                evaluation_nodes=assign.evaluation_nodes,
                ready=True,
                given=assign.given if assign.HasField("given") else None,
            )
        elif message.WhichOneof("message") == "revoke_job":
            held.pop(message.revoke_job.job_id, None)
    return tuple(held.values())


class ScriptedMember(ABC):
    """One session with control. `received` holds what control has sent, in order."""

    keys: ClientKeys | None = None
    """What it proves itself with; set before it connects."""

    def __init__(self, control: str, member_id: str, *, scripted: bool = True) -> None:
        self.member_id = member_id
        self.scripted = scripted
        self.incarnation: str = new_incarnation()
        self.received: list[pb.SessionResponse] = []
        self.error: PhalanxError | None = None
        self._control = control
        self._outbound: asyncio.Queue[pb.SessionRequest | None] = asyncio.Queue()
        self._arrived = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None

    @abstractmethod
    def hello(self) -> pb.SessionRequest:
        """Return the first message; subclasses say who they are."""

    @abstractmethod
    def answer(self, message: pb.SessionResponse) -> None:
        """React to a message from control; subclasses do what a real member would say."""

    async def __aenter__(self) -> Self:
        self._channel = open_channel(
            self._control, keys=self.keys, service=Service.CONTROL, own_connection=True
        )
        stub = CoordinationServiceStub(self._channel)
        self._outbound.put_nowait(self.hello())
        self._tasks = [asyncio.create_task(self._read(stub)), asyncio.create_task(self._beat())]
        await self.wait_for("welcome")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """Break the stream without a word, as a killed process does."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = []
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def say(self, **message: Any) -> None:
        """Send one message."""
        self._outbound.put_nowait(pb.SessionRequest(**message))

    async def wait_for(
        self,
        kind: str,
        accept: Callable[[Any], bool] = lambda _: True,
        *,
        timeout_s: float = WAIT_S,
    ) -> Any:
        """Return the newest message of a kind that `accept` takes, waiting until there is one.

        Raises DeadlineExceeded, or the error with which control ended the session.
        """

        def newest() -> Any:
            for message in reversed(self.received):
                if message.WhichOneof("message") == kind and accept(getattr(message, kind)):
                    return getattr(message, kind)
            return None

        try:
            async with asyncio.timeout(timeout_s), self._arrived:
                await self._arrived.wait_for(lambda: newest() is not None or self.error is not None)
        except TimeoutError:
            kinds = [message.WhichOneof("message") for message in self.received]
            raise DeadlineExceeded(f"{self.member_id}: no such {kind} among {kinds}") from None
        found = newest()
        if found is None and self.error is not None:
            raise self.error
        return found

    async def wait_for_end(self, *, timeout_s: float = WAIT_S) -> PhalanxError:
        """Wait until control ends the session; return the error."""
        async with asyncio.timeout(timeout_s), self._arrived:
            await self._arrived.wait_for(lambda: self.error is not None)
        assert self.error is not None
        return self.error

    async def _read(self, stub: CoordinationServiceStub) -> None:
        try:
            async for message in stub.Session(self._requests()):
                if self.scripted:
                    self.answer(message)
                async with self._arrived:
                    self.received.append(message)
                    self._arrived.notify_all()
        except grpc.aio.AioRpcError as error:
            await self._ended(from_rpc_error(error))
        else:
            await self._ended(PhalanxError("control ended the session"))

    async def _ended(self, error: PhalanxError) -> None:
        async with self._arrived:
            self.error = error
            self._arrived.notify_all()

    async def _requests(self) -> AsyncIterator[pb.SessionRequest]:
        while (message := await self._outbound.get()) is not None:
            yield message

    async def _beat(self) -> None:
        welcome: pb.Welcome = await self.wait_for("welcome")
        while True:
            await asyncio.sleep(welcome.heartbeat_interval_s / 2)
            self.say(heartbeat=pb.Heartbeat())


class ScriptedWorker(ScriptedMember):
    """A worker without leaf processes."""

    def __init__(
        self,
        control: str,
        member_id: str,
        *,
        slots: int = 2,
        fingerprint: str = "test",
        held: tuple[pb.HeldWorkerJob, ...] = (),
        scripted: bool = True,
    ) -> None:
        super().__init__(control, member_id, scripted=scripted)
        self.slots = slots
        self.fingerprint = fingerprint
        self.held = held

    def hello(self) -> pb.SessionRequest:
        """Say hello as a worker."""
        hello = pb.WorkerHello(
            worker_id=self.member_id,
            incarnation=self.incarnation,
            fingerprint=self.fingerprint,
            slots=self.slots,
            memory_bytes=16 * 10**9,
            held_jobs=self.held,
        )
        return pb.SessionRequest(worker_hello=hello)

    def answer(self, message: pb.SessionResponse) -> None:
        """Describe jobs, be ready, let go."""
        kind = message.WhichOneof("message")
        if kind == "describe_job":
            described = pb.JobDescribed(
                job_id=message.describe_job.plan.job_id,
                layout=LAYOUT,
                evaluation_sums=["loss", "correct"],
                leaf_sha256="00" * 32,
            )
            self.say(job_described=described)
        elif kind == "assign_job":
            assign = message.assign_job
            ready = pb.WorkerJobReady(
                job_id=assign.plan.job_id, term=assign.term, leaf_sha256="00" * 32
            )
            self.say(worker_job_ready=ready)
        elif kind == "revoke_job":
            revoke = message.revoke_job
            released = pb.WorkerJobReleased(job_id=revoke.job_id, term=revoke.term)
            self.say(worker_job_released=released)

    def holding(self) -> tuple[pb.HeldWorkerJob, ...]:
        """Return what a real worker would say it holds after what it was told."""
        return held_jobs(self.received)


class ScriptedAggregator(ScriptedMember):
    """An aggregator that owns ranges and sums nothing."""

    def __init__(
        self,
        control: str,
        member_id: str,
        *,
        fingerprint: str = "test",
        held: tuple[pb.HeldRanges, ...] = (),
        scripted: bool = True,
    ) -> None:
        super().__init__(control, member_id, scripted=scripted)
        self.fingerprint = fingerprint
        self.held = held

    def hello(self) -> pb.SessionRequest:
        """Say hello as an aggregator."""
        hello = pb.AggregatorHello(
            aggregator_id=self.member_id,
            incarnation=self.incarnation,
            address="127.0.0.1:1",
            fingerprint=self.fingerprint,
            held_ranges=self.held,
        )
        return pb.SessionRequest(aggregator_hello=hello)

    def answer(self, message: pb.SessionResponse) -> None:
        """Serve ranges at once."""
        if message.WhichOneof("message") == "assign_ranges":
            assign = message.assign_ranges
            ready = pb.RangesReady(
                job_id=assign.plan.job_id, term=assign.term, version=assign.restore.step
            )
            self.say(ranges_ready=ready)

    def report(self, job_id: str, step: int, *, term: int = 1, **fields: Any) -> None:
        """Report as the root of a job."""
        fields.setdefault("outcome", pb.JobReport.OUTCOME_RUNNING)
        self.say(job_report=pb.JobReport(job_id=job_id, term=term, step=step, **fields))
