"""A server on port 0: errors, limits, health, reflection, metrics, ports in use."""

import asyncio
import json
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from phalanx.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PhalanxError,
    Unavailable,
)
from phalanx.rpc.channel import MESSAGE_LIMIT_BYTES, call_with_retry, open_channel
from phalanx.rpc.health import LIVENESS
from phalanx.rpc.server import Server
from phalanx.rpc.status import from_rpc_error
from phalanx.rpc.types import ServicerContext
from phalanx.telemetry.logs import configure_logging
from phalanx.testing.logging import unconfigured_afterwards
from phalanx.v1 import job_service_pb2 as pb
from phalanx.v1 import job_service_pb2_grpc as stubs

SERVICE = "phalanx.v1.JobService"
GUARD_S = 30.0


class Servicer(stubs.JobServiceServicer):
    """Each method shows one way in which a handler can end."""

    def __init__(self) -> None:
        self.watch_closed = asyncio.Event()

    async def GetJob(
        self, request: pb.GetJobRequest, context: ServicerContext
    ) -> pb.GetJobResponse:
        raise NotFound(f"there is no job {request.job_id!r}")

    async def ListJobs(
        self, request: pb.ListJobsRequest, context: ServicerContext
    ) -> pb.ListJobsResponse:
        return pb.ListJobsResponse(next_page_token=request.page_token)

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: ServicerContext
    ) -> pb.CancelJobResponse:
        raise RuntimeError("password is in /etc/secret")

    async def PauseJob(
        self, request: pb.PauseJobRequest, context: ServicerContext
    ) -> pb.PauseJobResponse:
        await context.abort(grpc.StatusCode.DATA_LOSS, "aborted by hand")
        raise AssertionError

    async def ResumeJob(
        self, request: pb.ResumeJobRequest, context: ServicerContext
    ) -> pb.ResumeJobResponse:
        task = asyncio.create_task(asyncio.Event().wait())
        task.cancel()
        await task
        raise AssertionError

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: ServicerContext
    ) -> AsyncIterator[pb.WatchJobResponse]:
        try:
            yield pb.WatchJobResponse()
            if request.job_id == "endless":
                await asyncio.Event().wait()
            raise Aborted("not this term", reason="STALE_TERM", details={"current_term": "3"})
        finally:
            self.watch_closed.set()


@pytest.fixture
async def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def server(servicer: Servicer) -> AsyncIterator[Server]:
    server = Server(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", service_names=[SERVICE])
    stubs.add_JobServiceServicer_to_server(servicer, server.raw)

    async def echo(request: bytes, context: ServicerContext) -> bytes:
        return request

    async def size(request: bytes, context: ServicerContext) -> bytes:
        return str(len(request)).encode()

    async def relay(requests: AsyncIterator[bytes], context: ServicerContext) -> None:
        async for request in requests:
            if request == b"fail":
                raise InvalidArgument("bad frame")
            await context.write(request)

    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Size": grpc.unary_unary_rpc_method_handler(size),
        "Relay": grpc.stream_stream_rpc_method_handler(relay),
    }
    server.raw.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Raw", handlers),)
    )
    await server.start()
    yield server
    await server.stop(grace_s=0)


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(server.address) as channel:
        yield channel


async def _counted(
    registry: CollectorRegistry, method: str, code: str, service: str = SERVICE, times: int = 1
) -> bool:
    """Whether so many calls were counted; a caller may have its answer before the last one is."""
    labels = {"grpc_service": service, "grpc_method": method, "grpc_code": code}

    def count() -> float:
        return registry.get_sample_value("grpc_server_handled_total", labels) or 0.0

    async with asyncio.timeout(GUARD_S):
        while count() < times:
            await asyncio.sleep(0)
    return count() == times


async def test_error_of_a_servicer_reaches_the_caller_as_itself(
    server: Server, channel: grpc.aio.Channel
) -> None:
    with pytest.raises(NotFound, match="there is no job 'x'"):
        await call_with_retry(
            stubs.JobServiceStub(channel).GetJob, pb.GetJobRequest(job_id="x"), timeout_s=GUARD_S
        )
    assert await _counted(server.registry, "GetJob", "NOT_FOUND")


async def test_unexpected_error_tells_the_caller_nothing_and_the_log_everything(
    server: Server, channel: grpc.aio.Channel, capsys: pytest.CaptureFixture[str]
) -> None:
    with unconfigured_afterwards(), pytest.raises(grpc.aio.AioRpcError) as caught:
        configure_logging("test", "test-1")
        await stubs.JobServiceStub(channel).CancelJob(pb.CancelJobRequest(), timeout=GUARD_S)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    everything = f"{caught.value.details()} {caught.value.trailing_metadata()}"
    for secret in ("secret", "RuntimeError", "Traceback", ".py"):
        assert secret not in everything
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert line["event"] == "unexpected_error"
    assert line["method"] == f"/{SERVICE}/CancelJob"
    assert "password is in /etc/secret" in line["exception"]
    assert await _counted(server.registry, "CancelJob", "INTERNAL")


async def test_handler_may_abort_by_itself(server: Server, channel: grpc.aio.Channel) -> None:
    with pytest.raises(PhalanxError) as caught:
        await call_with_retry(
            stubs.JobServiceStub(channel).PauseJob, pb.PauseJobRequest(), timeout_s=GUARD_S
        )
    assert (caught.value.code, caught.value.message) == ("DATA_LOSS", "aborted by hand")
    assert await _counted(server.registry, "PauseJob", "DATA_LOSS")


