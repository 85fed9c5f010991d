"""Server side: one ``grpc.aio`` server with health, reflection, limits, metrics and clean errors.

    server = Server(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0",
                    service_names=["phalanx.v1.JobService"])
    add_JobServiceServicer_to_server(servicer, server.raw)
    await server.start()
    server.set_serving(True)
    ...
    await server.stop()

Servicers raise ``PhalanxError``; the interceptor does the rest. Handlers are coroutines (for
streams: async generators, or coroutines that read and write through their context).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import grpc.aio
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from phalanx.addresses import explain_bind_failure, split_address
from phalanx.rpc import health
from phalanx.rpc.authentication import Gate
from phalanx.rpc.channel import MESSAGE_LIMIT_BYTES, Options
from phalanx.rpc.credentials import ServerKeys
from phalanx.rpc.interceptors import CallInterceptor
from phalanx.rpc.limits import Admission, ServerLimits, make_room_for_connections
from phalanx.telemetry import traces
from phalanx.telemetry.http import MetricsServer
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import GrpcServerMetrics, TraceMetrics, new_registry

HANDSHAKE_TIMEOUT_MS = 3000
_DEFAULT_LIMITS = ServerLimits()

FIXED_WINDOWS: Options = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
]
"""Options of a server that strangers may send to: so much of a stream is received before somebody
reads it. Otherwise the window follows the speed of the line, on a fast one to tens of mebibytes,
which a caller fills with a message that is refused. Messages within the limit are still let in
whole."""

_log = get_logger(__name__)


def server_options(
    extra: Iterable[tuple[str, Any]] = (), limits: ServerLimits = _DEFAULT_LIMITS
) -> Options:
    """Return the options of every server; one in ``extra`` replaces the usual one."""
    return [
        # Of two options with one name gRPC takes the first.
        *extra,
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
        # A compressed message is refused before a byte of it is inflated.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Connections that never say a word are closed, later those that have nothing to say; a
        # bound on calls stops one client starving others.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", int(limits.idle_connection_s * 1000)),
        ("grpc.max_allowed_incoming_connections", limits.connections_max),
        ("grpc.max_concurrent_streams", limits.connection_streams_max),
        # With it a second server on a used port would silently share its connections.
        ("grpc.so_reuseport", 0),
        # Must allow what channel_options() of our clients does, or healthy calls die as
        # "too_many_pings".
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


class Server:
    """A gRPC server and its ``/metrics`` and ``/healthz``.

    ``listen`` and ``metrics_listen`` are HOST:PORT (port 0: a free one); with ``metrics_listen``
    None there is no HTTP server. ``service_names`` are the full names of the services that will be
    added; they get health states and are shown by reflection. ``registry`` is where the metrics of
    this process live; ``limits`` is what its peers may take up. ``interceptors`` come after the one
    that turns errors into statuses. Make it inside the event loop that runs it.

    With ``keys`` callers need a certificate, and what each may do is said by ``phalanx.keys``; at
    ``public_listen`` they need none and prove themselves by a token alone.
    """

    def __init__(
        self,
        *,
        listen: str,
        metrics_listen: str | None,
        service_names: Sequence[str],
        reflection: bool = True,
        registry: CollectorRegistry | None = None,
        limits: ServerLimits = _DEFAULT_LIMITS,
        options: Iterable[tuple[str, Any]] = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        keys: ServerKeys | None = None,
        public_listen: str = "",
    ) -> None:
        self._keys = keys
        self._listen = listen
        self._public_listen = public_listen
        self.registry = registry if registry is not None else new_registry()
        room = make_room_for_connections(limits)
        if room < limits.connections_max:
            _log.warning("few_files", connections_max=room, wanted=limits.connections_max)
            limits = replace(limits, connections_max=room)
        self.admission = Admission(limits)
        interceptor = CallInterceptor(
            GrpcServerMetrics(self.registry),
            self.admission,
            limits.first_message_timeout_s,
            Gate(keys.tokens) if keys is not None else None,
        )
        tracing = traces.active()
        if tracing is not None:
            tracing.queue.on_count = TraceMetrics(self.registry).count
        self.raw: grpc.aio.Server = grpc.aio.server(
            interceptors=[interceptor, *interceptors], options=server_options(options, limits)
        )
        self._health = health.HealthServicer(service_names)
        add_HealthServicer_to_server(self._health, self.raw)
        if reflection:
            _add_reflection(self.raw, service_names)
        self._http: MetricsServer | None = None
        if metrics_listen is not None:
            self._http = MetricsServer(metrics_listen, self.registry, self._health.serving)
        self.address = ""
        self.public_address = ""

    @property
    def metrics_address(self) -> str:
        """HOST:PORT of ``/metrics``; empty without one or before ``start``."""
        return self._http.address if self._http is not None else ""

    async def start(self) -> None:
        """Bind and accept calls; ``address`` is then the real HOST:PORT.

        Raises FailedPrecondition, naming the address, when it cannot be used. Health says "not
        serving" until ``set_serving``.
        """
        address = self._bind(self._listen, mutual=True)
        public = self._bind(self._public_listen, mutual=False) if self._public_listen else ""
        if self._http is not None:
            await self._http.start()
        await self.raw.start()
        self.address, self.public_address = address, public

    def _bind(self, listen: str, *, mutual: bool) -> str:
        """Open a port; return its real HOST:PORT. This is the one place where one is opened."""
        try:
            if self._keys is None:
                port = self.raw.add_insecure_port(listen)
            else:
                port = self.raw.add_secure_port(listen, self._keys.credentials(mutual=mutual))
        except RuntimeError as error:
            raise explain_bind_failure(listen) from error
        host, _ = split_address(listen)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def set_serving(self, serving: bool, service: str = "") -> None:
        """Say in health whether a service, or with the empty name everything, can be used."""
        self._health.set(serving, service)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, give open ones ``grace_s`` to end, cancel the rest."""
        self.set_serving(False)
        await self.raw.stop(grace_s)
        if self._http is not None:
            await self._http.stop()


def _add_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> None:
    shown = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(shown, server)
