"""Who leads is decided by counters and by a challenger's own clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.control import leadership
from phalanx.v1 import storage_service_pb2 as pb

TTL_S = 2.0


class Leases:
    """A lease of another holder that is renewed at every look for a while, and then no more."""

    storage = SimpleNamespace(AcquireLease="acquire")

    def __init__(self, renewals: int) -> None:
        self.now_s = 1000.0
        self.renewals = renewals
        self.counter = 1
        self.last_renewal_s = self.now_s
        self.challenges: list[tuple[float, int, int]] = []

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    async def insist_call(self, _: str, request: pb.AcquireLeaseRequest) -> pb.AcquireLeaseResponse:
        if self.renewals:
            self.renewals -= 1
            self.counter += 1
            self.last_renewal_s = self.now_s
        lease = pb.Lease(name="leader", holder="other", token=7, counter=self.counter)
        if request.seen_token:
            self.challenges.append((self.now_s, request.seen_token, request.seen_counter))
            lease.holder, lease.token = request.holder, 8
        return pb.AcquireLeaseResponse(
            acquired=bool(request.seen_token),
            lease=lease,
            lost_holder="other" if request.seen_token else "",
        )


@pytest.mark.parametrize("renewals", [0, 1, 30])
async def test_rule_12_a_lease_is_challenged_once_it_stood_still_for_a_whole_ttl(
    renewals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases: Any = Leases(renewals)
    monkeypatch.setattr(leadership, "time", SimpleNamespace(monotonic=lambda: leases.now_s))
    monkeypatch.setattr(leadership, "asyncio", SimpleNamespace(sleep=leases.sleep))
    followed: list[str] = []

    async def follow(lease: pb.Lease) -> None:
        followed.append(lease.holder)

    acquired = await leadership.acquire(leases, "control-2", TTL_S, follow)
    assert acquired.generation == 8
    assert acquired.lost is not None
    assert acquired.lost.control_id == "other"
    assert acquired.lost.fenced_s == leases.now_s
    # As far as one can tell who looks now and then.
    assert 0 <= acquired.lost.silent_since_s - leases.last_renewal_s <= TTL_S / 4
    ((challenged_s, token, counter),) = leases.challenges
    assert (token, counter) == (7, 1 + renewals)
    assert TTL_S <= challenged_s - leases.last_renewal_s <= 2 * TTL_S
    assert set(followed) == {"other"}
