"""A member's session with control: whatever breaks it, another one is opened."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from phalanx.errors import Unavailable
from phalanx.rpc import member_session
from phalanx.rpc.member_session import MemberSession, Search
from phalanx.testing.worker_peers import ScriptedControl
from phalanx.v1 import coordination_service_pb2 as pb

GUARD_S = 30.0


def hello() -> pb.SessionRequest:
    return pb.SessionRequest(worker_hello=pb.WorkerHello(worker_id="w1", incarnation="1"))


@pytest.mark.parametrize("where", ["message", "open", "heartbeat", "hello"])
async def test_a_defect_in_a_handler_costs_one_session_and_not_the_member(where: str) -> None:
    broken = {where}
    opened = asyncio.Event()

    def fail_once(here: str) -> None:
        if here in broken:
            broken.remove(here)
            raise ValueError("a defect")

    def make_hello() -> pb.SessionRequest:
        fail_once("hello")
        return hello()

    def make_heartbeat() -> pb.Heartbeat:
        fail_once("heartbeat")
        return pb.Heartbeat()

    def on_message(message: pb.SessionResponse) -> None:
        if message.HasField("drain"):
            fail_once("message")
            opened.set()

    async with ScriptedControl() as control:
        session = MemberSession(
            [control.address], make_hello, make_heartbeat, on_message, lambda _: fail_once("open")
        )
        session.start()
        try:
            async with asyncio.timeout(GUARD_S):
                if where != "hello":
                    first = await control.next_session()
                    if where == "message":
                        await first.send(drain=pb.Drain())
                again = await control.next_session()
                await again.send(drain=pb.Drain())
                await opened.wait()
        finally:
            await session.close()
    assert not broken


async def test_a_connection_that_cannot_be_closed_costs_one_session_and_not_the_member(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = []

    def open_channel(address: str, **options: Any) -> Any:
        channel = open_real(address, **options)
        opened.append(channel)
        if len(opened) == 1:
            close = channel.close

            async def fail() -> None:
                await close()
                raise asyncio.InvalidStateError("the call is over")

            monkeypatch.setattr(channel, "close", fail)
        return channel

    open_real = member_session.open_channel
    monkeypatch.setattr(member_session, "open_channel", open_channel)
    async with ScriptedControl() as control:
        session = MemberSession(
            [control.address], hello, pb.Heartbeat, lambda _: None, lambda _: None
        )
        session.start()
        try:
            async with asyncio.timeout(GUARD_S):
                (await control.next_session()).break_off()
                await control.next_session()
        finally:
            await session.close()
    assert len(opened) == 2


async def test_of_too_many_reports_the_oldest_go_and_are_counted() -> None:
    session = MemberSession(["127.0.0.1:1"], hello, pb.Heartbeat, lambda _: None, lambda _: None)
    for number in range(member_session._REPORTS_MAX + 2):
        ready = pb.WorkerJobReady(job_id="job-1", term=number)
        session.report(pb.SessionRequest(worker_job_ready=ready))
    waiting = [message.worker_job_ready.term for message in session._reports]
    assert waiting == list(range(2, member_session._REPORTS_MAX + 2))
    assert session.dropped_reports == 2


async def test_a_call_that_was_cancelled_is_one_session_that_ended() -> None:
    class CancelledCall:
        async def read(self) -> object:
            raise asyncio.CancelledError

        async def write(self, _: object) -> None:
            await asyncio.Event().wait()

    session = MemberSession(["127.0.0.1:1"], hello, pb.Heartbeat, lambda _: None, lambda _: None)
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Unavailable, match="cancelled"):
            await session._both_ways(CancelledCall(), pb.Welcome(heartbeat_interval_s=60.0))


async def test_a_control_that_holds_the_stream_and_says_nothing_is_left() -> None:
    """As a stopped process does: its sockets stay open, and no call ever fails."""
    async with ScriptedControl() as mute, ScriptedControl() as other:
        for control in (mute, other):
            control.welcome.answers_heartbeats = True
            control.welcome.lease_ttl_s = 0.2
        addresses = [mute.address, other.address]
        session = MemberSession(addresses, hello, pb.Heartbeat, lambda _: None, lambda _: None)
        session.start()
        try:
            await mute.next_session()
            await other.next_session()
        finally:
            await session.close()


async def test_a_control_that_answers_is_kept() -> None:
    async with ScriptedControl() as control:
        control.welcome.answers_heartbeats = True
        control.welcome.lease_ttl_s = 0.9  # 18 heartbeats of the 20
        session = MemberSession(
            [control.address], hello, pb.Heartbeat, lambda _: None, lambda _: None
        )
        session.start()
        try:
            opened = await control.next_session()
            for _ in range(20):
                await opened.receive("heartbeat")
                await opened.send(heartbeat_answer=pb.HeartbeatAnswer())
            assert session.connected
            assert control._sessions.empty(), "it never looked for another"
        finally:
            await session.close()


async def test_a_member_that_leaves_is_heard_to_its_last_word() -> None:
    """However late control reads: what is not read when a call is cancelled is lost."""
    async with ScriptedControl() as control:
        control.welcome.heartbeat_interval_s = 600.0
        session = MemberSession(
            [control.address], hello, pb.Heartbeat, lambda _: None, lambda _: None
        )
        session.start()
        opened = await control.next_session()
        await opened.receive("heartbeat")
        opened.reading.clear()
        for number in range(10):
            ready = pb.WorkerJobReady(job_id="job-1", term=number)
            session.report(pb.SessionRequest(worker_job_ready=ready))
        leaving = asyncio.create_task(_leave(session))
        for _ in range(10_000):
            await asyncio.sleep(0)
            if leaving.done():
                break
        opened.reading.set()
        await leaving
        heard = [(await opened.receive("worker_job_ready")).term for _ in range(10)]
        assert heard == list(range(10))
        assert control._sessions.empty(), "it did not come back"


async def _leave(session: MemberSession) -> None:
    try:
        await session.leave(GUARD_S)
    finally:
        await session.close()


async def test_who_leaves_does_not_wait_for_a_control_that_ended_the_session() -> None:
    async with ScriptedControl() as control:
        session = MemberSession(
            [control.address], hello, pb.Heartbeat, lambda _: None, lambda _: None
        )
        session.start()
        opened = await control.next_session()
        await opened.receive("heartbeat")
        opened.reading.clear()
        leaving = asyncio.create_task(_leave(session))
        opened.break_off()
        async with asyncio.timeout(GUARD_S / 2):
            await leaving


async def test_who_leaves_a_mute_control_goes_in_time() -> None:
    async with ScriptedControl() as control:
        session = MemberSession(
            [control.address], hello, pb.Heartbeat, lambda _: None, lambda _: None
        )
        session.start()
        opened = await control.next_session()
        await opened.receive("heartbeat")
        opened.reading.clear()
        async with asyncio.timeout(GUARD_S):
            await session.leave(0.01)
        await session.close()


async def test_a_session_is_settled_once_it_is_a_lease_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(member_session.time, "monotonic", lambda: now_s[0])
    async with ScriptedControl() as control:
        control.welcome.lease_ttl_s = 2.0
        session = MemberSession(
            [control.address], hello, pb.Heartbeat, lambda _: None, lambda _: None
        )
        assert not session.settled
        session.start()
        try:
            await (await control.next_session()).receive("heartbeat")
            assert session.connected
            assert not session.settled, "others may still come back to this leader"
            now_s[0] += 2.0
            assert session.settled
        finally:
            await session.close()
    assert not session.settled


def test_every_address_is_asked_well_within_a_lease_however_long_nobody_answered() -> None:
    search = Search(3)
    search.found(lease_ttl_s=2.0)
    for _ in range(60):
        search.wait_after(welcomed=False)
    turns = [search.turn]
    waited_s = 0.0
    for _ in range(3):
        waited_s += search.wait_after(welcomed=False)
        turns.append(search.turn)
    assert turns == [0, 1, 2, 0]
    assert waited_s <= 2.0 / 2


def test_without_a_lease_rounds_are_at_most_two_seconds_apart_and_a_welcome_begins_anew() -> None:
    search = Search(1)
    waits = [search.wait_after(welcomed=False) for _ in range(7)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert search.wait_after(welcomed=True) == 0.1
    assert search.wait_after(welcomed=False) == 0.1


async def test_members_that_lost_control_together_do_not_come_back_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever fails for all at the same moment, their next attempts are spread over some time."""
    rounds, members = 7, 200
    waits: list[list[float]] = []

    class Enough(Exception):
        """The member has waited for as many rounds as are looked at."""

    class Asyncio:
        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            waits[-1].append(seconds)
            if len(waits[-1]) == rounds:
                raise Enough

    async def unanswered(self: MemberSession, address: str) -> tuple[bool, str]:
        return False, "control does not answer"

    monkeypatch.setattr(member_session, "asyncio", Asyncio())
    monkeypatch.setattr(member_session, "random", random.Random(7))
    monkeypatch.setattr(MemberSession, "_once", unanswered)
    for _ in range(members):
        waits.append([])
        session = MemberSession(
            ["127.0.0.1:1"], hello, pb.Heartbeat, lambda _: None, lambda _: None
        )
        with pytest.raises(Enough):
            await session._keep_open()
    for number in range(rounds):
        attempts_s = [sum(each[: number + 1]) for each in waits]
        first_s, longest_s = min(attempts_s), max(each[number] for each in waits)
        crowds = Counter(int((at_s - first_s) / longest_s * 20) for at_s in attempts_s)
        assert max(crowds.values()) < members / 4, "too many in a twentieth of their wait"
    assert max(max(each) for each in waits) <= 2.0


