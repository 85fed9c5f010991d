"""Who leads: a lease in storage with a rising token, the generation.

A challenger that saw (token, counter) unchanged for a lease on its own monotonic clock takes over
by compare-and-set; no wall clock decides. A leader that cannot reach storage goes on: nobody else
can take over without storage, and storage and members refuse whoever has the lower generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator.control.core.events import LostLeader
from coordinator.control.store import LEASE, Store
from phalanx.errors import Aborted, NotFound, PhalanxError
from phalanx.ids import new_request_id
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import storage_service_pb2 as pb

_log = get_logger(__name__)


@dataclass(frozen=True)
class Acquired:
    """A lease that is ours, and what became of who held it before."""

    generation: int
    lost: LostLeader | None = None
    history: int | None = None
    """Which history storage has; None: it does not say."""


async def acquire(
    store: Store,
    holder: str,
    lease_ttl_s: float,
    on_following: Callable[[pb.Lease], Awaitable[None]],
) -> Acquired:
    """Wait until this process leads; return its generation, and whom it took the lease from.

    `on_following` is called with the lease whenever another one is seen to renew it.
    """
    seen, since_s = (0, 0), time.monotonic()
    challenge = (0, 0)
    while True:
        request = pb.AcquireLeaseRequest(
            name=LEASE,
            holder=holder,
            seen_token=challenge[0],
            seen_counter=challenge[1],
            # Or a repeated call would find that this process had lost the lease to itself.
            request_id=new_request_id(),
        )
        asked_s = time.monotonic()
        answer = await store.insist_call(store.storage.AcquireLease, request)
        if answer.acquired:
            store.lease_confirmed_s = asked_s
            _log.info("leads", generation=answer.lease.token)
            lost = None
            if answer.lost_holder:
                lost = LostLeader(answer.lost_holder, since_s, time.monotonic())
            history = answer.history if answer.HasField("history") else None
            return Acquired(answer.lease.token, lost, history)
        held = (answer.lease.token, answer.lease.counter)
        if held != seen:
            seen, since_s = held, time.monotonic()
            _log.debug("follows", leader=answer.lease.holder, generation=answer.lease.token)
            await on_following(answer.lease)
        waited_s = time.monotonic() - since_s
        challenge = seen if waited_s >= lease_ttl_s else (0, 0)
        if challenge == (0, 0):
            await asyncio.sleep(min(lease_ttl_s / 4, lease_ttl_s - waited_s))


async def keep(store: Store, holder: str, generation: int, lease_ttl_s: float) -> PhalanxError:
    """Renew the lease until it is lost; return why."""
    request = pb.RenewLeaseRequest(name=LEASE, holder=holder, token=generation)
    while True:
        await asyncio.sleep(lease_ttl_s / 4)
        asked_s = time.monotonic()
        try:
            await store.call(
                store.storage.RenewLease, request, timeout_s=max(1.0, lease_ttl_s), attempts=1
            )
            store.lease_confirmed_s = asked_s
        except (Aborted, NotFound) as error:
            return error
        except PhalanxError as error:
            # Whatever it is, a full disk for one: nobody else leads, so this process goes on.
            _log.debug("lease_not_renewed", reason=error.reason, message=error.message)


async def release(store: Store, holder: str, generation: int) -> None:
    """Let the next one lead at once. Gives up where storage does not answer."""
    request = pb.ReleaseLeaseRequest(name=LEASE, holder=holder, token=generation)
    try:
        await store.call(store.storage.ReleaseLease, request, timeout_s=1.0)
    except PhalanxError as error:
        _log.info("lease_not_released", message=error.message)
