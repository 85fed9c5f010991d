"""When a process traces, what it costs where it does not, and what its spans say of calls."""

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision

from phalanx.errors import NotFound
from phalanx.rpc.channel import open_channel
from phalanx.rpc.server import Server
from phalanx.rpc.types import ServicerContext
from phalanx.telemetry import traces
from phalanx.telemetry.span_queue import SpanQueue
from phalanx.telemetry.tracing import SUBMIT, Tracing
from phalanx.testing.logging import unconfigured_afterwards
from phalanx.testing.trace_receiver import Received, ReceivedSpan, receiver
from phalanx.v1 import job_service_pb2 as pb
from phalanx.v1 import job_service_pb2_grpc as stubs

SERVICE = "phalanx.v1.JobService"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOWHERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}

SERVICES_WITHOUT_TRACES = """
import asyncio, sys
import coordinator.aggregation.process, coordinator.control.process, phalanx, storage.runtime
import worker.main
from phalanx.rpc.channel import open_channel
from phalanx.rpc.server import Server
from phalanx.telemetry import traces

async def run():
    traces.configure("worker", "worker-1")
    server = Server(listen="127.0.0.1:0", metrics_listen=None, service_names=[])
    await server.start()
    channel = open_channel(server.address)
    print(type(channel).__module__)
    await channel.close()
    await server.stop(0)
    print([name for name in sys.modules if name.startswith("opentelemetry")])

asyncio.run(run())
"""


class Servicer(stubs.JobServiceServicer):
    async def GetJob(
        self, request: pb.GetJobRequest, context: ServicerContext
    ) -> pb.GetJobResponse:
        raise NotFound(f"there is no job {request.job_id!r}", reason="JOB_NOT_FOUND")

    async def ListJobs(
        self, request: pb.ListJobsRequest, context: ServicerContext
    ) -> pb.ListJobsResponse:
        keys = [key for key, _ in context.invocation_metadata() or ()]
        return pb.ListJobsResponse(next_page_token=str(keys.count("traceparent")))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: ServicerContext
    ) -> AsyncIterator[pb.WatchJobResponse]:
        for _ in range(10):
            yield pb.WatchJobResponse()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with unconfigured_afterwards():
        yield
    traces.shutdown()


def test_where_nothing_is_configured_nothing_is_imported_or_wrapped() -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-c", SERVICES_WITHOUT_TRACES],
        env={"PYTHONPATH": ".", "OTEL_SERVICE_NAME": "no-endpoint"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.splitlines() == ["grpc.aio._channel", "[]"], found.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        NOWHERE | {"OTEL_SDK_DISABLED": "true"},
        NOWHERE | {"OTEL_TRACES_EXPORTER": "none"},
        NOWHERE | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        NOWHERE | {"OTEL_TRACES_SAMPLER_ARG": "much"},
        NOWHERE | {"OTEL_BSP_MAX_QUEUE_SIZE": "-1"},
        NOWHERE | {"OTEL_EXPORTER_OTLP_COMPRESSION": "zip"},
    ],
)
def test_no_traces_without_a_receiver_or_with_wrong_settings(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    traces.configure("worker", "worker-1")
    assert traces.active() is None


def test_no_traces_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(*next(iter(NOWHERE.items())))
    monkeypatch.setitem(sys.modules, "phalanx.telemetry.tracing", None)
    traces.configure("worker", "worker-1")
    assert traces.active() is None


def configure(monkeypatch: pytest.MonkeyPatch, received: Received) -> Tracing:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.endpoint)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    traces.configure("control", "control-1")
    tracing = traces.active()
    assert tracing is not None
    return tracing


def of_kind(received: Received, name: str) -> tuple[ReceivedSpan, ReceivedSpan]:
    """The two sides of a call: what was called is below what called."""
    first, second = received.named(f"{SERVICE}/{name}")
    return (first, second) if second.parent_id == first.span_id else (second, first)


async def test_both_sides_of_a_call_are_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as received:
        configure(monkeypatch, received)
        server = Server(listen="127.0.0.1:0", metrics_listen=None, service_names=[SERVICE])
        stubs.add_JobServiceServicer_to_server(Servicer(), server.raw)
        await server.start()
        async with open_channel(server.address) as channel:
            stub: Any = stubs.JobServiceStub(channel)
            listed = await stub.ListJobs(
                pb.ListJobsRequest(page_token="a-secret"),
                metadata=[("traceparent", PARENT), ("authorization", "Bearer a-secret")],
            )
            assert listed.next_page_token == "1"
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetJob(pb.GetJobRequest(job_id="a-secret"))
            assert len([each async for each in stub.WatchJob(pb.WatchJobRequest())]) == 10
            health: Any = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest())
        await server.stop(0)
        traces.shutdown()
        assert len(received.spans) == 6
        for name, code in (("ListJobs", 0), ("GetJob", 5), ("WatchJob", 0)):
            caller, called = of_kind(received, name)
            assert called.trace_id == caller.trace_id
            for side in (caller, called):
                assert side.service == "phalanx-control"
                assert side.attributes["rpc.service"] == SERVICE
                assert side.attributes["rpc.method"] == name
                assert side.attributes["rpc.grpc.status_code"] == code
        caller, called = of_kind(received, "GetJob")
        assert called.attributes["phalanx.reason"] == "JOB_NOT_FOUND"
        # That there is none is the caller's mistake and no fault of the server.
        assert (caller.status, called.status) == (2, 0)
        assert b"a-secret" not in b"".join(received.raw)


