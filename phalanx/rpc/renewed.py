"""A channel whose certificates may be replaced while it is in use.

gRPC reads a client's certificates once, when a channel is made. This one makes a new channel inside
when the files are others, and each call goes to the newest; calls that are open end where they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

import grpc
import grpc.aio

from phalanx.rpc.credentials import ClientKeys


class _Inner:
    """A channel with certain certificates: its calls, and the methods that were looked up."""

    def __init__(self, version: int, channel: grpc.aio.Channel) -> None:
        self.version = version
        self.channel = channel
        self.methods: dict[object, Any] = {}
        self.open_calls = 0
        self.retired = False


class RenewedChannel(grpc.aio.Channel):
    """Does what a channel of `grpc.aio` does; `make` opens one with the credentials of now."""

    def __init__(
        self, keys: ClientKeys, make: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]
    ) -> None:
        self._keys = keys
        self._make = make
        self._closing: set[asyncio.Task[None]] = set()
        self._retired: set[_Inner] = set()
        version, credentials = keys.current()
        self._inner = _Inner(version, make(credentials))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method("unary_unary", method, args, options)

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method("unary_stream", method, args, options)

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method("stream_unary", method, args, options)

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method("stream_stream", method, args, options)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the newest channel."""
        return self._inner.channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the newest channel is in another state."""
        await self._inner.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the newest channel is connected."""
        await self._inner.channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close it; open calls are cancelled."""
        inners = [self._inner, *self._retired]
        self._retired.clear()
        await asyncio.gather(*(inner.channel.close(grace) for inner in inners), *self._closing)

    def _method(
        self, kind: str, method: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Callable[..., Any]:
        # The same method may be asked for with other serializers.
        key = object()

        def call(*request: Any, **settings: Any) -> Any:
            inner = self._newest()
            bound = inner.methods.get(key)
            if bound is None:
                bound = inner.methods[key] = getattr(inner.channel, kind)(method, *args, **options)
            made = bound(*request, **settings)
            inner.open_calls += 1
            made.add_done_callback(lambda _: self._ended(inner))
            return made

        return call

    def _newest(self) -> _Inner:
        version, credentials = self._keys.current()
        if version != self._inner.version:
            old, self._inner = self._inner, _Inner(version, self._make(credentials))
            old.retired = True
            self._retired.add(old)
            self._close_unused(old)
        return self._inner

    def _ended(self, inner: _Inner) -> None:
        inner.open_calls -= 1
        self._close_unused(inner)

    def _close_unused(self, inner: _Inner) -> None:
        if inner.retired and not inner.open_calls and inner in self._retired:
            self._retired.discard(inner)
            task = asyncio.ensure_future(inner.channel.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
