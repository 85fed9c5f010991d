"""Ports that servers listen on: how they are opened, and what every connection may take up."""

from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

from phalanx.addresses import explain_bind_failure, split_address
from phalanx.rpc.channel import MESSAGE_LIMIT_BYTES, Options
from phalanx.rpc.limits import ServerLimits

HANDSHAKE_TIMEOUT_MS = 3000
_DEFAULT_LIMITS = ServerLimits()


def server_options(
    extra: Iterable[tuple[str, Any]] = (), limits: ServerLimits = _DEFAULT_LIMITS
) -> Options:
    """Return the options of every server; one in ``extra`` replaces the usual one."""
    return [
        # Of two options with one name gRPC takes the first.
        *extra,
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
        # A compressed message is refused before a byte of it is inflated.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Connections that never say a word are closed, later those that have nothing to say; a
        # bound on calls stops one client starving others.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", int(limits.idle_connection_s * 1000)),
        ("grpc.max_allowed_incoming_connections", limits.connections_max),
        ("grpc.max_concurrent_streams", limits.connection_streams_max),
        # With it a second server on a used port would silently share its connections.
        ("grpc.so_reuseport", 0),
        # Must allow what channel_options() of our clients does, or healthy calls die as
        # "too_many_pings".
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def open_port(
    server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None
) -> str:
    """Open a port; return its real HOST:PORT. This is the one place where one is opened.

    Without credentials it is plaintext. Raises FailedPrecondition, naming the address, when it
    cannot be used.
    """
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise explain_bind_failure(listen) from error
    host, _ = split_address(listen)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
