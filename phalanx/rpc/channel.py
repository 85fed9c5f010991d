"""Client side: channels with the project's options, and calls that are retried.

Every call has a deadline. Only ``UNAVAILABLE`` is retried, at most ``attempts`` times within the
one deadline, with growing, jittered waits or the wait that the server asked for.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import grpc
import grpc.aio

from phalanx.addresses import split_addresses
from phalanx.errors import InvalidArgument, PhalanxError, Unavailable
from phalanx.keys.caller import Service
from phalanx.rpc import protocol
from phalanx.rpc.credentials import ClientKeys, expected_name
from phalanx.rpc.renewed import RenewedChannel
from phalanx.rpc.replicas import ReplicasChannel
from phalanx.rpc.status import from_rpc_error
from phalanx.telemetry import traces

MESSAGE_LIMIT_BYTES = 4 * 1024 * 1024
"""No message of any service is larger; tensors travel in frames below it."""

ATTEMPTS = 4
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 1.0

_WHERE_THERE_IS_ANOTHER = (
    # A call that may take minutes must not spend them on a replica that stands still. Servers take
    # no more than a ping in ten seconds.
    ("grpc.keepalive_time_ms", 12_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    # Of the pings that measure the connection, while one of which is out no other one is sent.
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.http2.max_pings_without_data", 0),
)

Options = list[tuple[str, Any]]
ResponseT = TypeVar("ResponseT")


def channel_options(
    *, own_connection: bool = False, extra: Iterable[tuple[str, Any]] = ()
) -> Options:
    """Return the options of every channel.

    With ``own_connection`` the channel never shares its TCP connection with another channel of this
    process to the same address. An
    option in ``extra`` replaces the usual one.
    """
    return [
        # Of two options with one name gRPC takes the first.
        *extra,
        ("grpc.primary_user_agent", protocol.user_agent()),
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
        # gRPC's default waits up to two minutes before it dials a restarted server again.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # Despite its name this is the least time that one connection attempt is given.
        ("grpc.min_reconnect_backoff_ms", 5000),
        # A proxy set for web traffic would hijack even calls to 127.0.0.1.
        ("grpc.enable_http_proxy", 0),
        # Only uncompressed: a small compressed message could unfold into a huge one.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Reaps sockets whose peer vanished; the failure detector is the application's heartbeat.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.use_local_subchannel_pool", int(own_connection)),
    ]


def target_of(address: str) -> str:
    """Return gRPC's target for ``HOST:PORT`` or for several IPv4 addresses ``IP:PORT,IP:PORT``.

    Raises InvalidArgument for anything else.
    """
    parts = split_addresses(address)
    for part in parts:
        host, colon, port = part.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InvalidArgument(f"{part!r} is not an address; write HOST:PORT, as 127.0.0.1:7410")
    if not parts:
        raise InvalidArgument("the address is empty; write HOST:PORT, as 127.0.0.1:7410")
    if len(parts) == 1:
        return parts[0]
    if not all(part.rpartition(":")[0].replace(".", "").isdigit() for part in parts):
        raise InvalidArgument(
            f"{address!r}: several addresses must all be IPv4 addresses; or give one host name"
        )
    return "ipv4:" + ",".join(parts)


def open_channel(
    address: str,
    *,
    keys: ClientKeys | None = None,
    service: Service | None = None,
    own_connection: bool = False,
    extra: Iterable[tuple[str, Any]] = (),
) -> grpc.aio.Channel:
    """Open a channel for asyncio; close it with ``await channel.close()``.

    Several addresses, separated by commas, are those of replicas: when one fails, the calls after
    that go to the next.

    With ``keys`` it is encrypted, and only a ``service`` of the same authority is talked to;
    without a ``service`` the certificate must be that of the host.
    """
    addresses = split_addresses(address)
    if len(addresses) > 1:
        for each in addresses:
            target_of(each)  # now, not when it is needed

        def open_one(address: str) -> grpc.aio.Channel:
            # A connection of its own, which nobody else's failures keep from being dialled.
            return open_channel(
                address,
                keys=keys,
                service=service,
                own_connection=True,
                extra=[*extra, *_WHERE_THERE_IS_ANOTHER],
            )

        return ReplicasChannel(addresses, open_one)
    channel = _open(address, keys, service, own_connection, extra)
    tracing = traces.active()
    if tracing is None:
        return channel
    from phalanx.rpc.traced import TracedChannel

    return TracedChannel(tracing, channel)


def _open(
    address: str,
    keys: ClientKeys | None,
    service: Service | None,
    own_connection: bool,
    extra: Iterable[tuple[str, Any]],
) -> grpc.aio.Channel:
    target = target_of(address)
    if keys is None:
        options = channel_options(own_connection=own_connection, extra=extra)
        return grpc.aio.insecure_channel(target, options=options)
    options = channel_options(
        own_connection=own_connection, extra=[*extra, *expected_name(service)]
    )
    return RenewedChannel(
        keys, lambda credentials: grpc.aio.secure_channel(target, credentials, options=options)
    )


def open_sync_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    service: Service | None = None,
) -> grpc.Channel:
    """Open a channel for blocking callers (SDK and command line).

    With a ``service`` the certificate must be that of one, else that of the host.
    """
    if credentials is None:
        return grpc.insecure_channel(target_of(address), options=channel_options())
    options = channel_options(extra=expected_name(service))
    return grpc.secure_channel(target_of(address), credentials, options=options)


async def call_with_retry(
    method: Callable[..., Any],
    request: Any,
    *,
    timeout_s: float,
    attempts: int = ATTEMPTS,
) -> Any:
    """Call a unary ``method`` of an asyncio stub; return its response.

    ``timeout_s`` bounds all attempts together. Safe for reads and for calls that carry a request id
    or are otherwise idempotent. Raises PhalanxError.
    """
    retry = _Retry(timeout_s, attempts)
    while True:
        try:
            return await method(request, timeout=retry.remaining_s())
        except grpc.aio.AioRpcError as error:
            wait_s = retry.wait_after(from_rpc_error(error))
        await asyncio.sleep(wait_s)


class _Retry:
    """The one retry policy: attempts, deadline and waits of one call."""

    def __init__(self, timeout_s: float, attempts: int) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._attempts_left = attempts
        self._wait_s = _FIRST_WAIT_S

    def remaining_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def wait_after(self, error: PhalanxError) -> float:
        """Return how long to wait before the next attempt, or raise ``error`` if there is none."""
        self._attempts_left -= 1
        if not isinstance(error, Unavailable) or self._attempts_left <= 0:
            raise error
        wait_s = self._wait_s * random.uniform(0.8, 1.2)
        if error.retry_after_s is not None:
            wait_s = max(wait_s, error.retry_after_s * random.uniform(1.0, 1.2))
        if time.monotonic() + wait_s >= self._deadline:
            raise error
        self._wait_s = min(self._wait_s * 2, _LONGEST_WAIT_S)
        return wait_s
