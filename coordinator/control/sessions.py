"""Sessions with members: one reader and one bounded outbound queue each."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.control.core import events as ev
from phalanx.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    PermissionDenied,
    PhalanxError,
    ResourceExhausted,
    Violation,
)
from phalanx.keys.caller import Caller, Service, current_caller
from phalanx.rpc.types import ServicerContext
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import coordination_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from coordinator.control.leader import Leader
    from coordinator.control.process import ControlProcess

HELLO_TIMEOUT_S = 5.0
QUEUE_MAX = 2000
SESSIONS_MAX = 5000
TOLD_MAX = 1000
"""Jobs of which is known that a member was told of them."""

_log = get_logger(__name__)


_Member = tuple[Caller, Service, str]


class MemberSession:
    """The sending half of one member's stream; an error in the queue ends the stream with it."""

    def __init__(self, number: int, service: Service, member_id: str) -> None:
        self.number = number
        self.service = service
        self.queue: asyncio.Queue[pb.SessionResponse | PhalanxError | None] = asyncio.Queue()
        self.member_id = member_id
        self.caller = current_caller()
        self.member: _Member = (self.caller, service, member_id)
        """Whoever takes the id with another certificate is somebody else."""
        self.unheard: set[str] = set()
        """Kinds of messages of which one, at least, was not for this member to say."""

    def send(self, message: pb.SessionResponse) -> bool:
        """Queue a message; False if the member reads so slowly that the queue is full."""
        if self.queue.qsize() >= QUEUE_MAX:
            return False
        self.queue.put_nowait(message)
        return True

    def end(self, error: PhalanxError | None) -> None:
        """End the stream after what is queued, with an error or cleanly."""
        self.queue.put_nowait(error)


class Sessions:
    """The open sessions of one leadership."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, MemberSession] = {}
        #: Jobs that members were told of, whatever session they are on now: the newest of each.
        self._told: dict[_Member, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, service: Service, member_id: str) -> MemberSession:
        """Make room for a new session. Raises ResourceExhausted; PermissionDenied where a caller
        with another certificate has a session as this very member."""
        if len(self._open) >= SESSIONS_MAX:
            raise ResourceExhausted(f"there are {SESSIONS_MAX} sessions already; try again later")
        session = MemberSession(next(self._numbers), service, member_id)
        there = () if session.caller.open_cluster else self._open.values()
        for other in there:
            if other.member_id == member_id and other.caller != session.caller:
                raise PermissionDenied(
                    f"{member_id!r} is here already, with another certificate than that of "
                    f"{session.caller.name}",
                    reason="NOT_THIS_MEMBER",
                    violations=[Violation("hello", "names a member that another one is")],
                )
        self._open[session.number] = session
        return session

    def send(self, number: int, message: pb.SessionResponse) -> None:
        """Send to a member, if its session is still open; a member that does not read is closed."""
        session = self._open.get(number)
        if session is None:
            return
        self.told(session, _job_of(message))
        if not session.send(message):
            _log.warning("member_reads_too_slowly", member_id=session.member_id)
            self.end(number, ResourceExhausted("the member does not read what it is sent"))

    def told(self, session: MemberSession, job_id: str) -> None:
        """A member was told of a job, or takes part in it: it may speak of it, also later."""
        if not job_id or session.caller.open_cluster:
            return
        jobs = self._told.pop(session.member, {})
        jobs.pop(job_id, None)
        jobs[job_id] = None
        if len(jobs) > TOLD_MAX:
            del jobs[next(iter(jobs))]
        self._told[session.member] = jobs
        # Workers with new names in each start never come back.
        if len(self._told) > 2 * SESSIONS_MAX:
            del self._told[next(iter(self._told))]

    def was_told(self, session: MemberSession, job_id: str) -> bool:
        """Whether a member that proves who it is was told of a job."""
        return job_id in self._told.get(session.member, {})

    def end(self, number: int, error: PhalanxError | None) -> None:
        """End a session."""
        session = self._open.pop(number, None)
        if session is not None:
            session.end(error)

    def end_all(self, error: PhalanxError) -> None:
        """End every session: this process leads no more."""
        for number in list(self._open):
            self.end(number, error)


class CoordinationServicer(pb_grpc.CoordinationServiceServicer):
    """The front door for workers and aggregators."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: ServicerContext
    ) -> AsyncIterator[pb.SessionResponse]:
        """Serve one member until its stream breaks or it is sent away."""
        self._process.leading()
        hello = await _hello(request_iterator)
        # Asked again: a leadership that ended meanwhile would keep the member for ever.
        leader = self._process.leading()
        session = leader.sessions.open(hello.service, hello.member_id)
        reader = asyncio.create_task(self._read(leader, session, request_iterator))
        leader.dispatch(hello.event(session.number))
        leader.member_came(session, hello.held)
        try:
            while True:
                message = await session.queue.get()
                if message is None:
                    return
                if isinstance(message, PhalanxError):
                    raise message
                yield message
        finally:
            reader.cancel()
            leader.sessions.end(session.number, None)
            leader.dispatch(ev.SessionBroken(session.number, "its session broke"))

    async def _read(
        self,
        leader: Leader,
        session: MemberSession,
        request_iterator: AsyncIterator[pb.SessionRequest],
    ) -> None:
        """Hand what a member says to the core; when it says no more, end the session."""
        error = None
        try:
            async for message in request_iterator:
                error = _hand_over(leader, session, message)
                if error is not None:
                    break
        except asyncio.CancelledError:
            raise
        except Exception:  # noqa: BLE001 - a broken stream surfaces as many kinds of error
            _log.debug("session_broken", member_id=session.member_id, exc_info=True)
        session.end(error)