async def test_a_caller_that_traces_itself_is_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as received:
        configure(monkeypatch, received)
        server = Server(listen="127.0.0.1:0", metrics_listen=None, service_names=[SERVICE])
        stubs.add_JobServiceServicer_to_server(Servicer(), server.raw)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = stubs.JobServiceStub(channel)
            await stub.ListJobs(pb.ListJobsRequest(), metadata=[("traceparent", PARENT)])
        await server.stop(0)
        traces.shutdown()
        (called,) = received.spans
        assert called.trace_id.hex() == PARENT.split("-")[1]
        assert called.parent_id.hex() == PARENT.split("-")[2]


def test_a_program_that_traces_itself_tells_its_span() -> None:
    assert traces.of_this_program() == ()
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("a program")
    with tracer.start_as_current_span("its work") as span:
        ((key, value),) = traces.of_this_program()
    assert key == "traceparent"
    assert trace.format_trace_id(span.get_span_context().trace_id) in value


class Sent(SpanExporter):
    """Keeps what it gets; fails while `away`, hangs until it is shut down while `hangs`."""

    def __init__(self, *, away: bool = False, hangs: bool = False) -> None:
        self.names: list[str] = []
        self.away = away
        self._free = threading.Event()
        self.entered = threading.Event()
        if not hangs:
            self._free.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self._free.wait()
        if self.away:
            return SpanExportResult.FAILURE
        self.names += [span.name for span in spans]
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._free.set()


def queue_of(exporter: SpanExporter, **settings: str) -> tuple[SpanQueue, Any]:
    queue = SpanQueue(exporter, settings)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(queue)
    return queue, provider.get_tracer("test")


def test_what_is_queued_at_the_end_is_sent() -> None:
    exporter = Sent()
    queue, tracer = queue_of(exporter)
    for number in range(5):
        tracer.start_span(str(number)).end()
    queue.shutdown()
    assert exporter.names == ["0", "1", "2", "3", "4"]
    assert (queue.sent, queue.dropped) == (5, 0)
    tracer.start_span("too late").end()
    assert (queue.sent, queue.dropped) == (5, 1)


def test_what_finds_no_room_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.telemetry.span_queue.CLOSE_TIMEOUT_S", 0.05)
    exporter = Sent(hangs=True)
    queue, tracer = queue_of(exporter, OTEL_BSP_MAX_QUEUE_SIZE="3")
    counted: list[tuple[str, int]] = []
    queue.on_count = lambda outcome, number: counted.append((outcome, number))
    for _ in range(3):
        tracer.start_span("first").end()
    assert exporter.entered.wait(30)
    for _ in range(5):
        tracer.start_span("later").end()
    assert queue.dropped == 2
    assert counted == [("dropped", 1)] * 2
    # A receiver that hangs is broken off.
    queue.shutdown()
    assert not queue._thread.is_alive()
    assert queue.sent + queue.dropped == 8


def test_a_receiver_that_is_away_costs_its_spans_only() -> None:
    exporter = Sent(away=True)
    queue, tracer = queue_of(exporter, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="1")
    tracer.start_span("lost").end()
    while not queue.dropped:
        assert queue._thread.is_alive()
    exporter.away = False
    tracer.start_span("sent").end()
    queue.shutdown()
    assert exporter.names == ["sent"]
    assert (queue.sent, queue.dropped) == (1, 1)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Tracing, Tracing]]:
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    made = [Tracing("worker", str(each), {"OTEL_TRACES_SAMPLER_ARG": "0.5"}) for each in (0, 1)]
    yield made[0], made[1]
    for each in made:
        each.queue._closing = True
        each.close()


def test_all_processes_sample_the_same_steps(pair: tuple[Tracing, Tracing]) -> None:
    steps = [("job", 1, number) for number in range(200)]
    first, second = ([each._context_of(step) for step in steps] for each in pair)
    assert first == second
    assert len({context.trace_id for context in first}) == 200
    assert 50 < sum(context.trace_flags.sampled for context in first) < 150
    assert pair[0]._context_of(("job", 2, 7)).trace_id != first[7].trace_id


def test_submissions_are_sampled_whatever_the_ratio_is(pair: tuple[Tracing, Tracing]) -> None:
    sampler = pair[0]._provider.sampler
    ids = [number << 56 for number in range(256)]

    def sampled(name: str) -> int:
        found = [sampler.should_sample(None, each, name).decision for each in ids]
        return found.count(Decision.RECORD_AND_SAMPLE)

    assert sampled(SUBMIT) == 256
    assert sampled("phalanx.step") == 128
