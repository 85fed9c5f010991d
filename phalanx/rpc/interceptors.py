"""The one server interceptor: callers are held to limits, errors become rich statuses, calls are
counted and timed, defects are logged.

It wraps calls, and of their messages the first only. Handlers that read and write through their
context cost nothing more; handlers that are async generators are driven by a plain loop here
instead of by the same loop inside gRPC.

gRPC waits for ever for the one message of a call that takes one. So such handlers are registered as
if they took a stream, and read their message here, with a deadline.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from phalanx.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    PhalanxError,
    Unavailable,
)
from phalanx.keys.caller import current_caller, set_caller
from phalanx.keys.policy import Check, rule_of
from phalanx.rpc import protocol
from phalanx.rpc.authentication import Gate
from phalanx.rpc.limits import Admission
from phalanx.rpc.standing import as_long_as
from phalanx.rpc.status import CALL_ENDED, to_rpc_status
from phalanx.rpc.types import Handler, ServicerContext
from phalanx.telemetry import traces
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import GrpcServerMetrics

WRITE_TIMEOUT_S = 60.0
"""How long a stream of responses may wait for its caller to take one."""

_OURS = "phalanx."
"""Services whose callers must speak a version of the protocol that is spoken here; whether a
process is well, anybody may ask."""

_STATUS_OF_NUMBER = {status.value[0]: status for status in grpc.StatusCode}

Behaviour = Callable[[Any, ServicerContext], Any]
Decoder = Callable[[bytes], Any]

_log = get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every asyncio handler of a server; plain (thread pool) handlers pass untouched."""

    def __init__(
        self,
        metrics: GrpcServerMetrics,
        admission: Admission,
        first_message_timeout_s: float,
        gate: Gate | None = None,
    ) -> None:
        self._gate = gate
        self._metrics = metrics
        self._admission = admission
        self._strangers = admission.of_strangers()
        self._first_message_timeout_s = first_message_timeout_s
        # Servicers register the same handler object for every call of a method.
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the wrapped handler of the method; None for an unknown one, as gRPC expects."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = _text(handler_call_details.method)
        known = self._wrapped.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = self._wrap(handler, method)
        if wrapped is not None:
            self._wrapped[method] = (handler, wrapped)
        return wrapped

    def _wrap(self, handler: Handler, method: str) -> Handler | None:
        behaviour: Any = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        if inspect.isasyncgenfunction(behaviour):
            behaviour = _written(behaviour)
        elif not inspect.iscoroutinefunction(behaviour):
            # A plain handler would be open to everybody: where callers must prove who they are it
            # is not there.
            return handler if self._gate is None else None
        decode = handler.request_deserializer and _decoder(handler.request_deserializer, method)
        timeout_s = self._first_message_timeout_s
        check = rule_of(method).check if self._gate is not None else None
        if handler.request_streaming:
            behaviour = _impatient(behaviour, timeout_s)
        else:
            # gRPC itself would answer bytes that are no message with UNKNOWN and the text of the
            # exception.
            behaviour, decode = _of_one_message(behaviour, decode, timeout_s, check), None
        tracing = traces.active()
        if tracing is not None:
            from phalanx.rpc.traced import traced

            # Inside what refuses callers: of strangers there are no spans, and nothing is taken.
            behaviour = traced(tracing, behaviour, method, streams=handler.response_streaming)
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(
            self._guarded(
                behaviour, method, streams=handler.request_streaming or handler.response_streaming
            ),
            request_deserializer=decode,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, behaviour: Behaviour, method: str, *, streams: bool) -> Behaviour:
        service, _, name = method.lstrip("/").rpartition("/")
        metrics, admission, gate = self._metrics, self._admission, self._gate
        rule, is_ours = rule_of(method), service.startswith(_OURS)
        # Nobody is asked who calls: the first place where a flood would get through.
        strangers = self._strangers if gate is not None and rule.public else None

        async def guarded(request: Any, context: ServicerContext) -> Any:
            started = time.perf_counter()
            connection = stranger = ""
            standing: AbstractAsyncContextManager[None] = nullcontext()

            def ended(code: grpc.StatusCode) -> None:
                metrics.observe(service, name, code.name, time.perf_counter() - started)

            try:
                peer = context.peer()
                if strangers is not None:
                    strangers.enter(peer)
                    stranger = peer
                admission.enter(peer)
                connection = peer
                if gate is not None:
                    caller = gate.admit(method, rule, context)
                    set_caller(caller)
                    if streams and caller.role is not None:
                        standing = as_long_as(partial(gate.check_again, method, caller, context))
                if is_ours:
                    protocol.check_caller(context.invocation_metadata() or ())
                async with standing:
                    response = await behaviour(request, context)
            except grpc.aio.AbortError:
                ended(_code_set_by_handler(context))
                raise
            except asyncio.CancelledError:
                if _is_given_up():
                    ended(grpc.StatusCode.CANCELLED)
                    raise
                # gRPC would answer nothing, and let the caller wait for the end of its patience.
                ended(grpc.StatusCode.UNAVAILABLE)
                await context.abort(*to_rpc_status(_let_go(method)))
            except Exception as error:  # noqa: BLE001 - the boundary where defects are told
                status = to_rpc_status(_public(error, method))
                # Counted before the caller hears of it, so that nobody sees the answer first.
                ended(status.code)
                await context.abort(*status)
            else:
                ended(_code_set_by_handler(context))
                return response
            finally:
                if connection:
                    admission.leave(connection)
                if strangers is not None and stranger:
                    strangers.leave(stranger)

        return guarded


