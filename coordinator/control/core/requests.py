"""Memory of mutating calls: the same id and request gives the first answer, another is refused.

Remembered for 24 hours, in the journal, whatever the wall clock does meanwhile; of more than a
hundred thousand the oldest go sooner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from phalanx.errors import AlreadyExists
from phalanx.v1.control_journal_pb2 import RememberedRequest

REMEMBERED_NANOS = 24 * 3600 * 1_000_000_000
REQUESTS_MAX = 100_000


class RequestMemory:
    """Requests by id, oldest first."""

    def __init__(self, requests: Iterable[RememberedRequest] = ()) -> None:
        self._by_id: dict[str, RememberedRequest] = {each.request_id: each for each in requests}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RememberedRequest]:
        return iter(self._by_id.values())

    def remember(self, request: RememberedRequest, now_nanos: int) -> None:
        """Keep a request; forget those older than 24 hours, and the oldest of too many."""
        self._by_id.pop(request.request_id, None)
        self._by_id[request.request_id] = request
        while self._by_id:
            oldest = next(iter(self._by_id.values()))
            is_young = now_nanos - oldest.time_unix_nanos <= REMEMBERED_NANOS
            if is_young and len(self._by_id) <= REQUESTS_MAX:
                break
            del self._by_id[oldest.request_id]

    def step(self, nanos: int) -> None:
        """The wall clock was moved by so much; nothing has become older by that."""
        for request_id, request in self._by_id.items():
            # Others hold the same message.
            moved = RememberedRequest()
            moved.CopyFrom(request)
            moved.time_unix_nanos += nanos
            self._by_id[request_id] = moved

    def find(self, request: RememberedRequest, now_nanos: int) -> RememberedRequest | None:
        """Return the first call with this id, None if there is none (or the id is empty).

        Raises AlreadyExists (reason REQUEST_ID_REUSED) if that call asked for something else.
        """
        first = self._by_id.get(request.request_id) if request.request_id else None
        if first is None or now_nanos - first.time_unix_nanos > REMEMBERED_NANOS:
            return None
        check_same(first, request)
        return first


def check_same(first: RememberedRequest, request: RememberedRequest) -> None:
    """Raise AlreadyExists unless two calls with one id ask for the same."""
    if (first.method, first.digest) != (request.method, request.digest):
        raise AlreadyExists(
            f"request id {request.request_id!r} was used for another {first.method}, on "
            f"{first.subject}; use a new id for a new request",
            reason="REQUEST_ID_REUSED",
            details={"subject": first.subject},
        )
