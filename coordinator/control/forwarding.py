"""One front door: a control process that does not lead hands calls on to the one that does.

The leader writes where it can be reached into a journal stream of its own; a follower reads it
whenever it sees another generation hold the lease. A call is handed on once at most, so two
processes that take each other for the leader do not play ball with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from coordinator.control.store import Store
from phalanx.errors import PhalanxError, Unavailable
from phalanx.keys.caller import Service
from phalanx.rpc.channel import open_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.status import CALL_ENDED, from_rpc_error
from phalanx.rpc.types import Handler, ServicerContext
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import ControlRecord, ControlStarted

STREAM = "leaders"
KEPT = 16
FORWARDED = "phalanx-forwarded"
_OWN_METADATA = ("grpc-", ":", "user-agent", "content-type", "te", FORWARDED)
_LONGEST_S = 24 * 3600.0

_log = get_logger(__name__)


async def announce_leader(store: Store, generation: int, control_id: str, address: str) -> None:
    """Write where this leader is reached. Raises PhalanxError; Aborted if another one leads."""
    started = ControlStarted(control_id=control_id, address=address)
    record = ControlRecord(generation=generation, control_started=started)
    following = await store.insist(lambda: store.next_sequence(STREAM))
    await store.append_exactly(STREAM, following, [record.SerializeToString()])
    if following > KEPT and following % KEPT == 0:
        request = pb.TruncateJournalRequest(
            stream=STREAM, before_sequence=following, fence=store.fence
        )
        await store.insist_call(store.storage.TruncateJournal, request)


async def find_leader(store: Store, generation: int) -> str:
    """Return where the leader of a generation is reached; empty if it has not said so yet."""
    address = ""
    async for record in store.read(STREAM, 0):
        known = ControlRecord.FromString(record.payload)
        if known.generation == generation:
            address = known.control_started.address
    return address


class Forwarding(grpc.aio.ServerInterceptor):
    """Wraps the methods of `services`: they run here while `leads()`, else at the leader."""

    def __init__(
        self,
        services: tuple[str, ...],
        leads: Callable[[], bool],
        keys: ClientKeys | None = None,
    ) -> None:
        self._keys = keys
        self._services = services
        self._leads = leads
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}
        self._channel: grpc.aio.Channel | None = None
        self._address = ""

    async def leader_is_at(self, address: str) -> None:
        """Hand calls on to this address from now on; empty: to nobody."""
        if address == self._address:
            return
        old, self._channel, self._address = self._channel, None, address
        if address:
            self._channel = open_channel(
                address, keys=self._keys, service=Service.CONTROL, own_connection=True
            )
            _log.info("forwards_calls", address=address)
        if old is not None:
            await old.close()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the wrapped handler of a method that only the leader can serve."""
        handler = await continuation(handler_call_details)
        method: str | bytes = handler_call_details.method
        name = method.decode() if isinstance(method, bytes) else method
        service = name.lstrip("/").rpartition("/")[0]
        if handler is None or service not in self._services or handler.request_streaming:
            return handler
        known = self._wrapped.get(name)
        if known is None or known[0] is not handler:
            known = self._wrapped[name] = (handler, self._wrap(handler, name))
        return known[1]

    def _wrap(self, handler: Handler, method: str) -> Handler:
        service, _, name = method.lstrip("/").rpartition("/")
        described = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        response_type = GetMessageClass(described.output_type)
        local: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def unary(request: Message, context: ServicerContext) -> Any:
            if self._here(context):
                return await local(request, context)
            channel = self._leader()
            call = channel.unary_unary(method, _serialize, response_type.FromString)
            try:
                return await call(request, **_as_called(context))
            except grpc.aio.AioRpcError as error:
                raise self._told(error) from error
            except asyncio.CancelledError:
                self._check_still(channel)
                raise

        async def stream(request: Message, context: ServicerContext) -> AsyncIterator[Any]:
            if self._here(context):
                async for response in local(request, context):
                    yield response
                return
            channel = self._leader()
            call = channel.unary_stream(method, _serialize, response_type.FromString)
            responses: Any = call(request, **_as_called(context))
            try:
                async for response in responses:
                    yield response
            except grpc.aio.AioRpcError as error:
                raise self._told(error) from error
            except asyncio.CancelledError:
                self._check_still(channel)
                raise
            finally:
                responses.cancel()

        options = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, *options)
        return grpc.unary_unary_rpc_method_handler(unary, *options)

    def _here(self, context: ServicerContext) -> bool:
        """Whether a call is served here: also one that was handed on, which is then refused."""
        return self._leads() or any(key == FORWARDED for key, _ in _metadata(context))

    def _leader(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise _nobody("no control process leads (yet); try again")
        return self._channel

    def _check_still(self, channel: grpc.aio.Channel) -> None:
        """Raise where a call was cancelled by closing its channel: the caller is still there.

        A leader that was stopped never answers; this ends the waiting once another one leads.
        """
        if channel is not self._channel:
            raise _nobody("another control process leads now; try again") from None

    def _told(self, error: grpc.aio.AioRpcError) -> PhalanxError:
        found = from_rpc_error(error)
        if isinstance(found, Unavailable) and found.reason in (found.code.value, CALL_ENDED):
            return _nobody("the control process that led does not answer; another one takes over")
        return found


def _nobody(message: str) -> Unavailable:
    return Unavailable(message, reason="NOT_LEADER", retry_after_s=0.2)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _metadata(context: ServicerContext) -> list[tuple[str, str | bytes]]:
    return list(context.invocation_metadata() or ())


def _as_called(context: ServicerContext) -> dict[str, Any]:
    """The caller's deadline and metadata, a token among it, marked as handed on.

    The leader asks who calls as this process did: nobody speaks for somebody else.
    """
    passed = [
        (key, value)
        for key, value in _metadata(context)
        if not key.lower().startswith(_OWN_METADATA)
    ]
    remaining_s = context.time_remaining()
    timeout_s = _LONGEST_S if remaining_s is None else min(remaining_s, _LONGEST_S)
    return {"timeout": timeout_s, "metadata": (*passed, (FORWARDED, "1"))}
