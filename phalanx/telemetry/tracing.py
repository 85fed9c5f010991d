"""Spans of a process that traces: of gRPC calls, of steps and leaves, of incidents.

Import it through `phalanx.telemetry.traces` only, which does so where traces are wanted.

Attributes name jobs, steps, shards, members and statuses. Nothing else goes into a span: no
payload, no metadata of a call (which has tokens), no text of an error (which may have names).

A step is one trace. No message has to carry it: its ids are a digest of job, term and step, which
the owner of range 0 and every worker know, so all of them put their spans into the same trace and
sample the same steps.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from phalanx.errors import PhalanxError
from phalanx.telemetry.span_queue import SpanQueue
from phalanx.telemetry.traces import CONTEXT_KEYS

DEFAULT_RATIO = 0.1
NANOS = 1_000_000_000

SUBMIT = "phalanx.v1.JobService/SubmitJob"
INCIDENT = "phalanx.incident"
ALWAYS = frozenset({SUBMIT, INCIDENT})
"""Rare, and what is asked about first: sampled by default whatever the ratio is."""

_SERVERS_FAULT = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

_W3C = TraceContextTextMapPropagator()
_NO_PARENT = Context()


class Tracing:
    """Makes the spans of one process. Raises ValueError, and what gRPC does, for bad settings."""

    def __init__(self, role: str, member_id: str, environment: Mapping[str, str]) -> None:
        self._ids = _Ids()
        sampler = None if environment.get("OTEL_TRACES_SAMPLER") else _default_sampler(environment)
        self._provider = TracerProvider(
            sampler=sampler,
            resource=_resource(role, member_id, environment),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self.queue = SpanQueue(OTLPSpanExporter(), environment)
        self._provider.add_span_processor(self.queue)
        self._tracer = self._provider.get_tracer("phalanx", _version())

    def close(self) -> None:
        """Send what is left, within bounds."""
        self.queue.shutdown()

    # -- calls

    def client_call(self, method: str, metadata: Any) -> tuple[Span, list[tuple[str, str | bytes]]]:
        """Begin the span of a call that this process makes; return it with the call's metadata."""
        span = self._tracer.start_span(
            method.lstrip("/"), kind=SpanKind.CLIENT, attributes=_rpc(method)
        )
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, trace.set_span_in_context(span, _NO_PARENT))
        kept = [(key, value) for key, value in metadata or () if key not in CONTEXT_KEYS]
        return span, [*kept, *carrier.items()]

    @contextmanager
    def server_call(self, method: str, metadata: Any, *, parent: bool) -> Iterator[ServerCall]:
        """The span of a call that this process answers; with `parent` of all that is done in it."""
        carrier = {key: value for key, value in metadata or () if key in CONTEXT_KEYS}
        span = self._tracer.start_span(
            method.lstrip("/"),
            _W3C.extract(carrier, _NO_PARENT),
            SpanKind.SERVER,
            attributes=_rpc(method),
        )
        # Also where it is none: a handler is not part of what its task was made in.
        inside = trace.set_span_in_context(span, _NO_PARENT) if parent else _NO_PARENT
        token = attach(inside)
        call = ServerCall()
        try:
            yield call
        finally:
            detach(token)
            end_call(span, call.code, call.reason, faults=_SERVERS_FAULT)

    # -- what happened, told once it is over

    def step(
        self,
        step: tuple[str, int, int],
        times_ns: Sequence[int],
        attributes: Mapping[str, int],
    ) -> None:
        """A step (job, term, number) is committed: from its opening over the arrival of its last
        contribution, where that is known, to its commit."""
        began_ns, ended_ns = times_ns[0], times_ns[-1]
        context = self._context_of(step)
        if not context.trace_flags.sampled:
            return
        with self._ids.next_are(context):
            root = self._tracer.start_span(
                "phalanx.step",
                _NO_PARENT,
                attributes={**_step(step), **_prefixed(attributes)},
                start_time=began_ns,
            )
        parent = trace.set_span_in_context(root, _NO_PARENT)
        for name, start_ns, end_ns in zip(
            ("phalanx.collect", "phalanx.reduce"), times_ns[:-1], times_ns[1:], strict=False
        ):
            if len(times_ns) > 2:
                self._span(name, parent, start_ns, end_ns, {})
        root.add_event("commit", timestamp=ended_ns)
        root.end(ended_ns)

    def leaf(
        self,
        step: tuple[str, int, int],
        seconds: float,
        attributes: Mapping[str, str | int],
        *,
        joins: bool,
        failed: str = "",
    ) -> None:
        """A worker has computed, or failed in, leaves that took so long until now.

        With `joins` they are part of a step; else nobody knows yet which one they will be in.
        """
        parent = _NO_PARENT
        if joins:
            context = self._context_of(step)
            if not context.trace_flags.sampled:
                return
            parent = trace.set_span_in_context(NonRecordingSpan(context), _NO_PARENT)
        end_ns = time.time_ns()
        began_ns = end_ns - int(seconds * NANOS)
        told = {**_step(step), **_prefixed(attributes)}
        self._span("phalanx.leaf", parent, began_ns, end_ns, told, failed=failed)

    def checkpoint(self, step: tuple[str, int, int], seconds: float, attributes: Any) -> None:
        """A part of a checkpoint became durable; it belongs to a step that is over."""
        context = self._context_of(step)
        if context.trace_flags.sampled:
            end_ns = time.time_ns()
            began_ns = end_ns - int(seconds * NANOS)
            told = {**_step(step), **_prefixed(attributes)}
            parent = trace.set_span_in_context(NonRecordingSpan(context), _NO_PARENT)
            self._span("phalanx.checkpoint", parent, began_ns, end_ns, told)

    def incident(
        self, began_ns: int, phases: Mapping[str, float], attributes: Mapping[str, str | int]
    ) -> None:
        """The cluster has recovered; `phases` are seconds since the failure until each was over."""
        ends = sorted(phases.items(), key=lambda each: each[1])
        last_s = ends[-1][1] if ends else 0.0
        root = self._tracer.start_span(
            INCIDENT, _NO_PARENT, attributes=_prefixed(attributes), start_time=began_ns
        )
        parent = trace.set_span_in_context(root, _NO_PARENT)
        start_s = 0.0
        for phase, end_s in ends:
            times = (began_ns + int(start_s * NANOS), began_ns + int(end_s * NANOS))
            self._span(f"{INCIDENT}.{phase}", parent, *times, {})
            start_s = end_s
        root.end(began_ns + int(last_s * NANOS))

    # -- inside

    def _span(
        self,
        name: str,
        parent: Context,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        *,
        failed: str = "",
    ) -> None:
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns)
        if failed:
            span.set_status(Status(StatusCode.ERROR, failed))
        span.end(max(start_ns, end_ns))

    def _context_of(self, step: tuple[str, int, int]) -> SpanContext:
        """The trace of a step and its first span, with whether it is sampled."""
        digest = hashlib.sha256("\0".join(map(str, step)).encode()).digest()
        trace_id = int.from_bytes(digest[:16]) or 1
        sampled = self._provider.sampler.should_sample(_NO_PARENT, trace_id, "phalanx.step")
        is_sampled = sampled.decision is Decision.RECORD_AND_SAMPLE
        flags = TraceFlags(TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT)
        span_id = int.from_bytes(digest[16:24]) or 1
        return SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)


