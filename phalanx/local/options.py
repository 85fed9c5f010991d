"""What a cluster on one machine consists of."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phalanx.errors import InvalidArgument

HOST = "127.0.0.1"
MEMBERS_MAX = 256
SHARED_PLACES = {"PHALANX_STORAGE_METADATA", "PHALANX_STORAGE_BLOBS"}


@dataclass(frozen=True)
class LocalOptions:
    """How many processes of which kind, and where they keep their state.

    Several ``storages`` are replicas on the database and the object store that ``environment``
    names. ``port`` is control's; 0 takes a free one, as all other processes do. ``slots`` are leaf
    processes per worker; None shares the cores out. ``link_roots`` are the folders below which
    linked files may lie. ``environment`` is added to that of every process. A ``secure`` cluster
    has keys, in the folder ``keys`` of its state.
    """

    state_dir: Path
    workers: int = 4
    aggregators: int = 1
    controls: int = 1
    storages: int = 1
    port: int = 0
    slots: int | None = None
    log_level: str = "info"
    link_roots: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    secure: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("workers", 0),
            ("aggregators", 1),
            ("controls", 1),
            ("storages", 1),
        ):
            if not least <= getattr(self, name) <= MEMBERS_MAX:
                raise InvalidArgument(
                    f"{name} is {getattr(self, name)}; it must be {least} to {MEMBERS_MAX}"
                )
        if self.storages > 1 and not self.environment.keys() >= SHARED_PLACES:
            raise InvalidArgument(
                f"storages is {self.storages}; only one can have a state folder: say where they "
                f"keep things with {' and '.join(sorted(SHARED_PLACES))} in environment"
            )
        if self.slots is not None and self.slots < 1:
            raise InvalidArgument(f"slots is {self.slots}; it must be 1 or more")
        for root in self.link_roots:
            if not root.is_dir():
                raise InvalidArgument(f"link_roots: there is no folder {root}")
            if "," in str(root):
                raise InvalidArgument(f"link_roots: {root} has a comma, which separates folders")
        if not 0 <= self.port <= 65535:
            raise InvalidArgument(f"port is {self.port}; it must be 0 to 65535")

    @property
    def keys_dir(self) -> Path | None:
        """Where the keys are; None: the cluster has none."""
        return self.state_dir.absolute() / "keys" if self.secure else None

    @property
    def slots_per_worker(self) -> int:
        """Leaf processes of each worker: the given number, else an equal share of the cores."""
        if self.slots is not None:
            return self.slots
        return max(1, len(os.sched_getaffinity(0)) // max(1, self.workers))
