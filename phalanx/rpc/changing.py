"""A channel that others stand behind, one after another: each call goes to the newest.

Calls that are open end where they are; a channel that was replaced is closed after its last call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

import grpc
import grpc.aio


class Inner:
    """A channel that calls go to, or went to: its open calls, and the methods looked up in it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.methods: dict[object, Any] = {}
        self.open_calls = 0
        self.retired = False


class ChangingChannel(grpc.aio.Channel):
    """Does what a channel of `grpc.aio` does; a subclass says when another one takes over."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._inner = Inner(channel)
        self._closing: set[asyncio.Task[None]] = set()
        self._retired: set[Inner] = set()

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

    def _before_call(self) -> None:
        """Take the occasion to replace the channel."""

    def _call_begins(self, call: Any, inner: Inner) -> None:
        """Be told of a call."""

    def _call_ended(self, call: Any, inner: Inner) -> None:
        """Be told of its end."""

    def _replace(self, channel: grpc.aio.Channel) -> None:
        """Let the next calls go to another channel."""
        old, self._inner = self._inner, Inner(channel)
        old.retired = True
        self._retired.add(old)
        self._close_unused(old)

    def _method(
        self, kind: str, method: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Callable[..., Any]:
        # The same method may be asked for with other serializers.
        key = object()

        def call(*request: Any, **settings: Any) -> Any:
            self._before_call()
            inner = self._inner
            bound = inner.methods.get(key)
            if bound is None:
                bound = inner.methods[key] = getattr(inner.channel, kind)(method, *args, **options)
            made = bound(*request, **settings)
            inner.open_calls += 1
            self._call_begins(made, inner)
            made.add_done_callback(lambda call: self._ended(call, inner))
            return made

        return call

    def _ended(self, call: Any, inner: Inner) -> None:
        inner.open_calls -= 1
        self._call_ended(call, inner)
        self._close_unused(inner)

    def _close_unused(self, inner: Inner) -> None:
        if inner.retired and not inner.open_calls and inner in self._retired:
            self._retired.discard(inner)
            task = asyncio.ensure_future(inner.channel.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
