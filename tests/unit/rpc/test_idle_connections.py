"""Connections with TLS on which nobody calls are closed, whatever else comes on them.

A host can have as many as a server takes at all (gRPC does not show whose they are), so that they
end by themselves is what gives others their turn.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phalanx.addresses import split_address
from phalanx.rpc import ports
from phalanx.rpc.limits import ServerLimits
from phalanx.rpc.server import Server
from phalanx.testing.keys import KeyRing

GUARD_S = 20.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2 for the connection itself."""
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


SETTINGS = frame(4)
PING = frame(6, b"12345678")
WINDOW_UPDATE = frame(8, (1).to_bytes(4, "big"))


@pytest.fixture
async def address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> AsyncIterator[str]:
    """A server with keys, at the port where anybody gets through the handshake."""
    if not first:
        monkeypatch.setattr(ports, "HANDSHAKE_TIMEOUT_MS", 300)
    server = Server(
        listen="127.0.0.1:0",
        metrics_listen=None,
        service_names=[],
        keys=KeyRing(tmp_path / "keys").server("control"),
        public_listen="127.0.0.1:0",
        limits=ServerLimits(idle_connection_s=0.1),
    )
    await server.start()
    yield server.public_address
    await server.stop(0)


def anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


async def connected(
    host: str, port: int, tls: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection, with TLS once the handshake was in time, as it may not be at first."""
    async with asyncio.timeout(GUARD_S):
        while True:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                return await asyncio.open_connection(host, port, ssl=anybody() if tls else None)


@pytest.mark.parametrize(
    ("tls", "first", "then"),
    [
        pytest.param(False, b"", b"", id="no handshake"),
        pytest.param(True, b"", b"", id="a handshake alone"),
        pytest.param(True, PREFACE + SETTINGS, b"", id="an idle client"),
        pytest.param(True, PREFACE + SETTINGS, PING, id="pings"),
        pytest.param(True, PREFACE + SETTINGS, SETTINGS, id="settings"),
        pytest.param(True, PREFACE + SETTINGS, WINDOW_UPDATE, id="updates of windows"),
    ],
)
async def test_it_is_closed(address: str, tls: bool, first: bytes, then: bytes) -> None:
    host, port = split_address(address)
    reader, writer = await connected(host, port, tls)

    async def keep_open() -> None:
        writer.write(first)
        while then:
            writer.write(then)
            await asyncio.sleep(0.01)

    keeping = asyncio.create_task(keep_open())
    try:
        async with asyncio.timeout(GUARD_S):
            while await reader.read(4096):
                pass
    except ConnectionResetError:
        pass  # what was written met a closed connection
    finally:
        keeping.cancel()
        writer.close()