def _hand_over(
    leader: Leader, session: MemberSession, message: pb.SessionRequest
) -> PhalanxError | None:
    """Hand a message on; what ends the session instead, if it cannot be taken."""
    try:
        leader.member_said(session, message)
    except Exception as error:  # noqa: BLE001 - the member must hear of it, whatever it is
        kind = message.WhichOneof("message")
        _log.exception("member_message_failed", member_id=session.member_id, kind=kind)
        return Internal(f"control cannot take a {kind}: {type(error).__name__}; see its log")
    return None


def _job_of(message: pb.SessionResponse) -> str:
    """The job that a message tells a member of, if it does."""
    kind = message.WhichOneof("message")
    if kind in ("describe_job", "assign_job", "assign_ranges"):
        return str(getattr(message, kind).plan.job_id)
    return ""


@dataclass(frozen=True)
class _Hello:
    service: Service
    member_id: str
    event: Callable[[int], ev.Event]
    """Of a session with this number."""
    held: frozenset[str]
    """Jobs that the member says it has."""


async def _hello(request_iterator: AsyncIterator[pb.SessionRequest]) -> _Hello:
    """Return who speaks, as the first message says and the certificate does not deny."""
    try:
        first = await asyncio.wait_for(anext(request_iterator), HELLO_TIMEOUT_S)
    except TimeoutError:
        raise DeadlineExceeded(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
    except StopAsyncIteration:
        raise InvalidArgument("the stream ended before the hello") from None
    if first.HasField("worker_hello"):
        worker = first.worker_hello
        _check_is(Service.WORKER, worker.worker_id, "worker_hello.worker_id")
        return _Hello(
            Service.WORKER,
            worker.worker_id,
            lambda session: ev.WorkerConnected(session, worker),
            frozenset(each.job_id for each in worker.held_jobs),
        )
    if first.HasField("aggregator_hello"):
        aggregator = first.aggregator_hello
        _check_is(Service.AGGREGATOR, aggregator.aggregator_id, "aggregator_hello.aggregator_id")
        return _Hello(
            Service.AGGREGATOR,
            aggregator.aggregator_id,
            lambda session: ev.AggregatorConnected(session, aggregator),
            frozenset(each.job_id for each in aggregator.held_ranges),
        )
    raise InvalidArgument("the first message must be the hello of a worker or an aggregator")


def _check_is(service: Service, member_id: str, field: str) -> None:
    """Raise PermissionDenied where the caller's certificate is not that of such a member."""
    caller = current_caller()
    if not caller.open_cluster and service not in caller.services:
        raise PermissionDenied(
            f"the certificate of {caller.name} is none of a node of the kind {service}",
            reason="ROLE_NOT_ALLOWED",
            violations=[Violation(field, "names a member of another kind than this certificate")],
        )
    caller.check_member(member_id, field)