class ServerCall:
    """How a call that is answered has ended."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK
        self.reason = ""

    def failed(self, error: PhalanxError | None) -> None:
        """It raised this; None: what is no error of Phalanx."""
        self.code = grpc.StatusCode[error.code.value] if error else grpc.StatusCode.UNKNOWN
        self.reason = error.reason if error else "UNEXPECTED"


def end_call(
    span: Span,
    code: grpc.StatusCode,
    reason: str = "",
    *,
    faults: frozenset[grpc.StatusCode] = frozenset(grpc.StatusCode) - {grpc.StatusCode.OK},
) -> None:
    """End the span of a call with its status; those in `faults` are errors."""
    if span.is_recording():
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if reason:
            span.set_attribute("phalanx.reason", reason)
        if code in faults:
            span.set_status(Status(StatusCode.ERROR, code.name))
    span.end()


class _Ids(IdGenerator):
    """Random ids, except for a span whose ids are known before."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        # Of this thread: another one may begin a span meanwhile.
        self._local = threading.local()

    @contextmanager
    def next_are(self, context: SpanContext) -> Iterator[None]:
        """Have the span that is started inside get these ids."""
        self._local.next = context
        try:
            yield
        finally:
            del self._local.next

    def generate_span_id(self) -> int:
        known: SpanContext | None = getattr(self._local, "next", None)
        return self._random.generate_span_id() if known is None else known.span_id

    def generate_trace_id(self) -> int:
        known: SpanContext | None = getattr(self._local, "next", None)
        return self._random.generate_trace_id() if known is None else known.trace_id


class _RareAndRatio(Sampler):
    """Everything that is rare, and a part of the rest."""

    def __init__(self, ratio: float) -> None:
        self._ratio = TraceIdRatioBased(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> SamplingResult:
        chosen = ALWAYS_ON if name in ALWAYS else self._ratio
        return chosen.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        return f"RareAnd{self._ratio.get_description()}"


def _default_sampler(environment: Mapping[str, str]) -> Sampler:
    ratio = float(environment.get("OTEL_TRACES_SAMPLER_ARG") or DEFAULT_RATIO)
    return ParentBased(_RareAndRatio(ratio))


def _resource(role: str, member_id: str, environment: Mapping[str, str]) -> Resource:
    made = {"service.instance.id": member_id, "service.version": _version()}
    if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        made["service.name"] = f"phalanx-{role}"
    return Resource.create(made)


def _rpc(method: str) -> dict[str, str]:
    service, _, name = method.lstrip("/").rpartition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


def _step(step: tuple[str, int, int]) -> dict[str, str | int]:
    return {"phalanx.job_id": step[0], "phalanx.term": step[1], "phalanx.step": step[2]}


def _prefixed(attributes: Mapping[str, str | int]) -> dict[str, str | int]:
    return {f"phalanx.{key}": value for key, value in attributes.items()}


def _version() -> str:
    try:
        return version("phalanx")
    except PackageNotFoundError:
        return "unknown"
