"""Ended spans on their way to the receiver: a bounded queue and one thread that sends batches.

The SDK's own processor drops what does not fit without a count, starts its thread again in every
forked child, and takes half a minute to stop while the receiver is away.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from phalanx.telemetry.logs import get_logger

CLOSE_TIMEOUT_S = 2.0
"""What is left at the end has this long; less than a process that is told to stop is given."""

_ABORT_TIMEOUT_S = 0.5
_LOGGER = "opentelemetry.exporter.otlp.proto.grpc.exporter"

_log = get_logger(__name__)

Count = Callable[[str, int], None]
"""Gets an outcome (`sent`, `dropped`) and a number of spans."""


class SpanQueue(SpanProcessor):
    """Hands ended spans to `exporter`, settings as in OpenTelemetry (`OTEL_BSP_…`)."""

    def __init__(self, exporter: SpanExporter, environment: Mapping[str, str]) -> None:
        self._exporter = exporter
        self._room = _number(environment, "OTEL_BSP_MAX_QUEUE_SIZE", 2048)
        self._batch = min(_number(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), self._room)
        self._delay_s = _number(environment, "OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000
        self._spans: deque[ReadableSpan] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._away = False
        self._last_words = _LastWords()
        logger = logging.getLogger(_LOGGER)
        # It complains of every try; here each outage is told once.
        logger.handlers, logger.propagate = [self._last_words], False
        self.sent = 0
        self.dropped = 0
        self.on_count: Count = lambda _outcome, _number: None
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Do nothing: only what has ended is sent."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span; without room it is dropped, and nobody waits."""
        if not span.context.trace_flags.sampled:
            return
        # Several threads may pass here at once: the queue is then longer by as many.
        if self._closing or len(self._spans) >= self._room:
            self._dropped(1)
            return
        self._spans.append(span)
        if len(self._spans) >= self._batch:
            self._wake.set()

    def shutdown(self) -> None:
        """Send what is left, or give it up where the receiver is away; returns within seconds."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        if self._away:
            self._exporter.shutdown()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            # Breaks off the call that is under way.
            self._exporter.shutdown()
            self._thread.join(_ABORT_TIMEOUT_S)
        elif not self._away:
            self._exporter.shutdown()
        self._dropped(len(self._spans))
        self._spans.clear()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wake the sender; whoever asks is not held up."""
        self._wake.set()
        return True

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._delay_s)
            self._wake.clear()
            self._send_all()
        self._send_all()

    def _send_all(self) -> None:
        while self._spans:
            batch = [self._spans.popleft() for _ in range(min(self._batch, len(self._spans)))]
            if not self._send(batch) and self._closing:
                return

    def _send(self, batch: list[ReadableSpan]) -> bool:
        try:
            result = self._exporter.export(batch)
        except Exception as error:  # noqa: BLE001 - the thread has to live, and loses spans only
            self._last_words.text = f"{type(error).__name__}: {error}"
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self.sent += len(batch)
            self.on_count("sent", len(batch))
            if self._away:
                self._away = False
                _log.warning("traces_sent_again", dropped=self.dropped)
            return True
        self._dropped(len(batch))
        if not self._away:
            self._away = True
            _log.warning("traces_not_sent", message=self._last_words.text)
        return False

    def _dropped(self, count: int) -> None:
        if count:
            self.dropped += count
            self.on_count("dropped", count)


class _LastWords(logging.Handler):
    """Keeps what the exporter said last."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return a setting. Raises ValueError unless it is a whole number above 0."""
    value = int(environment.get(name) or default)
    if value <= 0:
        raise ValueError(f"{name} must be more than 0")
    return value
