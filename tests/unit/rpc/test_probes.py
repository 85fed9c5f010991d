"""The port for probes: what it says, to whom, and how little of a process it takes up."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import coordinator.aggregation.process
import coordinator.control.process
import storage.runtime
import worker.main
from coordinator.aggregation.config import AggregatorConfig
from coordinator.control.config import ControlConfig
from phalanx.config import ServerConfig, build
from phalanx.errors import FailedPrecondition
from phalanx.rpc import health
from phalanx.rpc.probes import REQUEST_LIMIT_BYTES
from phalanx.rpc.server import Server
from storage.config import StorageConfig
from worker.config import WorkerConfig

GUARD_S = 20.0
SERVICE = "phalanx.v1.JobService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server(
        listen="127.0.0.1:0",
        metrics_listen=None,
        service_names=[SERVICE],
        probe_listen="127.0.0.1:0",
    )
    await server.start()
    yield server
    await server.stop(0)


@pytest.fixture
async def probes(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel as a stranger makes it."""
    async with grpc.aio.insecure_channel(server.probe_address) as channel:
        yield channel


async def ask(channel: grpc.aio.Channel, service: str = "") -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=GUARD_S
    )
    return int(answer.status)


async def test_it_says_what_health_says(server: Server, probes: grpc.aio.Channel) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        for serving, state in ((None, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
            if serving is not None:
                server.set_serving(serving)
            for service in ("", SERVICE):
                assert await ask(probes, service) == await ask(channel, service) == state
            assert await ask(probes, health.LIVENESS) == SERVING


async def test_a_service_that_is_not_there_is_not_found(probes: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(probes, "readyness")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_more_than_a_name_is_refused(probes: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(probes, "x" * REQUEST_LIMIT_BYTES)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await ask(probes, health.LIVENESS) == SERVING


async def test_it_says_no_for_as_long_as_the_server_ends(
    server: Server, probes: grpc.aio.Channel
) -> None:
    server.set_serving(True)
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        # The open stream holds it back.
        stopping = asyncio.create_task(server.stop(grace_s=GUARD_S))
        assert (await watch.read()).status == NOT_SERVING
        assert await ask(probes) == NOT_SERVING
        assert await ask(probes, health.LIVENESS) == SERVING
        watch.cancel()
        await stopping
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(probes)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_without_an_address_there_is_none() -> None:
    server = Server(listen="127.0.0.1:0", metrics_listen=None, service_names=[])
    await server.start()
    assert server.probe_address == ""
    await server.stop(0)


async def test_a_port_in_use_is_an_error_that_names_the_address(server: Server) -> None:
    second = Server(
        listen="127.0.0.1:0",
        metrics_listen=None,
        service_names=[],
        probe_listen=server.probe_address,
    )
    with pytest.raises(FailedPrecondition, match=f"{server.probe_address}: the port is in use"):
        await second.start()
    await second.stop(0)


class _MadeError(Exception):
    pass


@pytest.mark.parametrize(
    ("module", "config_class", "make"),
    [
        (storage.runtime, StorageConfig, storage.runtime.StorageProcess),
        (coordinator.control.process, ControlConfig, coordinator.control.process.ControlProcess),
        *(
            (
                module,
                config_class,
                lambda config, serve=module.serve: serve(config, asyncio.Event()),
            )
            for module, config_class in (
                (coordinator.aggregation.process, AggregatorConfig),
                (worker.main, WorkerConfig),
            )
        ),
    ],
    ids=["storage", "control", "aggregator", "worker"],
)
async def test_every_service_opens_the_one_of_its_settings(
    module, config_class: type[ServerConfig], make, tmp_path, monkeypatch
) -> None:
    made = {}

    def note(**settings: object) -> None:
        made.update(settings)
        raise _MadeError

    monkeypatch.setattr(module, "Server", note)
    flags = {"state": str(tmp_path)} if config_class is StorageConfig else {}
    flags |= {"cache_dir": str(tmp_path)} if config_class is WorkerConfig else {}
    config = build(config_class, flags, {"PHALANX_PROBE_LISTEN": "127.0.0.1:9411"})
    with pytest.raises(_MadeError):
        await make(config)
    assert made["probe_listen"] == "127.0.0.1:9411"
