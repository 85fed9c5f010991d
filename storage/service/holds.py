"""The hold that keeps garbage collection away from a backup; see ``storage.core.snapshots``."""

import asyncio
import time
from collections.abc import Callable
from uuid import uuid4

from phalanx.errors import FailedPrecondition, PhalanxError
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.snapshots import HOLD_LEASE, HoldWatch, backup_running
from storage.interfaces import LeaseStore
from storage.service.operations import Operations, to_the_end

RENEW_S = 5.0
_PATIENCE_S = 3.0
_PAUSE_S = 0.1

_log = get_logger(__name__)


class Holds:
    """Takes the hold, renews it, and takes it away from who died with it."""

    def __init__(
        self,
        leases: LeaseStore,
        operations: Operations,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._operations = operations
        self._now_s = now_s
        self._watch = HoldWatch()

    async def take(self) -> pb.Lease:
        """Take it; FailedPrecondition (BACKUP_RUNNING) if somebody has it."""
        ends_s = self._now_s() + _PATIENCE_S
        while True:
            try:
                return await self._operations.state("hold", self._take)
            except FailedPrecondition:
                # One that has just ended may not have been let go of yet.
                if self._now_s() >= ends_s:
                    raise
            await asyncio.sleep(_PAUSE_S)

    async def renew(self, lease: pb.Lease) -> None:
        """Renew it; Aborted (STALE_GENERATION) if it was taken away."""
        request = pb.RenewLeaseRequest(name=lease.name, holder=lease.holder, token=lease.token)
        await self._operations.state("hold", lambda: self._leases.renew(request))

    async def let_go(self, lease: pb.Lease) -> None:
        """End it, whatever is cancelled meanwhile."""

        async def release() -> None:
            request = pb.ReleaseLeaseRequest(
                name=lease.name, holder=lease.holder, token=lease.token
            )
            try:
                await self._operations.state("hold", lambda: self._leases.release(request))
            except PhalanxError as error:
                # It is taken away once it is old.
                _log.warning("hold_not_released", message=error.message)

        await to_the_end(release())

    def expire(self) -> None:
        """Take it away from who died; FailedPrecondition (BACKUP_RUNNING) if somebody has it.

        Blocks.
        """
        if self._leases.get(HOLD_LEASE) is None:
            return
        lease = self._take()
        self._leases.release(
            pb.ReleaseLeaseRequest(name=lease.name, holder=lease.holder, token=lease.token)
        )

    def _take(self) -> pb.Lease:
        row = self._leases.get(HOLD_LEASE)
        token, counter = self._watch.challenge(row, self._now_s())
        answer = self._leases.acquire(
            pb.AcquireLeaseRequest(
                name=HOLD_LEASE, holder=uuid4().hex, seen_token=token, seen_counter=counter
            )
        )
        if not answer.acquired:
            raise backup_running()
        if answer.lost_holder:
            _log.warning("backup_given_up", message="a backup ended without a word")
        return answer.lease
