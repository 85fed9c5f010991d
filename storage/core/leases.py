"""Leases and fencing.

Rules
-----
- Storage compares numbers and reads no clock. A challenger watches (token, counter) on its own
  monotonic clock; if they stay the same for a TTL it names them in its request, and storage hands
  the lease over only if they are still the same (compare-and-set).
- ``token`` rises with every grant, also to a holder of the same name: a restarted process must
  fence the copy of itself that may still run. ``counter`` rises with every renewal. Both start at
  1, so that (0, 0) never names a lease that somebody holds.
- A fenced write names (lease, token); any other token than the current one is refused with ABORTED.
  The check runs in the transaction of the write, which is why an old leader cannot slip in behind a
  new one.
- A released lease keeps its row without a holder, so that its token never repeats.
"""

from dataclasses import dataclass, replace

from phalanx.errors import Aborted, NotFound
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.keys import check_stream, check_word, invalid


@dataclass(frozen=True)
class LeaseRow:
    """The stored state of one lease; an empty ``holder`` means that it is free."""

    holder: str
    token: int
    counter: int

    def message(self, name: str) -> pb.Lease:
        """Return the row as the message of the contract."""
        return pb.Lease(name=name, holder=self.holder, token=self.token, counter=self.counter)


@dataclass(frozen=True)
class Acquisition:
    """The answer to an attempt: ``row`` is the lease afterwards, ``reason`` says why.

    ``lost_holder`` is who held an acquired lease and did not release it.
    """

    acquired: bool
    row: LeaseRow
    reason: str
    lost_holder: str = ""


def check_acquire(request: pb.AcquireLeaseRequest) -> None:
    """Raise InvalidArgument if the request cannot be right."""
    check_stream(request.name, "name")
    check_word(request.holder, "holder")
    if request.seen_token < 0 or request.seen_counter < 0:
        raise invalid("seen_token", "seen_token and seen_counter are 0 or more")


def acquire(current: LeaseRow | None, request: pb.AcquireLeaseRequest) -> Acquisition:
    """Decide whether ``request.holder`` gets the lease now."""
    if current is None:
        return Acquisition(True, LeaseRow(request.holder, 1, 1), "NEVER_HELD")
    granted = LeaseRow(request.holder, current.token + 1, 1)
    if not current.holder:
        return Acquisition(True, granted, "FREE")
    if current.holder == request.holder:
        return Acquisition(True, granted, "SAME_HOLDER", current.holder)
    if (request.seen_token, request.seen_counter) == (current.token, current.counter):
        return Acquisition(True, granted, "UNCHANGED_FOR_A_TTL", current.holder)
    return Acquisition(False, current, "HELD")


def renew(current: LeaseRow | None, request: pb.RenewLeaseRequest) -> LeaseRow:
    """Return the lease with its counter raised; raise Aborted (STALE_GENERATION) if it was lost."""
    held = _held(current, request.name, request.holder, request.token)
    return replace(held, counter=held.counter + 1)


def release(current: LeaseRow | None, request: pb.ReleaseLeaseRequest) -> LeaseRow | None:
    """Return the freed row, or None if there is nothing to free: it was released or lost before."""
    if current is None or (current.holder, current.token) != (request.holder, request.token):
        return None
    return replace(current, holder="")


def check_fence(current: LeaseRow | None, fence: pb.Fence) -> None:
    """Raise Aborted (STALE_GENERATION) unless ``fence.token`` is the lease's current token."""
    token = 0 if current is None else current.token
    if fence.token != token:
        raise _stale(fence.lease, fence.token, current)


def require(current: LeaseRow | None, name: str) -> LeaseRow:
    """Return the row; raise NotFound if nobody ever held the lease."""
    if current is None:
        raise NotFound(f"nobody ever held the lease {name!r}; acquire it first")
    return current


def _held(current: LeaseRow | None, name: str, holder: str, token: int) -> LeaseRow:
    row = require(current, name)
    if (row.holder, row.token) != (holder, token):
        raise _stale(name, token, row)
    return row


def _stale(name: str, token: int, current: LeaseRow | None) -> Aborted:
    holder = current.holder if current and current.holder else "nobody"
    now = current.token if current else 0
    return Aborted(
        f"the lease {name!r} has token {now} and is held by {holder}; token {token} is not "
        "current: stop acting on it and acquire the lease again",
        reason="STALE_GENERATION",
        details={"lease": name, "token": str(now), "holder": holder},
    )