def test_the_address_that_welcomed_is_asked_first() -> None:
    search = Search(2)
    search.wait_after(welcomed=False)
    search.wait_after(welcomed=True)
    assert search.turn == 1


async def test_what_waited_of_another_history_of_storage_is_not_said() -> None:
    begun: list[str] = []

    def on_open(_: pb.Welcome) -> None:
        begun.append("opened")

    async with ScriptedControl() as control:
        control.welcome.history = 0
        session = MemberSession(
            *([control.address], hello, pb.Heartbeat, lambda _: None, on_open),
            on_other_history=lambda: begun.append("other history"),
        )
        session.start()
        try:
            async with asyncio.timeout(GUARD_S):
                first = await control.next_session()
                control.welcome.history = 7
                session.report(pb.SessionRequest(drain_requested=pb.DrainRequested()))
                await first.receive("drain_requested")
                first.break_off()
                while session.connected:
                    await asyncio.sleep(0)
                session.report(pb.SessionRequest(drain_requested=pb.DrainRequested()))
                second = await control.next_session()
                while len(begun) < 3:
                    await asyncio.sleep(0)
                session.report(pb.SessionRequest(job_report=pb.JobReport(job_id="job-1")))
                await second.receive("job_report")
        finally:
            await session.close()
    assert begun == ["opened", "other history", "opened"]
    assert session.history == 7
    assert not second.has_received("drain_requested")
