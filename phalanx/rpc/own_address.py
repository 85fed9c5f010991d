"""Under which address others reach a server that listens on all addresses of its machine."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from typing import Any

from phalanx.addresses import split_address

ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
_UNKNOWN_PEER_WAIT_S = 0.5


async def own_address(listening: str, peers: Sequence[str], stop: asyncio.Event) -> str:
    """Return where ``peers``, or the first of them that is known, reach a server.

    That is ``listening`` itself unless its host stands for all of this machine; then it is the
    address that this machine has on its way to the peer. Waits until the name of one is known, as
    that of a container that is not there yet, or ``stop`` is set.
    """
    host, port = split_address(listening)
    if host not in ANY_HOST:
        return listening
    while not stop.is_set():
        for peer in peers:
            with contextlib.suppress(OSError):
                return f"{await _source_of_route(peer, only_ipv4=':' not in host)}:{port}"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _UNKNOWN_PEER_WAIT_S)
    return listening


async def _source_of_route(peer: str, *, only_ipv4: bool) -> str:
    host, port = split_address(peer)
    family = socket.AF_INET if only_ipv4 else socket.AF_UNSPEC
    loop = asyncio.get_running_loop()
    found: Any = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM, family=family)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # Of a datagram socket this sends nothing; the kernel looks for the way there.
        probe.connect(address)
        source = str(probe.getsockname()[0])
    return f"[{source}]" if ":" in source else source
