"""How much of a server its peers may take up: connections, calls, and time without a word."""

import resource
from dataclasses import dataclass, fields, replace
from typing import Self

from phalanx.config import ServerConfig
from phalanx.errors import ResourceExhausted
from phalanx.texts import number_of

_RETRY_S = 1.0
_FILES_BESIDE_CONNECTIONS = 512


@dataclass(frozen=True)
class ServerLimits:
    """The limits of one server; the defaults leave room for several hundred workers.

    A *peer* is a host: as long as nobody proves a name, nothing else of a caller is known.
    """

    connections_max: int = 4096
    """Connections in all; one more is closed at once, before it costs anything."""
    peer_connections_max: int = 2048
    """Connections of one peer that have calls open; calls on one more are refused."""
    calls_max: int = 16_384
    """Open calls and streams in all; one more is refused."""
    peer_calls_max: int = 8192
    """Open calls and streams of one peer; one more is refused."""
    connection_streams_max: int = 128
    """Open calls and streams of one connection; more wait in their client (HTTP/2 says so)."""
    first_message_timeout_s: float = 5.0
    """How long a call may stay open without its first message."""
    idle_connection_s: float = 60.0
    """How long a connection without a call stays open."""

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """Return the limits that a service is configured with."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class Admission:
    """Counts the open calls of a server, by peer and by connection."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._calls = 0
        self._calls_of_peer: dict[str, int] = {}
        self._calls_of_connection: dict[str, int] = {}
        self._connections_of_peer: dict[str, int] = {}

    def enter(self, connection: str) -> None:
        """Count a call on a connection, named as gRPC does (``ipv4:10.0.0.1:4711``).

        Raises ResourceExhausted, and counts nothing, where a limit is reached.
        """
        limits, peer = self._limits, peer_of(connection)
        calls_of_peer = self._calls_of_peer.get(peer, 0)
        calls_of_connection = self._calls_of_connection.get(connection, 0)
        if self._calls >= limits.calls_max:
            raise _refused(
                f"the server has {number_of(limits.calls_max, 'call')} open", "TOO_MANY_CALLS"
            )
        if calls_of_peer >= limits.peer_calls_max:
            raise _refused(
                f"{peer} has {number_of(limits.peer_calls_max, 'call')} open on this server",
                "TOO_MANY_CALLS_OF_PEER",
            )
        if not calls_of_connection:
            connections = self._connections_of_peer.get(peer, 0)
            if connections >= limits.peer_connections_max:
                there = number_of(limits.peer_connections_max, "connection")
                what = f"{peer} has {there} to this server"
                raise _refused(what, "TOO_MANY_CONNECTIONS_OF_PEER")
            self._connections_of_peer[peer] = connections + 1
        self._calls += 1
        self._calls_of_peer[peer] = calls_of_peer + 1
        self._calls_of_connection[connection] = calls_of_connection + 1

    def of_strangers(self) -> "Admission":
        """Return one that leaves room to those who prove who they are, whoever else calls."""
        limits = self._limits
        return Admission(
            replace(
                limits,
                calls_max=max(1, limits.calls_max // 2),
                peer_calls_max=max(1, limits.peer_calls_max // 8),
            )
        )

    def leave(self, connection: str) -> None:
        """Count off a call that was let in."""
        peer = peer_of(connection)
        self._calls -= 1
        _count_off(self._calls_of_peer, peer)
        if _count_off(self._calls_of_connection, connection):
            _count_off(self._connections_of_peer, peer)

    @property
    def calls(self) -> int:
        """Calls that are open now."""
        return self._calls

    @property
    def peers(self) -> int:
        """Peers that have calls open now."""
        return len(self._calls_of_peer)


def peer_of(connection: str) -> str:
    """Return the host of a connection's name; the name itself where it has no port."""
    kind, _, rest = connection.partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else connection


def raise_open_files(wanted: int) -> int:
    """Raise this process's limit of open files as far as needed and allowed; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def make_room_for_connections(limits: ServerLimits) -> int:
    """Raise this process's limit of open files as far as needed and allowed.

    Returns how many connections there is room for, at most ``limits.connections_max``.
    """
    soft = raise_open_files(limits.connections_max + _FILES_BESIDE_CONNECTIONS)
    if soft == resource.RLIM_INFINITY:
        return limits.connections_max
    # Files and sockets of its own must never wait for strangers to hang up.
    return min(limits.connections_max, max(soft - _FILES_BESIDE_CONNECTIONS, soft // 2))


def _count_off(counts: dict[str, int], key: str) -> bool:
    """Subtract one; return whether that was the last."""
    left = counts[key] - 1
    if left > 0:
        counts[key] = left
        return False
    del counts[key]
    return True


def _refused(what: str, reason: str) -> ResourceExhausted:
    return ResourceExhausted(
        f"{what}, which is its limit; close some or try again later",
        reason=reason,
        retry_after_s=_RETRY_S,
    )
