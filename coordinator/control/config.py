"""Settings of a control process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from coordinator.control.core.quotas import Quotas
from coordinator.control.core.state import CoreConfig
from phalanx.addresses import is_loopback, split_addresses
from phalanx.config import TokensConfig, address, addresses, at_least, option, positive
from phalanx.errors import InvalidArgument, Violation
from phalanx.quota_file import violations_of


def _optional_address(value: str) -> str | None:
    return None if value == "" else address(value)


def _optional_addresses(value: str) -> str | None:
    return addresses(split_addresses(value))


@dataclass(frozen=True)
class ControlConfig(TokensConfig):
    """Leads the cluster: who is in it, who does what, what became of each job."""

    service: ClassVar[str] = "control"

    listen: str = option("127.0.0.1:7410", "Address to serve gRPC on.", check=address)
    storage: tuple[str, ...] = option(
        ("127.0.0.1:7420",),
        "Address of the storage service, or those of its replicas, comma separated.",
        check=addresses,
    )
    public_address: str = option(
        "",
        "Address under which clients reach storage, or those of its replicas, comma separated; "
        "empty: the host that they dialled.",
        check=_optional_addresses,
    )
    advertise: str = option(
        "",
        "Address under which other control processes reach this one; empty: that of --listen, or, "
        "where that is 0.0.0.0, the one on its way to storage.",
        check=_optional_address,
    )
    heartbeat_interval_s: float = option(
        0.5, "Time between heartbeats of a member.", check=positive, common=True
    )
    lease_ttl_s: float = option(
        2.0, "Silence after which a member counts as lost.", check=positive, common=True
    )
    range_min_bytes: int = option(
        8 * 1024 * 1024,
        "Parameters per aggregator from which a job is cut into ranges.",
        check=at_least(1024),
    )
    snapshot_every_records: int = option(
        2000, "Journal records after which a snapshot replaces them.", check=at_least(10)
    )
    collect_garbage_every_s: float = option(
        3600.0, "Time between collections of unused blobs in storage.", check=positive
    )
    ended_jobs_max: int = option(
        1000,
        "Ended jobs that are remembered; the oldest go first, even before their `retain`.",
        check=at_least(1),
    )
    running_jobs_max: int = option(64, "Jobs that run at once; others wait.", check=at_least(1))
    namespace_jobs_max: int = option(
        10_000, "Queued, running and paused jobs of a namespace; 0: no limit.", check=at_least(0)
    )
    namespace_slots_max: int = option(
        0,
        "Slots that the jobs of a namespace may insist on (min_workers); 0: no limit.",
        check=at_least(0),
    )
    namespace_memory_bytes: int = option(
        0, "Memory that they may insist on, on all workers; 0: no limit.", check=at_least(0)
    )

    namespace_running_jobs_max: int = option(
        0, "Jobs of a namespace that run at once; others wait; 0: no limit.", check=at_least(0)
    )
    namespace_queued_jobs_max: int = option(
        0, "Queued jobs of a namespace; 0: no limit.", check=at_least(0)
    )
    quotas: Path | None = option(
        None,
        "JSON file with other limits for single namespaces; it is read again when it changes.",
        common=True,
    )

    def violations(self) -> Sequence[Violation]:
        """Check also that a lease covers a few heartbeats."""
        found = [*super().violations(), *violations_of(self.quotas)]
        if self.lease_ttl_s < 2 * self.heartbeat_interval_s:
            shortest = 2 * self.heartbeat_interval_s
            text = f"must be at least two heartbeats, {shortest:g} s"
            found.append(Violation("lease_ttl_s", text))
        return found

    def core(self) -> CoreConfig:
        """Return what the core needs to know."""
        return CoreConfig(
            heartbeat_interval_s=self.heartbeat_interval_s,
            lease_ttl_s=self.lease_ttl_s,
            range_min_bytes=self.range_min_bytes,
            running_jobs_max=self.running_jobs_max,
            ended_jobs_max=self.ended_jobs_max,
            quotas=Quotas(
                jobs_max=self.namespace_jobs_max,
                slots_max=self.namespace_slots_max,
                memory_bytes_max=self.namespace_memory_bytes,
                running_jobs_max=self.namespace_running_jobs_max,
                queued_jobs_max=self.namespace_queued_jobs_max,
            ),
            storage_address=self._storage_of_members(),
        )

    def _storage_of_members(self) -> str:
        """Where members find storage who were not told; empty: on the host that they dialled."""
        if len(self.storage) == 1 or any(is_loopback(each) for each in self.storage):
            return ""
        return ",".join(self.storage)

    def code_allowed(self) -> bool:
        """Whether jobs may bring their own code: where tokens say whose may, or nobody else can
        reach this process."""
        return self.has_keys or is_loopback(self.listen)


def client_storage_address(config: ControlConfig) -> str:
    """Return where clients reach storage; an address of this machine alone is left to them."""
    if config.public_address:
        return config.public_address
    return ",".join(config.storage)


def checked_request_id(request_id: str) -> str:
    """Return a caller's request id. Raises InvalidArgument if it is no such thing."""
    if len(request_id) > 128 or any(not 33 <= ord(each) <= 126 for each in request_id):
        message = "use up to 128 printable ASCII characters without spaces"
        raise InvalidArgument(
            f"request_id {request_id[:60]!r} is not allowed; {message}",
            violations=(Violation("request_id", message),),
        )
    return request_id
