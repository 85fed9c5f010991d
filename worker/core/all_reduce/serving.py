"""The streams that other members opened to one member: what each of them is sent, in which order.

Nothing is queued for them but a few orders and questions; the rest is looked up when a stream has
room: the state for a member that asked for it, then what is reduced, from a log that all read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from phalanx.frames import encode_response
from phalanx.v1 import aggregation_service_pb2 as pb
from worker.core.all_reduce.owner import Log
from worker.core.all_reduce.replica import Replica

WAITING_MAX = 16
"""Orders and questions that wait for one stream; newer ones stand for those before."""


@dataclass
class _Stream:
    member: str
    position: int = 0
    #: What the member held when it asked for the version that the term starts with.
    asked: int | None = None
    handing: Iterator[bytes] | None = None
    first: deque[bytes] = field(default_factory=lambda: deque(maxlen=WAITING_MAX))


class Serving:
    """Streams of one term."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._streams: dict[object, _Stream] = {}

    def opened(self, key: object, member: str) -> None:
        """A member opened a stream."""
        self._streams[key] = _Stream(member)

    def closed(self, key: object) -> str:
        """A stream ended; return whose it was, empty if it is none of this term."""
        stream = self._streams.pop(key, None)
        return stream.member if stream is not None else ""

    def member(self, key: object) -> str:
        """Whose stream this is; empty if it is none of this term."""
        stream = self._streams.get(key)
        return stream.member if stream is not None else ""

    def wants_state(self, key: object, held: int) -> None:
        """A member holds another version than the one that the term starts with."""
        self._streams[key].asked = held

    def wants_no_state(self, member: str) -> None:
        """A member has come to hold by itself what it asked for."""
        for stream in self._streams.values():
            if stream.member == member:
                stream.asked = stream.handing = None

    def tell(self, member: str, header: pb.ExchangeResponseHeader) -> bool:
        """Put a message first on the newest stream of a member; False: it has none."""
        streams = [each for each in self._streams.values() if each.member == member]
        if streams:
            streams[-1].first.append(encode_response(header))
        return bool(streams)

    def next(self, key: object, log: Log, replica: Replica | None) -> bytes | None:
        """What to send now; no state as long as there is no `replica` that has it."""
        stream = self._streams.get(key)
        if stream is None:
            return None
        if stream.first:
            return stream.first.popleft()
        if stream.asked is not None and replica is not None:
            stream.handing = replica.hand_over(self._term, stream.asked)
            stream.asked = None
        if stream.handing is not None:
            message = next(stream.handing, None)
            if message is not None:
                return message
            stream.handing = None
        found = log.after(stream.position)
        if found is None:
            return None
        stream.position, message = found
        return message
