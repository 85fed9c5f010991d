"""Which processes a local cluster has, with their arguments and addresses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phalanx.local.keys import TOKENS_FILE
from phalanx.local.members import MemberPlan
from phalanx.local.options import HOST, LocalOptions
from phalanx.local.ports import check_free, free_ports
from phalanx.sdk.keys import CA_FILE

CONTROL, AGGREGATOR, WORKER, STORAGE = "control", "aggregator", "worker", "storage"
IMPORTS = {
    STORAGE: ("storage.config", "storage.runtime"),
    CONTROL: ("coordinator.control.main",),
    AGGREGATOR: ("coordinator.aggregation.main", "coordinator.aggregation.process"),
    # The last three are what a worker's leaf processes load.
    WORKER: ("worker.main", "worker.leaf.loop", "phalanx.numeric_fingerprint", "numpy.random"),
}
"""By role: what the fork server loads before it forks a member."""


@dataclass(frozen=True)
class Layout:
    """The plan of one local cluster.

    Addresses are chosen before anything starts, so that all processes can start at once and come
    back under the same address after a death.
    """

    options: LocalOptions
    storage_addresses: tuple[str, ...]
    control_addresses: tuple[str, ...]
    aggregator_addresses: tuple[str, ...]
    public_storage_addresses: tuple[str, ...] = ()
    public_control_addresses: tuple[str, ...] = ()
    """Where people call a cluster with keys, and need a token only; without keys there are no such
    addresses of their own."""

    @classmethod
    def choose(cls, options: LocalOptions) -> "Layout":
        """Choose free ports for everything but the port that the user gave.

        Raises FailedPrecondition if that one is in use.
        """
        if options.port:
            check_free(options.port)
        storages = options.storages
        dialled = storages + options.controls
        ports = free_ports(dialled + options.aggregators + (dialled if options.secure else 0))
        if options.port:
            # Of the first control process, where people dial it.
            ports[-options.controls if options.secure else storages] = options.port
        addresses = [f"{HOST}:{port}" for port in ports]
        members = dialled + options.aggregators
        return cls(
            options=options,
            storage_addresses=tuple(addresses[:storages]),
            control_addresses=tuple(addresses[storages:dialled]),
            aggregator_addresses=tuple(addresses[dialled:members]),
            public_storage_addresses=tuple(addresses[members : members + storages]),
            public_control_addresses=tuple(addresses[members + storages :]),
        )

    @property
    def client_addresses(self) -> tuple[str, ...]:
        """Where people reach control."""
        return self.public_control_addresses or self.control_addresses

    @property
    def storage_address(self) -> str:
        """Where members reach storage: all replicas, separated by commas."""
        return ",".join(self.storage_addresses)

    @property
    def client_storage_address(self) -> str:
        """Where people reach storage: all replicas, separated by commas."""
        return ",".join(self.public_storage_addresses) or self.storage_address

    def members(self) -> list[MemberPlan]:
        """Return the plans of all members, in the order in which they shall start."""
        plans = [self._storage(index) for index in range(self.options.storages)]
        plans += [self._control(index) for index in range(self.options.controls)]
        plans += [self._aggregator(index) for index in range(self.options.aggregators)]
        plans += [self.worker(index) for index in range(self.options.workers)]
        return plans

    def worker(self, index: int) -> MemberPlan:
        """Return the plan of one worker, counted from 0."""
        id = f"worker-{index + 1}"
        arguments = [
            *("worker", "--control", ",".join(self.control_addresses)),
            *("--storage", self.storage_address),
            *("--slots", str(self.options.slots_per_worker)),
            *("--cache-dir", str(self._state_dir / "cache" / id)),
        ]
        return self._plan(WORKER, id, arguments)

    def _storage(self, index: int) -> MemberPlan:
        arguments = [
            *("storage", "--listen", self.storage_addresses[index]),
            *("--state", str(self._state_dir / "storage")),
        ]
        for root in self.options.link_roots:
            arguments += ["--link-root", str(root.absolute())]
        if self.public_storage_addresses:
            arguments += self._tokens(self.public_storage_addresses[index])
        id = "storage" if self.options.storages == 1 else f"storage-{index + 1}"
        return self._plan(STORAGE, id, arguments)

    def _control(self, index: int) -> MemberPlan:
        arguments = [
            *("coordinator", "control", "--listen", self.control_addresses[index]),
            *("--storage", self.storage_address),
            *("--public-address", self.client_storage_address),
        ]
        if self.public_control_addresses:
            arguments += self._tokens(self.public_control_addresses[index])
        return self._plan(CONTROL, f"control-{index + 1}", arguments)

    def _aggregator(self, index: int) -> MemberPlan:
        arguments = [
            *("coordinator", "aggregator", "--listen", self.aggregator_addresses[index]),
            *("--control", ",".join(self.control_addresses)),
            *("--storage", self.storage_address),
        ]
        return self._plan(AGGREGATOR, f"aggregator-{index + 1}", arguments)

    def _tokens(self, public_listen: str) -> list[str]:
        keys_dir = self.options.keys_dir
        if keys_dir is None:
            return []
        return ["--tokens", str(keys_dir / TOKENS_FILE), "--public-listen", public_listen]

    def _tls(self, role: str) -> list[str]:
        keys_dir = self.options.keys_dir
        if keys_dir is None:
            return []
        return [
            *("--tls-certificate", str(keys_dir / f"{role}.pem")),
            *("--tls-key", str(keys_dir / f"{role}.key")),
            *("--tls-ca", str(keys_dir / CA_FILE)),
        ]

    def _plan(self, role: str, id: str, arguments: Sequence[str]) -> MemberPlan:
        return MemberPlan(
            role=role,
            id=id,
            arguments=(*arguments, *self._tls(role), "--log-level", self.options.log_level),
            log=self._state_dir / "logs" / f"{id}.log",
            announce=self._state_dir / "run" / f"{id}.json",
            imports=IMPORTS[role],
        )

    @property
    def _state_dir(self) -> Path:
        return self.options.state_dir