async def test_stream_delivers_what_came_before_its_error(
    server: Server, channel: grpc.aio.Channel
) -> None:
    received = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stubs.JobServiceStub(channel).WatchJob(
            pb.WatchJobRequest(), timeout=GUARD_S
        ):
            received += 1
    assert received == 1
    error = from_rpc_error(caught.value)
    assert (error.reason, error.details) == ("STALE_TERM", {"current_term": "3"})
    assert await _counted(server.registry, "WatchJob", "ABORTED")


async def test_cancelled_stream_closes_its_generator(
    server: Server, servicer: Servicer, channel: grpc.aio.Channel
) -> None:
    call = stubs.JobServiceStub(channel).WatchJob(
        pb.WatchJobRequest(job_id="endless"), timeout=GUARD_S
    )
    await call.read()
    call.cancel()
    await asyncio.wait_for(servicer.watch_closed.wait(), GUARD_S)
    assert await _counted(server.registry, "WatchJob", "CANCELLED")


async def test_a_call_whose_work_is_given_up_by_the_server_is_answered(
    server: Server, channel: grpc.aio.Channel
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stubs.JobServiceStub(channel).ResumeJob(pb.ResumeJobRequest(), timeout=GUARD_S)
    error = from_rpc_error(caught.value)
    assert (type(error), error.reason) == (Unavailable, "CALL_ENDED")
    assert await _counted(server.registry, "ResumeJob", "UNAVAILABLE")


async def test_raw_bytes_handlers_work_and_their_errors_are_rich(
    server: Server, channel: grpc.aio.Channel
) -> None:
    assert await channel.unary_unary("/test.Raw/Echo")(b"abc", timeout=GUARD_S) == b"abc"
    call = channel.stream_stream("/test.Raw/Relay")(timeout=GUARD_S)
    await call.write(b"one")
    assert await call.read() == b"one"
    await call.write(b"fail")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value).message == "bad frame"
    assert await _counted(server.registry, "Echo", "OK", "test.Raw")
    assert await _counted(server.registry, "Relay", "INVALID_ARGUMENT", "test.Raw")


async def test_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Raw/Missing")(b"", timeout=GUARD_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_message_above_the_limit_is_refused_and_one_at_the_limit_is_not(
    server: Server,
) -> None:
    # A client without our limits, as any other client would be.
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        measure = channel.unary_unary("/test.Raw/Size")
        largest = str(MESSAGE_LIMIT_BYTES).encode()
        assert await measure(bytes(MESSAGE_LIMIT_BYTES), timeout=GUARD_S) == largest
        for size in (MESSAGE_LIMIT_BYTES + 1, 5 * 1024 * 1024):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await measure(bytes(size), timeout=GUARD_S)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await measure(b"still here", timeout=GUARD_S) == b"10"
    assert await _counted(server.registry, "Size", "OK", "test.Raw", times=2)


async def test_compressed_message_is_refused_however_small(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/test.Raw/Size")
        assert await call(bytes(1000), timeout=GUARD_S) == b"1000"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(bytes(1000), timeout=GUARD_S, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_follows_set_serving_per_service(
    server: Server, channel: grpc.aio.Channel
) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    async def state(service: str) -> int:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=GUARD_S)
        return int(answer.status)

    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    assert await state("") == await state(SERVICE) == not_serving
    server.set_serving(True)
    assert await state("") == await state(SERVICE) == serving
    server.set_serving(False, SERVICE)
    assert (await state(""), await state(SERVICE)) == (serving, not_serving)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await state("no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_liveness_stays_whatever_can_be_used(
    server: Server, channel: grpc.aio.Channel
) -> None:
    """Or a process would be killed for waiting for another one."""
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=LIVENESS)
    for serving in (False, True, False):
        server.set_serving(serving)
        answer = await stub.Check(request, timeout=GUARD_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_watch_tells_each_change(server: Server, channel: grpc.aio.Channel) -> None:
    call = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=SERVICE), timeout=GUARD_S
    )
    seen = [(await call.read()).status]
    for serving in (True, False, True):
        server.set_serving(serving)
        seen.append((await call.read()).status)
    assert seen == [2, 1, 2, 1]
    call.cancel()


async def test_reflection_lists_and_describes_the_services(
    channel: grpc.aio.Channel,
) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=GUARD_S)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    files = (await call.read()).file_descriptor_response.file_descriptor_proto
    assert any(b"SubmitJobRequest" in file for file in files)
    await call.done_writing()


async def test_reflection_can_be_switched_off() -> None:
    server = Server(
        listen="127.0.0.1:0", metrics_listen=None, service_names=[SERVICE], reflection=False
    )
    await server.start()
    async with open_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(timeout=GUARD_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(grace_s=0)


async def test_port_in_use_is_an_error_that_names_the_address(server: Server) -> None:
    second = Server(listen=server.address, metrics_listen=None, service_names=[])
    with pytest.raises(FailedPrecondition, match=f"{server.address}: the port is in use") as caught:
        await second.start()
    assert caught.value.reason == "ADDRESS_IN_USE"
    third = Server(listen="127.0.0.1:0", metrics_listen=server.metrics_address, service_names=[])
    with pytest.raises(FailedPrecondition, match=server.metrics_address):
        await third.start()
    await third.stop(grace_s=0)


async def test_address_of_another_machine_is_an_error_that_names_it() -> None:
    server = Server(listen="192.0.2.1:7410", metrics_listen=None, service_names=[])
    with pytest.raises(FailedPrecondition, match=r"192\.0\.2\.1:7410") as caught:
        await server.start()
    assert caught.value.reason == "ADDRESS_UNUSABLE"


async def test_connection_that_never_speaks_is_closed(server: Server) -> None:
    host, port = server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    # The server sends its settings first; then, having heard nothing, it hangs up.
    async with asyncio.timeout(GUARD_S):
        await reader.read()
    assert reader.at_eof()
    writer.close()
