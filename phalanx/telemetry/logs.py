"""Structured logs: one JSON object per line on standard error, or text for people.

    configure_logging("worker", "worker-1", level="info", format="json")
    log = get_logger(__name__)
    log.info("leaf_finished", job_id="fashion-mlp-ab12cd34", step=7, shard=3, seconds=0.012)

The first argument of a log call is the event, in snake_case; everything else is a named value.
``job_id``, ``worker_id``, ``step`` and ``shard`` are spelled like this everywhere, and said in
each call: what is bound to a context stays with every callback and task that is made in it. Records
of the standard library's ``logging`` (gRPC's, asyncio's) come out in the same form.
"""

import logging
import os
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


def configure_logging(role: str, id: str, level: str = "info", format: str = "json") -> None:
    """Set up the logs of this process; ``role`` and ``id`` are added to every line, and
    ``worker_id`` to those of a worker, so that it finds whatever is said by or of one."""
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _identity(role, id),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(format),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a module; safe to call at import, before logs are configured."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _renderers(format: str) -> list[Processor]:
    if format == "text":
        plain = structlog.dev.plain_traceback
        return [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
        ]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _identity(role: str, id: str) -> Processor:
    pid = os.getpid()

    def add(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
        fields: dict[str, Any] = {"role": role, "id": id, "pid": pid}
        if role == "worker":
            fields["worker_id"] = id
        return {**fields, **event}

    return add
