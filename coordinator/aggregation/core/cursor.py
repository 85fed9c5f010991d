"""Where one worker's stream stands in what this aggregator has to send.

Nothing is queued for a worker. A cursor looks into the version stores and the go log when its
stream can take another message, so a stopped worker costs nothing and delays nobody; when it is
back it goes on where it stood, or, if that version is gone, at the next one that is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from coordinator.aggregation.core.golog import GoLog
from coordinator.aggregation.core.versions import NONE, Version, VersionStore


class AnyCursor(Protocol):
    """A stream's position."""

    def take(self, now_s: float = 0.0) -> bytes | None:
        """The next message for the stream at this time; None: nothing until it is woken."""
        ...


class Cursor:
    """Position of one stream in each range and in the go records.

    `stores` begin with that of range 0 where it is owned here. With `joins` a go record may come
    in one message with its version.
    """

    def __init__(
        self, stores: Sequence[VersionStore], go_log: GoLog, *, joins: bool = False
    ) -> None:
        self._go_log = go_log
        self._last_go = -1
        self._joins = joins
        self._ranges = [_RangeCursor(store) for store in stores]

    def take(self, now_s: float = 0.0) -> bytes | None:
        """The next message for this stream; None: nothing until something is published."""
        record = self._go_log.after(self._last_go)
        if record is not None:
            self._last_go = record.number
            if self._joins and record.joined is not None and self._ranges[0].skip(record.version):
                return record.joined
            return record.data
        for position in self._ranges:
            frame = position.take()
            if frame is not None:
                return frame
        return None


class _RangeCursor:
    __slots__ = ("_number", "_sent", "_store")

    def __init__(self, store: VersionStore) -> None:
        self._store = store
        self._number = NONE
        self._sent = 0

    def take(self) -> bytes | None:
        version = self._current()
        if version is None or self._sent == len(version.order):
            return None
        frame = version.frames[version.order[self._sent]]
        self._sent += 1
        return frame

    def skip(self, number: int) -> bool:
        """Count a version as sent, if it is the next one and nothing of it was sent."""
        version = self._current()
        if version is None or version.number != number or self._sent:
            return False
        self._sent = len(version.order)
        return True

    def _current(self) -> Version | None:
        """The version that this cursor is at, or goes on to, or jumps to."""
        version = self._store.get(self._number)
        if version is None or self._sent == len(version.frames):
            version = self._store.following(self._number)
            if version is not None:
                self._number, self._sent = version.number, 0
        return version
