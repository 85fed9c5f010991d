"""Telling whoever waits what for: a service that is stopped is silent, with its sockets open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENCE_S = 5.0
"""So long an answer is waited for before it is told of."""


class Silence:
    """Calls ``tell`` once, from a thread of its own, when one of the watched waits is long."""

    def __init__(self, tell: Callable[[], None] | None) -> None:
        self._tell = tell

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Wait for an answer inside of this."""
        if self._tell is None:
            yield
            return
        timer = threading.Timer(SILENCE_S, self._is_long)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _is_long(self) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()