def _decoder(deserializer: Decoder, method: str) -> Decoder:
    """Return the deserializer with bytes that are no message as an error of the caller."""

    def decode(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            raise InvalidArgument(
                f"{method} was sent {len(data)} bytes that are not a message of its request type",
                reason="MALFORMED_MESSAGE",
            ) from None

    return decode


def _of_one_message(
    behaviour: Behaviour, decode: Decoder | None, timeout_s: float, check: Check | None
) -> Behaviour:
    """Return a handler of a stream that reads its one message, in time, and hands it on.

    `check` raises where what is in the message is not for its caller.
    """

    async def read_one(_: Any, context: ServicerContext) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                data: Any = await context.read()
        except TimeoutError:
            raise _silent(timeout_s) from None
        if data is grpc.aio.EOF:
            raise InvalidArgument("the call ended before its request", reason="NO_MESSAGE")
        request = decode(data) if decode else data
        if check is not None:
            check(current_caller(), request)
        return await behaviour(request, context)

    return read_one


def _impatient(behaviour: Behaviour, timeout_s: float) -> Behaviour:
    """Return a handler whose stream of requests fails where the first does not come in time."""

    async def timed(requests: AsyncIterator[Any], context: ServicerContext) -> Any:
        return await behaviour(_FirstInTime(requests, timeout_s), context)

    return timed


class _FirstInTime(AsyncIterator[Any]):
    """The messages of a stream; the first has a deadline."""

    def __init__(self, requests: AsyncIterator[Any], timeout_s: float) -> None:
        self._requests = requests
        self._timeout_s = timeout_s
        # Made when it is needed: gRPC complains of an iterator that nobody used.
        self._messages: AsyncIterator[Any] | None = None

    def __aiter__(self) -> "_FirstInTime":
        return self

    async def __anext__(self) -> Any:
        if self._messages is not None:
            return await anext(self._messages)
        self._messages = aiter(self._requests)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await anext(self._messages)
        except TimeoutError:
            raise _silent(self._timeout_s) from None


def _silent(timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the call was opened and nothing was sent for {timeout_s:g} s", reason="NO_MESSAGE"
    )


def _written(generator: Behaviour) -> Behaviour:
    """Turn an async generator handler into one that writes, so that its errors can be caught."""

    async def write_all(request: Any, context: ServicerContext) -> None:
        async with aclosing(generator(request, context)) as responses:
            async for response in responses:
                try:
                    async with asyncio.timeout(WRITE_TIMEOUT_S):
                        await context.write(response)
                except TimeoutError:
                    raise Unavailable(
                        f"the caller took nothing for {WRITE_TIMEOUT_S:g} s; call again to go on",
                        reason="READS_TOO_SLOWLY",
                    ) from None

    return write_all


def _is_given_up() -> bool:
    """Whether the task of this call was cancelled, by its caller or as the server ends.

    Otherwise something was that it waited for.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _let_go(method: str) -> Unavailable:
    return Unavailable(
        f"what {method} waited for here was given up, as by a process that stops; try again",
        reason=CALL_ENDED,
    )


def _public(error: Exception, method: str) -> PhalanxError:
    """Return what the caller may see of ``error``."""
    if isinstance(error, PhalanxError):
        if isinstance(error, Internal):
            _log.error("internal_error", method=method, exc_info=error)
        return error
    _log.error("unexpected_error", method=method, exc_info=error)
    return Internal(
        "internal error; it is a defect of Phalanx, and the log of this server has the details",
        reason="UNEXPECTED",
    )


def _code_set_by_handler(context: ServicerContext) -> grpc.StatusCode:
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return _STATUS_OF_NUMBER.get(code, grpc.StatusCode.OK)


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method
