"""Settings of an aggregator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from phalanx.config import ServiceConfig, address, addresses, option


@dataclass(frozen=True)
class AggregatorConfig(ServiceConfig):
    """Owns ranges of the jobs' parameters, reduces contributions and applies updates."""

    service: ClassVar[str] = "aggregator"

    listen: str = option("127.0.0.1:7430", "Address to serve gRPC on.", check=address)
    control: tuple[str, ...] = option(
        ("127.0.0.1:7410",), "Addresses of control, comma separated.", check=addresses, common=True
    )
    storage: tuple[str, ...] = option(
        (), "Address of storage; empty: as control says.", check=addresses, common=True
    )
    advertise: str = option(
        "", "Address under which workers reach this process; empty: the one it serves on."
    )
