"""The standard health service, per service name, set without waiting."""

import asyncio
from collections.abc import Iterable

from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.errors import NotFound
from phalanx.rpc.types import ServicerContext

LIVENESS = "liveness"
"""The name under which a server serves for as long as it answers at all: what may decide whether
its process is killed. A process that waits for another one must not be."""

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_SERVING: int = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: int = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers Check and Watch for the given services and for the whole server (the empty name).

    grpcio's own servicer sets states in coroutines only and starts as serving; a Phalanx server
    serves when it says so.
    """

    def __init__(self, service_names: Iterable[str]) -> None:
        self._states: dict[str, int] = dict.fromkeys(("", *service_names), _NOT_SERVING)
        self._states[LIVENESS] = _SERVING
        self._changed = asyncio.Event()

    def set(self, serving: bool, service: str = "") -> None:
        """Set one service, or all of them with the empty name, and wake the watchers."""
        state = _SERVING if serving else _NOT_SERVING
        for name in self._states if service == "" else (service,):
            if name != LIVENESS:
                self._states[name] = state
        self._changed.set()
        self._changed = asyncio.Event()

    def serving(self, service: str = "") -> bool:
        """Return what ``set`` said last."""
        return self._states[service] == _SERVING

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Answer the present state."""
        state = self._states.get(request.service)
        if state is None:
            raise NotFound(f"this server has no service {request.service[:100]!r}")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> None:
        """Send the state now and whenever it changes."""
        last = None
        while True:
            changed = self._changed
            state = self._states.get(request.service, _UNKNOWN)
            if state != last:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                last = state
            else:
                await changed.wait()
