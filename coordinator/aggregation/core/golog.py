"""Go records that this aggregator issued as the owner of range 0, ready to be sent."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.frames import encode_response, join_go_record
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.training_pb2 import GoRecord

JOINED_FRAME_LIMIT_BYTES = 256 * 1024
"""Larger frames are not copied once more to save a message."""


@dataclass(frozen=True)
class GoEntry:
    """One issued record: its number in the log and its message."""

    number: int
    version: int
    data: bytes
    #: The whole version in one message with this record, where it is small.
    joined: bytes | None


class GoLog:
    """The go records of the held versions, in order. A sender keeps the number of its last one."""

    def __init__(self) -> None:
        self._entries: list[GoEntry] = []
        self._next = 0
        self.newest = GoRecord()

    def append(self, go: GoRecord, frame: bytes | None) -> None:
        """Encode a record and make it available; `frame` is its version, if that is one frame."""
        header = pb.ExchangeResponseHeader(go_record=go)
        joined = None
        if frame is not None and len(frame) <= JOINED_FRAME_LIMIT_BYTES:
            joined = join_go_record(frame, go.SerializeToString())
        entry = GoEntry(self._next, go.version, encode_response(header), joined)
        self._entries.append(entry)
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
