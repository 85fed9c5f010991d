"""What a transport does with its channels."""

import threading
from typing import Any

import grpc
import pytest

from phalanx.errors import NotFound, Unavailable
from phalanx.rpc.status import to_rpc_status
from phalanx.sdk import transport
from phalanx.sdk.methods import GET_CLUSTER
from phalanx.sdk.transport import AWAY_S, ROUNDS, Transport
from phalanx.v1.cluster_service_pb2 import GetClusterRequest, GetClusterResponse


class Channel:
    """A channel with a call that has no end: closing waits for it."""

    def __init__(self) -> None:
        self.call_ends = threading.Event()
        self.begun = False

    def close(self) -> None:
        self.begun = True
        self.call_ends.wait()


def test_a_channel_that_does_not_close_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CLOSE_S", 0.01)
    channels: Any = {"a:1": Channel(), "b:1": Channel()}
    opened = Transport(["a:1", "b:1"])
    opened._channels = dict(channels)
    opened.close()
    assert all(channel.begun for channel in channels.values())
    assert not opened._channels
    for channel in channels.values():
        channel.call_ends.set()


class Away(grpc.RpcError):
    """What a call to a process that is not there raises."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "connection refused"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Refused(Away):
    """What a call that the server answers with an error raises."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.NOT_FOUND


class SentAway(grpc.RpcError):
    """A process answers, and says why it cannot serve the call now."""

    def __init__(self, reason: str) -> None:
        self._status = to_rpc_status(Unavailable("try again", reason=reason, retry_after_s=0.2))

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self) -> Any:
        return self._status.trailing_metadata


class Restarting:
    """A server that is away for some time, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.back_s = 0.0
        self.attempts = 0
        self.refuses = False
        self.sends_away: grpc.RpcError | None = None
        monkeypatch.setattr("phalanx.sdk.transport.time", self)

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def unary_unary(self, *_: Any, **__: Any) -> Any:
        return self.answer

    def answer(self, _: GetClusterRequest, **__: Any) -> GetClusterResponse:
        self.attempts += 1
        if self.refuses:
            raise Refused
        if self.now_s < self.back_s:
            raise self.sends_away or Away
        return GetClusterResponse()

    def close(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Restarting:
    restarting = Restarting(monkeypatch)
    monkeypatch.setattr(transport, "open_sync_channel", lambda _, __=None: restarting)
    return restarting


def test_a_call_outlasts_the_restart_of_a_cluster_that_has_answered(server: Restarting) -> None:
    opened = Transport(["a:1"])
    opened.call(GET_CLUSTER, GetClusterRequest())
    server.back_s = server.now_s + AWAY_S - 1
    opened.call(GET_CLUSTER, GetClusterRequest())
    server.back_s, begun_s = server.now_s + 1000, server.now_s
    with pytest.raises(Unavailable, match="cannot reach the cluster at a:1"):
        opened.call(GET_CLUSTER, GetClusterRequest())
    assert AWAY_S <= server.now_s - begun_s < AWAY_S + 2


@pytest.mark.parametrize("reason", ["NOT_LEADER", "STORAGE_UNAVAILABLE"])
def test_a_call_outlasts_a_cluster_that_sends_callers_away(server: Restarting, reason: str) -> None:
    """Another control process takes over a lease after the death of the one that led."""
    opened = Transport(["a:1", "b:1"])
    server.sends_away = SentAway(reason)
    server.back_s = server.now_s + AWAY_S - 1
    opened.call(GET_CLUSTER, GetClusterRequest())
    server.back_s, begun_s = server.now_s + 1000, server.now_s
    with pytest.raises(Unavailable) as refused:
        opened.call(GET_CLUSTER, GetClusterRequest())
    assert refused.value.reason == reason
    assert AWAY_S <= server.now_s - begun_s < AWAY_S + 2


def test_the_deadline_of_the_call_holds_meanwhile(server: Restarting) -> None:
    opened = Transport(["a:1"])
    opened.call(GET_CLUSTER, GetClusterRequest())
    server.back_s, begun_s = server.now_s + 1000, server.now_s
    with pytest.raises(Unavailable):
        opened.call(GET_CLUSTER, GetClusterRequest(), timeout_s=3)
    assert server.now_s - begun_s < 3


def test_an_address_where_nobody_ever_answered_is_given_up_at_once(server: Restarting) -> None:
    server.back_s, begun_s = server.now_s + 1000, server.now_s
    with pytest.raises(Unavailable):
        Transport(["a:1"]).call(GET_CLUSTER, GetClusterRequest())
    assert server.attempts == ROUNDS
    assert server.now_s - begun_s < 2


def test_an_error_of_the_cluster_is_an_answer(server: Restarting) -> None:
    opened = Transport(["a:1"])
    server.refuses = True
    with pytest.raises(NotFound):
        opened.call(GET_CLUSTER, GetClusterRequest())
    server.refuses = False
    server.back_s = server.now_s + AWAY_S - 1
    opened.call(GET_CLUSTER, GetClusterRequest())


def test_a_call_may_be_given_more_time_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def answered(_address: str, _method: Any, _request: Any, timeout_s: float, _accept: Any) -> Any:
        limits.append(timeout_s)
        return GetClusterResponse()

    opened = Transport(["a:1"], timeout_s=100.0)
    monkeypatch.setattr(opened, "_attempt", answered)
    for more_s in (0.0, 1000.0):
        opened.call(GET_CLUSTER, GetClusterRequest(), more_s=more_s)
    usual, more = limits
    assert usual <= 100.0 < more <= 1100.0
