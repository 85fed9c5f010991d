"""A member's session with control: hello, heartbeats, reports; opened again whenever it breaks.

Training does not need it. While control is away reports wait, within bounds.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from phalanx.errors import PhalanxError, Unavailable
from phalanx.keys.caller import Service
from phalanx.rpc.channel import open_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.status import from_rpc_error
from phalanx.telemetry.logs import get_logger
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import coordination_service_pb2_grpc as coordination_grpc

STREAM_TIMEOUT_S = 24 * 3600.0
WELCOME_TIMEOUT_S = 5.0
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_REPORTS_MAX = 1000
_UNANSWERED_LEAST = 3
"""Heartbeats without an answer, at least, before a session counts as dead."""

_log = get_logger(__name__)


class Refused(Exception):
    """Control's generation is lower than one seen before."""


class _Silent(Exception):
    """Control holds the stream open and says nothing: it is stopped, or cut off."""


class Search:
    """Which of `count` addresses is tried next, and after how long.

    A round over all addresses is quick, since any of them may lead by now; rounds are further and
    further apart. Once a lease is known they stay well below it: a leader that took over waits a
    lease for its members before it takes those that are not there for lost.
    """

    def __init__(self, count: int) -> None:
        self.turn = 0
        self._count = count
        self._wait_s = _FIRST_WAIT_S
        self._longest_s = _LONGEST_WAIT_S

    def found(self, lease_ttl_s: float) -> None:
        """A leader welcomed the member."""
        if lease_ttl_s > 0:
            self._longest_s = max(_FIRST_WAIT_S, min(_LONGEST_WAIT_S, lease_ttl_s / 4))

    def wait_after(self, *, welcomed: bool) -> float:
        """The session at this turn has ended: how long to wait at most before the next."""
        if welcomed:
            self._wait_s = _FIRST_WAIT_S
            return _FIRST_WAIT_S
        self.turn = (self.turn + 1) % self._count
        if self.turn:
            return _FIRST_WAIT_S
        wait_s = min(self._wait_s, self._longest_s)
        self._wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        return wait_s


