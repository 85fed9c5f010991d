"""Whether this process traces, and with what; where it does not, no OpenTelemetry is imported.

    configure("worker", "worker-1")           # once at start, after every fork
    tracing = active()                        # None: no traces
    ...
    shutdown()                                # sends what is left, within bounds

Traces are wanted where the environment names a receiver: `OTEL_EXPORTER_OTLP_ENDPOINT` or
`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`. Whatever is wrong with them is told and never fails a process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from phalanx.telemetry.logs import get_logger

if TYPE_CHECKING:
    from phalanx.telemetry.tracing import Tracing

Metadata = tuple[tuple[str, str], ...]

CONTEXT_KEYS = ("traceparent", "tracestate")
"""Metadata of a call that says which span it belongs to (W3C Trace Context)."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_log = get_logger(__name__)
_active: Tracing | None = None


def active() -> Tracing | None:
    """Return what this process traces with; None: it does not."""
    return _active


def configure(role: str, member_id: str) -> None:
    """Begin to trace if the environment says so. It starts a thread: fork before it, not after."""
    global _active  # noqa: PLW0603 - of a process, as its logs are
    shutdown()
    if not _wanted(os.environ):
        return
    try:
        from phalanx.telemetry.tracing import Tracing

        _active = Tracing(role, member_id, os.environ)
    except ImportError as error:
        _log.warning(
            "traces_off", reason="EXTRA_MISSING", message=f"{error}; install phalanx[otel]"
        )
    except Exception as error:  # noqa: BLE001 - a wrong setting of traces must not end a service
        _log.warning("traces_off", reason="BAD_SETTING", message=f"{type(error).__name__}: {error}")


def shutdown() -> None:
    """Send the spans that are left and trace no more; takes seconds at most."""
    global _active
    tracing, _active = _active, None
    if tracing is not None:
        tracing.close()


def of_this_program() -> Metadata:
    """Return the context of a program that traces itself and calls a cluster; else nothing.

    A program with a span at hand has loaded what makes it; for others nothing is imported.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple((key, carrier[key]) for key in CONTEXT_KEYS if key in carrier)


def _wanted(environment: Mapping[str, str]) -> bool:
    """Whether there is somewhere to send traces to, and nothing speaks against it."""
    if not any(environment.get(name) for name in _ENDPOINTS):
        return False
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() not in ("", "otlp"):
        return False
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "grpc")
    if protocol != "grpc":
        _log.warning("traces_off", reason="BAD_SETTING", message="traces go over gRPC only")
        return False
    return True
