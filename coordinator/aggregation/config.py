"""Settings of an aggregator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from phalanx.config import ServerConfig, address, addresses, at_least, option


@dataclass(frozen=True)
class AggregatorConfig(ServerConfig):
    """Owns ranges of the jobs' parameters, reduces contributions and applies updates."""

    service: ClassVar[str] = "aggregator"

    listen: str = option("127.0.0.1:7430", "Address to serve gRPC on.", check=address)
    control: tuple[str, ...] = option(
        ("127.0.0.1:7410",), "Addresses of control, comma separated.", check=addresses, common=True
    )
    storage: tuple[str, ...] = option(
        (),
        "Address of storage, or those of its replicas, comma separated; empty: as control says.",
        check=addresses,
        common=True,
    )
    advertise: str = option(
        "",
        "Address under which workers reach this process; empty: the one it serves on, "
        "or, where that is 0.0.0.0, the one on its way to control.",
    )
    connection_streams_max: int = option(
        1024,
        "Streams open at once on one connection, one per job of a worker; more wait.",
        check=at_least(1),
    )
