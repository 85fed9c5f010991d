"""What takes traces: a gRPC server with OpenTelemetry's own `TraceService`.

with receiver() as received:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint}
    ...
received.spans
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came in, with the service that it is of."""

    service: str
    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    attributes: dict[str, str | int]
    status: int
    start_ns: int
    end_ns: int


@dataclass
class Received:
    """All that came in so far."""

    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def named(self, name: str) -> list[ReceivedSpan]:
        """Return the spans of a name."""
        with self.lock:
            return [span for span in self.spans if span.name == name]

    def children(self, parent: ReceivedSpan) -> list[ReceivedSpan]:
        """Return the spans right below one."""
        with self.lock:
            return [
                span
                for span in self.spans
                if (span.trace_id, span.parent_id) == (parent.trace_id, parent.span_id)
            ]


class _Servicer(pb_grpc.TraceServiceServicer):
    def __init__(self, received: Received) -> None:
        self._received = received

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        found = [
            ReceivedSpan(
                service=_values(each.resource.attributes).get("service.name", ""),
                name=span.name,
                trace_id=span.trace_id,
                span_id=span.span_id,
                parent_id=span.parent_span_id,
                attributes=_values(span.attributes),
                status=span.status.code,
                start_ns=span.start_time_unix_nano,
                end_ns=span.end_time_unix_nano,
            )
            for each in request.resource_spans
            for scope in each.scope_spans
            for span in scope.spans
        ]
        with self._received.lock:
            self._received.spans += found
            self._received.raw.append(request.SerializeToString())
            self._received.headers.append(dict(context.invocation_metadata()))
        return pb.ExportTraceServiceResponse()


@contextmanager
def receiver() -> Iterator[Received]:
    """Run one on a free port of loopback."""
    received = Received()
    server = grpc.server(ThreadPoolExecutor(2))
    add: Any = pb_grpc.add_TraceServiceServicer_to_server
    add(_Servicer(received), server)
    received.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield received
    finally:
        server.stop(None).wait()


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
