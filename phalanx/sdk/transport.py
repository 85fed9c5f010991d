"""Blocking calls with fail-over over a list of addresses.

A call goes to the address that answered last. When it cannot be reached the next one is tried,
round and round: a small number of times where nobody ever answered, long enough for a restart or a
change of leaders where somebody did, and within the deadline of the call. So it is when that one is
silent for long, as a stopped process is, whose sockets stay open. That is safe because every
mutating request carries a request id, which is the same in all attempts.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

import grpc

from phalanx.errors import DeadlineExceeded, PhalanxError, Unavailable
from phalanx.rpc.channel import open_sync_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.status import CALL_ENDED, from_rpc_error
from phalanx.sdk.methods import Method, RequestT, ResponseT
from phalanx.telemetry import traces

CALL_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 3600.0
"""Longest life of one stream; whoever follows for longer attaches again."""
ROUNDS = 4
"""How often each address is tried, at least."""
AWAY_S = 10.0
"""How long a call keeps trying where the cluster has answered before: it is being restarted."""
SILENCE_S = 5.0
"""Silence of one address after which another one is tried, where there is one. It doubles each
time, so that a call which takes long gets through as well."""
CLOSE_S = 2.0
"""How long a channel may take to close before it is left to the end of the process."""
UNREACHABLE = "UNREACHABLE"
BEHIND = "BEHIND"
PASSES = frozenset((UNREACHABLE, BEHIND, CALL_ENDED, "NOT_LEADER", "STORAGE_UNAVAILABLE"))
"""Why a cluster that is being restarted, part after part, sends callers away: each of these is over
within a lease of control, or with the start of the process that is missing."""
_TLS_FAILURES = ("CERTIFICATE", "Ssl handshake", "SSL", "Socket closed", "handshake")
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 0.5


class Transport:
    """Channels to one service under one or more addresses; threads may share it."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        what: str = "the cluster",
        hint: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
        keys: ClientKeys | None = None,
    ) -> None:
        self.keys = keys
        self.addresses = tuple(addresses)
        self.timeout_s = timeout_s
        self._what = what
        self._hint = hint
        self._lock = threading.Lock()
        self._current = 0
        self._has_answered = False
        self._channels: dict[str, grpc.Channel] = {}
        self._version = 0
        self._replaced: list[grpc.Channel] = []

    @property
    def address(self) -> str:
        """The address that the next call goes to."""
        return self.addresses[self._current]

    def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        more_s: float = 0.0,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> ResponseT:
        """Make a unary call. Raises PhalanxError.

        ``more_s`` is what this very call may take beyond the time that any call may.

        An answer that ``accept`` refuses is that of a process which is behind: another address is
        asked, as if this one had said ``Unavailable``.
        """
        deadline = time.monotonic() + (timeout_s or self.timeout_s) + more_s
        away_since_s: float | None = None
        attempts = ROUNDS * len(self.addresses)
        wait_s, patience_s = _FIRST_WAIT_S, SILENCE_S if len(self.addresses) > 1 else inf
        while True:
            address = self.address
            remaining_s = max(deadline - time.monotonic(), 0.001)
            attempts -= 1
            try:
                return self._attempt(address, method, request, min(remaining_s, patience_s), accept)
            except DeadlineExceeded:
                if remaining_s <= patience_s:
                    raise
                patience_s *= 2
                self._move_on(address)
            except Unavailable as error:
                away_since_s = away_since_s or time.monotonic()
                is_patient = error.reason in PASSES and self._has_answered
                if attempts <= 0 and not (is_patient and time.monotonic() - away_since_s < AWAY_S):
                    raise
                self._move_on(address)
                pause_s = max(wait_s, self._asked_wait_s(error)) * random.uniform(0.8, 1.2)
                if time.monotonic() + pause_s >= deadline:
                    raise
                if self._current == 0 or len(self.addresses) == 1:
                    time.sleep(pause_s)
                    wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    def stream(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float = STREAM_TIMEOUT_S,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> Iterator[ResponseT]:
        """Make one call that answers with a stream; closing the iterator cancels it. Raises
        PhalanxError.

        It is not retried: only the caller knows where to go on. After ``Unavailable`` or
        ``DeadlineExceeded`` the next stream goes to the next address. A message that ``accept``
        refuses ends the stream with ``Unavailable``.
        """
        address = self.address
        opener: Any = self._channel(address).unary_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        call = opener(request, timeout=timeout_s, metadata=traces.of_this_program())
        try:
            for response in call:
                self._has_answered = True
                if accept is not None and not accept(response):
                    self._move_on(address)
                    raise self._behind(address)
                yield response
        except grpc.RpcError as rpc_error:
            error = self._explain(rpc_error)
            if isinstance(error, Unavailable | DeadlineExceeded):
                self._move_on(address)
            raise error from None
        finally:
            call.cancel()

    def close(self) -> None:
        """Close all channels."""
        with self._lock:
            channels = [*self._channels.values(), *self._replaced]
            self._channels.clear()
            self._replaced.clear()
        for channel in channels:
            # It waits for the end of its calls, and one that Ctrl-C broke off may have none.
            closing = threading.Thread(target=channel.close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)

    def _attempt(
        self,
        address: str,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float,
        accept: Callable[[ResponseT], bool] | None,
    ) -> ResponseT:
        try:
            response: ResponseT = self._unary(address, method)(
                request, timeout=timeout_s, metadata=traces.of_this_program()
            )
        except grpc.RpcError as rpc_error:
            error = self._explain(rpc_error)
            if error.reason != UNREACHABLE and not isinstance(error, DeadlineExceeded):
                self._has_answered = True
            raise error from None
        self._has_answered = True
        if accept is not None and not accept(response):
            raise self._behind(address)
        return response

    def _unary(self, address: str, method: Method[Any, Any]) -> Any:
        return self._channel(address).unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )

    def _channel(self, address: str) -> grpc.Channel:
        version, credentials = self.keys.current() if self.keys is not None else (0, None)
        with self._lock:
            if version != self._version:
                # Other certificates: calls that are open end where they are.
                self._replaced += self._channels.values()
                self._channels.clear()
                self._version = version
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = open_sync_channel(address, credentials)
            return channel

    def _move_on(self, failed: str) -> None:
        with self._lock:
            if self.addresses[self._current] == failed:
                self._current = (self._current + 1) % len(self.addresses)

    def _explain(self, rpc_error: grpc.RpcError) -> PhalanxError:
        """Return the server's own error, or say which address gave no answer."""
        error = from_rpc_error(rpc_error)
        own_words = error.reason != error.code.value
        if not isinstance(error, Unavailable) or own_words:
            return error
        message = f"cannot reach {self._what} at {', '.join(self.addresses)}"
        hint = self._hint_on_keys(error.message) or self._hint
        return Unavailable(f"{message}; {hint}" if hint else message, reason=UNREACHABLE)

    def _hint_on_keys(self, details: str) -> str:
        """What to do where both sides are there and one does not take the other for safe."""
        if self.keys is None and "Socket closed" in details:
            return "it hung up, as one that wants encryption does: give --ca and --token-file"
        if self.keys is not None and "Verification" in details:
            return "its certificate is not for that host"
        if self.keys is not None and any(each in details for each in _TLS_FAILURES):
            return (
                "no secure connection came about: the authority (--ca) is another one, a "
                "certificate has expired or is missing, or it does not encrypt at all"
            )
        return ""

    def _behind(self, address: str) -> Unavailable:
        return Unavailable(
            f"{self._what} at {address} tells less than was known already: another process leads, "
            "and this one is cut off from storage; try again",
            reason=BEHIND,
        )

    @staticmethod
    def _asked_wait_s(error: Unavailable) -> float:
        return 0.0 if error.reason in (UNREACHABLE, BEHIND) else error.retry_after_s or 0.0
