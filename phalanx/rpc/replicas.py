"""A channel to one of several replicas of a service, which goes on with the next when one fails.

Which one a channel begins with is drawn, so that many clients spread. It stays there until a call
ends as those of a process do that is not there or does not answer; whoever retries such a call, as
anybody does to whom it may happen twice, reaches the next replica. One that is come back to is
dialled anew, without the waits that its failures have earned it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from phalanx.rpc.changing import ChangingChannel, Inner
from phalanx.rpc.status import was_let_go
from phalanx.telemetry.logs import get_logger

_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

_log = get_logger(__name__)


class ReplicasChannel(ChangingChannel):
    """Does what a channel of `grpc.aio` does; `make` opens one to an address."""

    def __init__(
        self,
        addresses: Sequence[str],
        make: Callable[[str], grpc.aio.Channel],
        first: int | None = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._make = make
        self._current = random.randrange(len(addresses)) if first is None else first
        self._calls: dict[int, Inner] = {}
        self._judging: set[asyncio.Task[None]] = set()
        super().__init__(make(self.address))

    @property
    def address(self) -> str:
        """Where the next call goes."""
        return self._addresses[self._current]

    def blame(self, call: Any) -> None:
        """Go on with the next replica, since this call, which is open, does not move."""
        inner = self._calls.get(id(call))
        if inner is not None:
            self._move_on(inner)

    async def close(self, grace: float | None = None) -> None:
        """Close it; open calls are cancelled."""
        await super().close(grace)
        await asyncio.gather(*self._judging)

    def _call_begins(self, call: Any, inner: Inner) -> None:
        self._calls[id(call)] = inner

    def _call_ended(self, call: Any, inner: Inner) -> None:
        del self._calls[id(call)]
        if inner is self._inner:
            task = asyncio.ensure_future(self._judge(call, inner))
            self._judging.add(task)
            task.add_done_callback(self._judging.discard)

    async def _judge(self, call: Any, inner: Inner) -> None:
        code = await call.code()
        if code in _AWAY or was_let_go(code.name, await call.details()):
            self._move_on(inner)

    def _move_on(self, failed: Inner) -> None:
        if failed is not self._inner:
            return  # others have said so before
        address = self.address
        self._current = (self._current + 1) % len(self._addresses)
        _log.info("replica_left", address=address, next=self.address)
        self._replace(self._make(self.address))


def blame(channel: grpc.aio.Channel, call: Any) -> None:
    """Where there are several replicas, go on with another than that of a call which is stuck."""
    if isinstance(channel, ReplicasChannel):
        channel.blame(call)
