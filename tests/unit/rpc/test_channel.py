"""Addresses, and the retry policy: what is retried, how often, and within which time."""

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from phalanx.errors import FailedPrecondition, InvalidArgument, Unavailable
from phalanx.rpc import channel as channel_module
from phalanx.rpc.channel import call_with_retry, channel_options, target_of
from phalanx.rpc.status import to_rpc_status


def _rpc_error(error: Exception) -> grpc.aio.AioRpcError:
    status = to_rpc_status(error)  # type: ignore[arg-type]
    trailer = grpc.aio.Metadata(*status.trailing_metadata)
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailer, status.details)


class Method:
    """A unary method that raises the given errors and then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.timeouts: list[float] = []

    async def __call__(self, request: Any, *, timeout: float) -> str:
        self.timeouts.append(timeout)
        if self.errors:
            raise _rpc_error(self.errors.pop(0))
        return f"answer to {request}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits do not pass; they are written down, and move the clock that the policy reads."""
    waited: list[float] = []
    now = [1000.0]

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    def sleep_sync(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(channel_module.asyncio, "sleep", sleep)
    monkeypatch.setattr(channel_module.time, "sleep", sleep_sync)
    monkeypatch.setattr(channel_module.time, "monotonic", lambda: now[0])
    return waited


def _soon() -> Unavailable:
    return Unavailable("later", retry_after_s=None)


async def test_unavailable_is_retried_with_growing_jittered_waits(waits: list[float]) -> None:
    method = Method(_soon(), _soon(), _soon())
    assert await call_with_retry(method, "x", timeout_s=10) == "answer to x"
    assert len(waits) == 3
    for wait, base in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert 0.8 * base <= wait <= 1.2 * base
    assert method.timeouts[0] == 10
    assert method.timeouts[3] == pytest.approx(10 - sum(waits))


async def test_attempts_are_limited(waits: list[float]) -> None:
    method = Method(*[_soon()] * 9)
    with pytest.raises(Unavailable):
        await call_with_retry(method, "x", timeout_s=100, attempts=4)
    assert len(method.timeouts) == 4


async def test_no_wait_goes_past_the_deadline(waits: list[float]) -> None:
    method = Method(*[Unavailable("later", retry_after_s=2.0)] * 9)
    with pytest.raises(Unavailable):
        await call_with_retry(method, "x", timeout_s=5, attempts=9)
    assert sum(waits) < 5
    assert all(2.0 <= wait <= 2.4 for wait in waits)
    assert 1 <= len(waits) <= 2


@pytest.mark.parametrize("error", [FailedPrecondition("no"), InvalidArgument("no")])
async def test_other_errors_are_not_retried(waits: list[float], error: Exception) -> None:
    method = Method(error)
    with pytest.raises(type(error)):
        await call_with_retry(method, "x", timeout_s=10)
    assert (len(method.timeouts), waits) == (1, [])


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("127.0.0.1:7410", "127.0.0.1:7410"),
        ("control:7410", "control:7410"),
        (" 10.0.0.1:1, 10.0.0.2:2 ", "ipv4:10.0.0.1:1,10.0.0.2:2"),
    ],
)
def test_addresses_become_targets(address: str, target: str) -> None:
    assert target_of(address) == target


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:99999", "a:1,b:2"])
def test_wrong_addresses_are_refused(address: str) -> None:
    with pytest.raises(InvalidArgument):
        target_of(address)


def test_a_proxy_for_web_traffic_is_never_used() -> None:
    options: dict[str, Any] = dict(channel_options())
    assert options["grpc.enable_http_proxy"] == 0
    assert options["grpc.max_reconnect_backoff_ms"] <= 2000


async def test_a_proxy_in_the_environment_does_not_hijack_calls(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port_factory: Callable[[], int]
) -> None:
    from phalanx.rpc.channel import open_channel
    from phalanx.rpc.server import Server

    nowhere = f"http://127.0.0.1:{unused_tcp_port_factory()}"
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(name, nowhere)
        monkeypatch.setenv(name.upper(), nowhere)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server = Server(listen="127.0.0.1:0", metrics_listen=None, service_names=[])
    await server.start()
    async with open_channel(server.address) as channel:
        answer = await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30)
    await server.stop(grace_s=0)
    assert answer == b"\x08\x02"
