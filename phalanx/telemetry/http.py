"""``/metrics``, ``/healthz`` and ``/livez`` over HTTP, served by the event loop of the process.

The answer to ``/healthz`` comes from the same loop as the service's own answers: a process whose
loop is stuck looks unhealthy because it is. ``/livez`` is well for as long as that loop answers at
all. Requests are small and bounded in size, time and number.
"""

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from phalanx.addresses import bind_error, split_address

_REQUEST_LIMIT_BYTES = 8192
_REQUEST_TIMEOUT_S = 5.0
_CONNECTIONS = 64


class MetricsServer:
    """One small HTTP server; ``healthy`` is asked at each ``/healthz``."""

    def __init__(
        self, listen: str, registry: CollectorRegistry, healthy: Callable[[], bool]
    ) -> None:
        self._listen = listen
        self._registry = registry
        self._healthy = healthy
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = ""

    async def start(self) -> None:
        """Bind; ``address`` is then the real HOST:PORT. Raises FailedPrecondition if taken."""
        host, port = split_address(self._listen)
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=_REQUEST_LIMIT_BYTES
            )
        except OSError as error:
            raise bind_error(self._listen, error) from error
        bound_port = self._server.sockets[0].getsockname()[1]
        self.address = f"{host}:{bound_port}"

    async def stop(self) -> None:
        """Close all sockets; harmless when none was ever open."""
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if len(self._writers) <= _CONNECTIONS:
                async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head.decode("latin-1")))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # A mute, vanished or endless client; closing is all the answer it gets.
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, head: str) -> bytes:
        request, *lines = head.split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "text/plain", b"only GET\n", method)
        if path == "/healthz":
            healthy = self._healthy()
            status = "200 OK" if healthy else "503 Service Unavailable"
            return _response(status, "text/plain", b"ok\n" if healthy else b"not serving\n", method)
        if path == "/livez":
            return _response("200 OK", "text/plain", b"ok\n", method)
        if path == "/metrics":
            encode, content_type = choose_encoder(_accept(lines))
            return _response("200 OK", content_type, encode(self._registry), method)
        return _response(
            "404 Not Found", "text/plain", b"only /metrics, /healthz, /livez\n", method
        )


def _accept(lines: list[str]) -> str:
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() == "accept":
            return value.strip()
    return ""


def _response(status: str, content_type: str, body: bytes, method: str) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)
