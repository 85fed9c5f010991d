"""The small HTTP server answers two paths, and bad clients cannot hold it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from phalanx.telemetry import http
from phalanx.telemetry.http import MetricsServer

GUARD_S = 10.0


class Health:
    healthy = True


@pytest.fixture
async def server() -> AsyncIterator[MetricsServer]:
    registry = CollectorRegistry()
    Counter("phalanx_things_total", "Things.", registry=registry).inc(3)
    Health.healthy = True
    server = MetricsServer("127.0.0.1:0", registry, lambda: Health.healthy)
    await server.start()
    yield server
    await server.stop()


async def _ask(server: MetricsServer, request: bytes) -> tuple[str, str]:
    host, port = server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    async with asyncio.timeout(GUARD_S):
        answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return head, body


def _get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


async def test_metrics_in_the_formats_that_scrapers_ask_for(server: MetricsServer) -> None:
    head, body = await _ask(server, _get("/metrics"))
    assert head.startswith("HTTP/1.1 200 OK")
    assert "Content-Type: text/plain" in head
    assert "phalanx_things_total 3.0" in body
    head, body = await _ask(
        server, _get("/metrics?x=1", "Accept: application/openmetrics-text; version=1.0.0")
    )
    assert "application/openmetrics-text" in head
    assert body.endswith("# EOF\n")


async def test_healthz_tells_whether_the_service_can_be_used(server: MetricsServer) -> None:
    assert (await _ask(server, _get("/healthz")))[0].startswith("HTTP/1.1 200")
    Health.healthy = False
    head, body = await _ask(server, _get("/healthz"))
    assert head.startswith("HTTP/1.1 503")
    assert body == "not serving\n"


async def test_livez_is_well_for_as_long_as_somebody_answers(server: MetricsServer) -> None:
    Health.healthy = False
    assert (await _ask(server, _get("/livez")))[0].startswith("HTTP/1.1 200")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET /etc/passwd HTTP/1.1", "404"), ("POST /metrics HTTP/1.1", "405"), ("\xff", "405")],
)
async def test_anything_else_is_refused(
    server: MetricsServer, request_line: str, status: str
) -> None:
    head, _ = await _ask(server, request_line.encode("latin-1") + b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}")


async def test_head_has_no_body(server: MetricsServer) -> None:
    head, body = await _ask(server, b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    assert body == ""


async def test_endless_request_is_cut_off(server: MetricsServer) -> None:
    head, body = await _ask(server, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000)
    assert (head, body) == ("", "")


async def test_mute_connection_is_closed(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_REQUEST_TIMEOUT_S", 0.01)
    assert await _ask(server, b"") == ("", "")


async def test_more_connections_than_the_bound_are_closed_at_once(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_CONNECTIONS", 1)
    monkeypatch.setattr(http, "_REQUEST_TIMEOUT_S", 10 * GUARD_S)
    host, port = server.address.split(":")
    _, first = await asyncio.open_connection(host, int(port))
    reader, second = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(GUARD_S):
        assert await reader.read() == b""
    first.close()
    second.close()


async def test_stop_does_not_wait_for_mute_clients(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_REQUEST_TIMEOUT_S", 10 * GUARD_S)
    host, port = server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await _ask(server, _get("/healthz"))  # By now the mute connection has been accepted as well.
    async with asyncio.timeout(GUARD_S):
        await server.stop()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()
