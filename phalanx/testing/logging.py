"""Keep one test's logging from the next."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog


@contextmanager
def unconfigured_afterwards() -> Iterator[None]:
    """Undo at the end what ``configure_logging`` does inside."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        structlog.reset_defaults()