class MemberSession:
    """Keeps a session with one of `addresses` until `close`.

    `hello()` and `heartbeat()` make the messages; `on_message` takes what control says and may
    raise `Refused`; `on_open` is called with the welcome of each session, and before that
    `on_other_history` where storage was restored from a backup since the one before: what the
    member holds is of a time that storage knows nothing of.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        hello: Callable[[], coordination.SessionRequest],
        heartbeat: Callable[[], coordination.Heartbeat],
        on_message: Callable[[coordination.SessionResponse], None],
        on_open: Callable[[coordination.Welcome], None],
        keys: ClientKeys | None = None,
        on_other_history: Callable[[], None] = lambda: None,
    ) -> None:
        self._keys = keys
        self._on_other_history = on_other_history
        self.history: int | None = None
        """That of the newest welcome that told one; the hello says it."""
        self._addresses = list(addresses)
        self._hello = hello
        self._heartbeat = heartbeat
        self._on_message = on_message
        self._on_open = on_open
        self._reports: deque[coordination.SessionRequest] = deque()
        self._something = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._leaving = False
        self.connected = False
        self._settled_at_s = 0.0
        self.dropped_reports = 0
        self._unanswered = 0
        self.search = Search(len(self._addresses))

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._keep_open())

    @property
    def address(self) -> str:
        """That of the control process that is dialled now."""
        return self._addresses[self.search.turn]

    @property
    def settled(self) -> bool:
        """Whether the session is a lease old.

        A control process that has just taken over may wait so long for members to come back; until
        then it leaves alone what it does not know to be lost.
        """
        return self.connected and time.monotonic() >= self._settled_at_s

    def report(self, message: coordination.SessionRequest) -> None:
        """Send a message, now or once there is a session; the oldest go when too many wait."""
        if len(self._reports) >= _REPORTS_MAX:
            self._reports.popleft()
            self.dropped_reports += 1
        self._reports.append(message)
        self._something.set()

    async def leave(self, timeout_s: float) -> None:
        """Say what is still to be said, and that this was all; wait until control has heard it and
        ends the session, or the time is over. `close` follows.

        A call that is cancelled instead takes along what control has not read of it yet. A control
        that is away, or goes away meanwhile, is not waited for.
        """
        if self.connected and self._task is not None:
            self._leaving = True
            self._something.set()
            await asyncio.wait((self._task,), timeout=timeout_s)

    async def close(self) -> None:
        """End the session."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # Inside

    async def _keep_open(self) -> None:
        while True:
            address = self.address
            try:
                welcomed, reason = await self._once(address)
            except Exception as error:  # noqa: BLE001 - a member without a session is lost for good
                # Also what closing the connection raises, after everything else went as it should.
                _log.exception("session_failed", address=address)
                welcomed, reason = False, f"a defect of this member: {type(error).__name__}"
            _log.info("session_ended", address=address, reason=reason)
            if self._leaving:
                return
            await asyncio.sleep(self.search.wait_after(welcomed=welcomed) * random.uniform(0.5, 1))

    async def _once(self, address: str) -> tuple[bool, str]:
        """Run one session to its end: whether control welcomed the member, and why it ended."""
        channel = open_channel(
            address, keys=self._keys, service=Service.CONTROL, own_connection=True
        )
        welcomed = False
        call: Any = None
        try:
            stub: Any = coordination_grpc.CoordinationServiceStub(channel)
            call = stub.Session(timeout=STREAM_TIMEOUT_S)
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(self._hello())
                welcome = await self._welcome(call)
            welcomed = True
            self.connected = True
            self._settled_at_s = time.monotonic() + welcome.lease_ttl_s
            self.search.found(welcome.lease_ttl_s)
            self._note_history(welcome)
            self._on_open(welcome)
            await self._both_ways(call, welcome)
        except grpc.aio.AioRpcError as error:
            return welcomed, from_rpc_error(error).message
        except (Refused, _Silent) as error:
            # The next address may be that of another control process.
            return False, str(error)
        except TimeoutError:
            return False, "control does not answer"
        except (PhalanxError, asyncio.InvalidStateError) as error:
            return welcomed, str(error) or "the session ended"
        finally:
            self.connected = False
            if call is not None:
                call.cancel()
            await channel.close()
        return welcomed, "the session ended"

    async def _welcome(self, call: Any) -> coordination.Welcome:
        response = await call.read()
        if response is grpc.aio.EOF:
            raise Unavailable(await call.details() or "control refused the session")
        self._on_message(response)
        if response.WhichOneof("message") != "welcome":
            raise Unavailable("control did not answer the hello")
        return response.welcome  # type: ignore[no-any-return]

    def _note_history(self, welcome: coordination.Welcome) -> None:
        if not welcome.HasField("history"):
            return
        before, self.history = self.history, welcome.history
        if before not in (None, welcome.history):
            _log.warning("storage_was_restored", before=before, history=welcome.history)
            self._reports.clear()
            self._on_other_history()

    async def _both_ways(self, call: Any, welcome: coordination.Welcome) -> None:
        interval_s = welcome.heartbeat_interval_s or 0.5
        unanswered_max = 0
        if welcome.answers_heartbeats:
            unanswered_max = max(_UNANSWERED_LEAST, math.ceil(welcome.lease_ttl_s / interval_s))
        self._unanswered = 0
        tasks = [
            asyncio.create_task(self._receive(call)),
            asyncio.create_task(self._send(call)),
            asyncio.create_task(self._beat(interval_s, unanswered_max)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done and not _is_silence(done):
                # The receiver knows why a session ended.
                await asyncio.wait([tasks[0]], timeout=1.0)
            ended = tasks[0] if tasks[0].done() else next(iter(done))
            if ended.cancelled():
                # Not this task: the call was, and that must not end the member's search.
                raise Unavailable("the call was cancelled")
            ended.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, call: Any) -> None:
        while (response := await call.read()) is not grpc.aio.EOF:
            self._unanswered = 0
            self._on_message(response)
        raise Unavailable(await call.details() or "control ended the session")

    async def _send(self, call: Any) -> None:
        while True:
            if not self._reports:
                if self._leaving:
                    # The receiver sees when control has heard it all.
                    await call.done_writing()
                    await asyncio.Event().wait()
                self._something.clear()
                await self._something.wait()
                continue
            # Kept until it is written: a broken session sends it again, and reports are idempotent.
            message = self._reports[0]
            await call.write(message)
            if self._reports and self._reports[0] is message:
                self._reports.popleft()

    async def _beat(self, interval_s: float, unanswered_max: int) -> None:
        """Send heartbeats; with `unanswered_max` (0: no limit) end the session of a mute control.

        Counted in heartbeats and not in seconds, since this process may have been the one asleep.
        """
        while True:
            if 0 < unanswered_max <= self._unanswered:
                raise _Silent(
                    f"control has not answered {number_of(self._unanswered, 'heartbeat')}"
                )
            self._unanswered += 1
            self.report(coordination.SessionRequest(heartbeat=self._heartbeat()))
            await asyncio.sleep(interval_s)


def _is_silence(done: set[asyncio.Task[None]]) -> bool:
    return any(not task.cancelled() and isinstance(task.exception(), _Silent) for task in done)
