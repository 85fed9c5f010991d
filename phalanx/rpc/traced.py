"""Spans of calls, on both sides of them; used only where a process traces.

A call is one span, however long its streams are, and no message is looked at. What a handler does
is part of its call unless it answers with a stream: such calls last for hours, and so would their
traces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

import grpc
import grpc.aio
from opentelemetry.trace import Span

from phalanx.errors import PhalanxError
from phalanx.rpc.types import ServicerContext
from phalanx.telemetry.tracing import Tracing, end_call

_UNTOLD = ("/grpc.health.", "/grpc.reflection.")
"""Probes, many and of no interest."""


class TracedChannel(grpc.aio.Channel):
    """Does what the channel inside does, with a span around each call."""

    def __init__(self, tracing: Tracing, inside: grpc.aio.Channel) -> None:
        self._tracing = tracing
        self._inside = inside

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method(self._inside.unary_unary(method, *args, **options), method)

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method(self._inside.unary_stream(method, *args, **options), method)

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method(self._inside.stream_unary(method, *args, **options), method)

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return self._method(self._inside.stream_stream(method, *args, **options), method)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the channel."""
        return self._inside.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the channel is in another state."""
        await self._inside.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the channel is connected."""
        await self._inside.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close it; open calls are cancelled."""
        await self._inside.close(grace)

    def _method(self, make: Any, method: str) -> Callable[..., Any]:
        if method.startswith(_UNTOLD):
            return make  # type: ignore[no-any-return]

        def call(*request: Any, **settings: Any) -> Any:
            span, metadata = self._tracing.client_call(method, settings.get("metadata"))
            try:
                made = make(*request, **{**settings, "metadata": metadata})
            except BaseException:
                end_call(span, grpc.StatusCode.UNKNOWN)
                raise
            if span.is_recording():
                made.add_done_callback(lambda done: _ended(span, done))
            return made

        return call


def traced(
    tracing: Tracing, behaviour: Callable[..., Any], method: str, *, streams: bool
) -> Callable[..., Any]:
    """Return a handler with a span around each call; `streams`: it answers with a stream."""
    if method.startswith(_UNTOLD):
        return behaviour

    async def answer(request: Any, context: ServicerContext) -> Any:
        metadata = context.invocation_metadata()
        with tracing.server_call(method, metadata, parent=not streams) as call:
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                call.code = grpc.StatusCode.CANCELLED
                raise
            except PhalanxError as error:
                call.failed(error)
                raise
            except Exception:
                call.failed(None)
                raise

    return answer


def _ended(span: Span, call: Any) -> None:
    end_call(span, _code_of(call))


def _code_of(call: Any) -> grpc.StatusCode:
    """The status of a call that is over: its coroutine has it at once."""
    asking = call.code()
    try:
        asking.send(None)
    except StopIteration as told:
        code: Any = told.value
        return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
    except (asyncio.CancelledError, grpc.RpcError):
        return grpc.StatusCode.CANCELLED
    asking.close()
    return grpc.StatusCode.UNKNOWN
