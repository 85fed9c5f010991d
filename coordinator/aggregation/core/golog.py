"""Go records that this aggregator issued as the owner of range 0, ready to be sent."""

from __future__ import annotations

from phalanx.frames import encode_response
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.training_pb2 import GoRecord


class GoLog:
    """The go records of the held versions, in order. A sender keeps the number of its last one."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, bytes]] = []
        self._next = 0
        self.newest = GoRecord()

    def append(self, go: GoRecord) -> None:
        """Encode a record and make it available to senders."""
        data = encode_response(pb.ExchangeResponseHeader(go_record=go))
        self._entries.append((self._next, go.version, data))
        self._next += 1
        self.newest = go

    def after(self, number: int) -> tuple[int, bytes] | None:
        """Number and message of the first held record above `number`, if there is one."""
        if number + 1 >= self._next:
            return None
        for entry, _, data in self._entries:
            if entry > number:
                return entry, data
        return None

    def drop_before(self, version: int) -> None:
        """Forget the records of versions below `version`: their rounds are closed everywhere."""
        self._entries = [entry for entry in self._entries if entry[1] >= version]
