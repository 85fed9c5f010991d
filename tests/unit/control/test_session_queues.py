"""What waits for one member on its session has a bound: who does not read is sent away."""

from __future__ import annotations

import pytest

from coordinator.control import sessions as sessions_module
from coordinator.control.sessions import MemberSession, Sessions
from phalanx.errors import ResourceExhausted
from phalanx.keys.caller import Service
from phalanx.v1 import coordination_service_pb2 as pb

ROOM = 3


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Sessions:
    monkeypatch.setattr(sessions_module, "QUEUE_MAX", ROOM)
    return Sessions()


def message(generation: int = 1) -> pb.SessionResponse:
    return pb.SessionResponse(generation=generation)


def queued(session: MemberSession) -> list[object]:
    return [session.queue.get_nowait() for _ in range(session.queue.qsize())]


def test_a_member_that_does_not_read_is_told_so_after_what_it_was_sent(sessions: Sessions) -> None:
    session, other = (
        sessions.open(Service.WORKER, "worker-1"),
        sessions.open(Service.WORKER, "worker-1"),
    )
    for number in range(10 * ROOM):
        sessions.send(session.number, message(number))
    *sent, error = queued(session)
    assert sent == [message(number) for number in range(ROOM)]
    assert isinstance(error, ResourceExhausted)
    assert len(sessions) == 1
    sessions.send(other.number, message())
    assert queued(other) == [message()], "nobody else is concerned"


def test_a_member_that_reads_stays(sessions: Sessions) -> None:
    session = sessions.open(Service.WORKER, "worker-1")
    for number in range(10 * ROOM):
        sessions.send(session.number, message(number))
        assert queued(session) == [message(number)]
    assert len(sessions) == 1


def test_there_is_a_bound_to_sessions_too(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "SESSIONS_MAX", 2)
    first, _ = (sessions.open(Service.WORKER, "worker-1") for _ in range(2))
    with pytest.raises(ResourceExhausted, match="2 sessions"):
        sessions.open(Service.WORKER, "worker-1")
    sessions.end(first.number, None)
    assert sessions.open(Service.WORKER, "worker-1")
