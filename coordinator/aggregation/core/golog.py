"""Go records that this aggregator issued as the owner of range 0, ready to be sent."""

from __future__ import annotations

from functools import cached_property

from phalanx.frames import FRAME_BYTES, encode_response, join_go_record
from phalanx.go_seals import sealed_go
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.training_pb2 import GoRecord

JOINED_FRAME_LIMIT_BYTES = FRAME_BYTES + 4096
"""A whole frame. A copy of it costs less than a message more for each worker, which has to be sent,
to wake a process and to be taken in before its leaves can start."""


class GoEntry:
    """One issued record: its number in the log and its messages."""

    def __init__(self, number: int, go: GoRecord, joined: bytes | None) -> None:
        self.number = number
        self.version = go.version
        #: The whole version in one message with this record, where it is small.
        self.joined = joined
        self._go = go

    @property
    def evaluates(self) -> bool:
        """Whether the record opens an evaluation."""
        return self._go.action == GoRecord.ACTION_EVALUATE

    @cached_property
    def data(self) -> bytes:
        """The record by itself; most streams take it joined."""
        return encode_response(pb.ExchangeResponseHeader(go_record=self._go))


class GoLog:
    """The go records of the held versions, in order. A sender keeps the number of its last one.

    With a `seal_key` they are sealed by it.
    """

    def __init__(self) -> None:
        self.seal_key = b""
        self._entries: list[GoEntry] = []
        self._next = 0
        self.newest = GoRecord()

    def append(self, go: GoRecord, frame: bytes | None) -> None:
        """Encode a record and make it available; `frame` is its version, if that is one frame."""
        sent = sealed_go(self.seal_key, go)
        joined = None
        if frame is not None and len(frame) <= JOINED_FRAME_LIMIT_BYTES:
            joined = join_go_record(frame, sent.SerializeToString())
        self._entries.append(GoEntry(self._next, sent, joined))
        self._next += 1
        self.newest = go

    def after(self, number: int) -> GoEntry | None:
        """The first held record above `number`, if there is one."""
        if number + 1 >= self._next:
            return None
        for entry in self._entries:
            if entry.number > number:
                return entry
        return None

    def drop_before(self, version: int) -> None:
        """Forget the records of versions below `version`: their rounds are closed everywhere."""
        self._entries = [entry for entry in self._entries if entry.version >= version]
