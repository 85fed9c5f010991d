"""Storage whose database or object store is away says that it is not ready, and stays alive."""

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.errors import Unavailable
from storage import runtime
from storage.backends.opening import Places, open_backend
from storage.config import StorageConfig
from storage.interfaces import Backend
from storage.service import readiness

GUARD_S = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "INTERVAL_S", 0.01)


async def test_health_tells_it_and_liveness_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = threading.Event()

    def check() -> None:
        if away.is_set():
            raise Unavailable("the database is away")

    def opened(places: Places, **options: Any) -> Backend:
        return dataclasses.replace(open_backend(places, **options), check=check)

    monkeypatch.setattr(runtime, "open_backend", opened)
    process = runtime.StorageProcess(StorageConfig(listen="127.0.0.1:0", state=tmp_path))
    await process.start()
    try:
        async with (
            asyncio.timeout(GUARD_S),
            grpc.aio.insecure_channel(process.server.address) as channel,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            away.set()
            assert (await watch.read()).status == NOT_SERVING
            alive = await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))
            assert alive.status == SERVING
            away.clear()
            assert (await watch.read()).status == SERVING
            watch.cancel()
    finally:
        await process.stop(0)
