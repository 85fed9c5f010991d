"""What operators and strangers see of the service: health, reflection, metrics, settings."""

import asyncio
import urllib.request

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from phalanx.rpc.channel import open_channel
from storage.__main__ import main
from storage.runtime import SERVICE_NAMES


@pytest.fixture
async def channel(service):
    channel = open_channel(service.server.address)
    yield channel
    await channel.close()


async def test_every_service_is_healthy_while_it_serves(service, channel):
    stub = health_pb2_grpc.HealthStub(channel)

    async def states():
        requests = [health_pb2.HealthCheckRequest(service=name) for name in ("", *SERVICE_NAMES)]
        return {(await stub.Check(request, timeout=30)).status for request in requests}

    assert await states() == {health_pb2.HealthCheckResponse.SERVING}
    service.server.set_serving(False)
    assert await states() == {health_pb2.HealthCheckResponse.NOT_SERVING}


async def test_reflection_shows_the_services(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), timeout=30)
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert set(SERVICE_NAMES) <= names
    assert SERVICE_NAMES == (
        "phalanx.v1.StorageService",
        "phalanx.v1.DatasetService",
        "phalanx.v1.ModelService",
    )


async def test_metrics(service, client):
    await client.put_blob(b"content")
    await service.collector.show_usage()

    def get(path):
        url = f"http://{service.server.metrics_address}{path}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status, response.read().decode()

    status, text = await asyncio.to_thread(get, "/metrics")
    assert status == 200
    for line in (
        (
            'phalanx_storage_operation_seconds_count{backend="embedded",operation="put_blob",'
            'outcome="ok"} 1.0'
        ),
        'phalanx_storage_bytes{kind="blobs"} 7.0',
        "phalanx_storage_corruptions_total 0.0",
        (
            'grpc_server_handled_total{grpc_code="OK",grpc_method="PutBlob",'
            'grpc_service="phalanx.v1.StorageService"} 1.0'
        ),
    ):
        assert line in text
    assert (await asyncio.to_thread(get, "/healthz"))[0] == 200


async def test_a_message_of_200_mb_is_refused_and_the_service_goes_on(service, client):
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(service.server.address, options) as channel:
        append = channel.unary_unary("/phalanx.v1.StorageService/AppendJournal")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await append(bytes(200 * 1024 * 1024), timeout=60)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await client.append_journal("control", [b"a"], expected_sequence=0) == 1


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--state", "--listen", "--reserve-bytes", "--gc-grace-s", "--gc-interval-s"):
        assert flag in text


def test_a_missing_state_folder_is_said(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--listen", "127.0.0.1:0"])
    assert caught.value.code == 2
    assert "--state: is required" in capsys.readouterr().err
