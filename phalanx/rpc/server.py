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

from phalanx.rpc import health
from phalanx.rpc.authentication import Gate
from phalanx.rpc.channel import Options
from phalanx.rpc.credentials import ServerKeys
from phalanx.rpc.interceptors import CallInterceptor
from phalanx.rpc.limits import Admission, ServerLimits, make_room_for_connections
from phalanx.rpc.ports import open_port, server_options
from phalanx.rpc.probes import ProbeServer
from phalanx.telemetry import traces
from phalanx.telemetry.http import MetricsServer
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import GrpcServerMetrics, TraceMetrics, new_registry

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


class Server:
    """A gRPC server and its ``/metrics`` and ``/healthz``.

    ``listen`` and ``metrics_listen`` are HOST:PORT (port 0: a free one); with ``metrics_listen``
    None there is no HTTP server. ``service_names`` are the full names of the services that will be
    added; they get health states and are shown by reflection. ``registry`` is where the metrics of
    this process live; ``limits`` is what its peers may take up. ``interceptors`` come after the one
    that turns errors into statuses. Make it inside the event loop that runs it.

    With ``keys`` callers need a certificate, and what each may do is said by ``phalanx.keys``; at
    ``public_listen`` they need none and prove themselves by a token alone. At ``probe_listen``
    anybody may ask in plaintext whether the process is well, with keys as well.
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
        probe_listen: str = "",
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
        metrics = GrpcServerMetrics(self.registry)
        interceptor = CallInterceptor(
            metrics,
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
        self._probes = ProbeServer(probe_listen, self._health, metrics) if probe_listen else None
        if reflection:
            _add_reflection(self.raw, service_names)
        self._http: MetricsServer | None = None
        if metrics_listen is not None:
            self._http = MetricsServer(metrics_listen, self.registry, self._health.serving)
        self.address = ""
        self.public_address = ""

    @property
    def probe_address(self) -> str:
        """HOST:PORT of the port for probes; empty without one or before ``start``."""
        return self._probes.address if self._probes is not None else ""

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
        if self._probes is not None:
            await self._probes.start()
        await self.raw.start()
        self.address, self.public_address = address, public

    def _bind(self, listen: str, *, mutual: bool) -> str:
        credentials = self._keys.credentials(mutual=mutual) if self._keys is not None else None
        return open_port(self.raw, listen, credentials)

    def set_serving(self, serving: bool, service: str = "") -> None:
        """Say in health whether a service, or with the empty name everything, can be used."""
        self._health.set(serving, service)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, give open ones ``grace_s`` to end, cancel the rest."""
        self.set_serving(False)
        await self.raw.stop(grace_s)
        # Who probes hears until the end that the process ends.
        if self._probes is not None:
            await self._probes.stop()
        if self._http is not None:
            await self._http.stop()


def _add_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> None:
    shown = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(shown, server)
