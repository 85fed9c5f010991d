"""A channel whose certificates may be replaced while it is in use.

gRPC reads a client's certificates once, when a channel is made. This one makes a new channel inside
when the files are others.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc
import grpc.aio

from phalanx.rpc.changing import ChangingChannel
from phalanx.rpc.credentials import ClientKeys


class RenewedChannel(ChangingChannel):
    """Does what a channel of `grpc.aio` does; `make` opens one with the credentials of now."""

    def __init__(
        self, keys: ClientKeys, make: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]
    ) -> None:
        self._keys = keys
        self._make = make
        self._version, credentials = keys.current()
        super().__init__(make(credentials))

    def _before_call(self) -> None:
        version, credentials = self._keys.current()
        if version != self._version:
            self._version = version
            self._replace(self._make(credentials))
