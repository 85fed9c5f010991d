"""A port of its own on which strangers ask whether a process is well, in plaintext: for probes of
Kubernetes, which have neither a certificate nor a token.

It answers ``grpc.health.v1.Health/Check`` and nothing else: no other service, no reflection, no
``Watch``, which would keep a stream open for as long as somebody likes. The answers come from the
event loop and the states of the server it stands beside, so that both always say the same.
"""

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from phalanx.rpc import health
from phalanx.rpc.channel import Options
from phalanx.rpc.interceptors import CallInterceptor
from phalanx.rpc.limits import Admission, ServerLimits
from phalanx.rpc.ports import open_port, server_options
from phalanx.telemetry.metrics import GrpcServerMetrics

REQUEST_LIMIT_BYTES = 1024
"""The name of a service, and room to spare."""

LIMITS = ServerLimits(
    connections_max=64,
    peer_connections_max=32,
    calls_max=64,
    peer_calls_max=32,
    connection_streams_max=4,
    first_message_timeout_s=2.0,
    idle_connection_s=5.0,
)
"""A probe is one call on a connection of its own."""

OPTIONS: Options = [
    ("grpc.max_receive_message_length", REQUEST_LIMIT_BYTES),
    ("grpc.max_send_message_length", REQUEST_LIMIT_BYTES),
    ("grpc.absolute_max_metadata_size", 4096),
    # Who keeps connections open, by whatever means, must not keep probes out.
    ("grpc.max_connection_age_ms", 10_000),
    ("grpc.max_connection_age_grace_ms", 2_000),
]


class ProbeServer:
    """Tells what a health servicer says, at ``listen`` (port 0: a free one). Make it inside the
    event loop that runs it."""

    def __init__(
        self, listen: str, servicer: health.HealthServicer, metrics: GrpcServerMetrics
    ) -> None:
        self._listen = listen
        interceptor = CallInterceptor(metrics, Admission(LIMITS), LIMITS.first_message_timeout_s)
        self._raw: grpc.aio.Server = grpc.aio.server(
            interceptors=[interceptor], options=server_options(OPTIONS, LIMITS)
        )
        check = grpc.unary_unary_rpc_method_handler(
            servicer.Check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        self._raw.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check}),)
        )
        self.address = ""

    async def start(self) -> None:
        """Bind and answer. Raises FailedPrecondition, naming the address, if it cannot be used."""
        address = open_port(self._raw, self._listen, None)
        await self._raw.start()
        self.address = address

    async def stop(self) -> None:
        """Close the port; harmless when it was never open."""
        await self._raw.stop(0)
