"""Settings of a worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from phalanx.config import ServerConfig, address, addresses, at_least, option, positive
from phalanx.errors import Violation
from worker.gpus import NO_GPUS, gpus_of_slot, is_gpu

DEFAULT_CONTROL = "127.0.0.1:7410"
GIBIBYTE = 2**30


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class WorkerConfig(ServerConfig):
    """Computes leaves: one session process, and one leaf process per slot."""

    service: ClassVar[str] = "worker"

    listen: str = option(
        "127.0.0.1:0",
        "Address where workers of a job without a parameter server reach this one; port 0 takes a "
        "free one.",
        check=address,
    )
    advertise: str = option(
        "",
        "Address under which other workers reach this process; empty: the one it serves on, "
        "or, where that is 0.0.0.0, the one on its way to control.",
    )
    control: tuple[str, ...] = option(
        (DEFAULT_CONTROL,), "Addresses of control, comma separated.", check=addresses, common=True
    )
    storage: tuple[str, ...] = option(
        (),
        "Address of storage, or those of its replicas, comma separated; empty: as control says.",
        check=addresses,
        common=True,
    )
    slots: int = option(0, "Leaves that run at once; 0: one per core.", check=at_least(0))
    cache_dir: Path = option(
        Path.home() / ".cache" / "phalanx", "Folder of cached data; workers may share it."
    )
    cache_bytes: int = option(10 * GIBIBYTE, "Size limit of the cache.", check=positive)
    slot_memory_bytes: int = option(
        0, "Private memory that a leaf process may use; 0: no limit.", check=at_least(0)
    )
    gpus: tuple[str, ...] = option(
        (),
        "GPUs that leaves may use, as CUDA names them, comma separated, or `none`; empty: those of "
        "CUDA_VISIBLE_DEVICES, else all of this machine. Each slot gets an equal share; a GPU that "
        "is named twice is shared by two slots.",
    )
    labels: tuple[str, ...] = option((), "Labels of this worker as name=value, comma separated.")
    leaf_timeout_s: float = option(
        120.0, "A leaf without an end after this time is killed.", check=positive
    )
    drain_timeout_s: float = option(
        30.0, "Longest time that leaving in good order may take.", check=positive
    )

    @property
    def slot_count(self) -> int:
        """Slots, with the default carried out."""
        return self.slots or _usable_cores()

    @property
    def label_map(self) -> dict[str, str]:
        """Labels by name."""
        return {name: value for name, _, value in (text.partition("=") for text in self.labels)}

    def violations(self) -> Sequence[Violation]:
        """Labels need a name and a value; a slot needs room for Python itself."""
        found = list(super().violations())
        found += [
            Violation("labels", f"{text!r} is not of the form name=value")
            for text in self.labels
            if not text.partition("=")[0] or "=" not in text
        ]
        found += self._wrong_gpus()
        if 0 < self.slot_memory_bytes < 64 * 2**20:
            found.append(Violation("slot_memory_bytes", "must be 0 or at least 64Mi"))
        return found

    def _wrong_gpus(self) -> list[Violation]:
        """To CUDA the first name that is none, or comes twice, is the end of the list."""
        if self.gpus == (NO_GPUS,):
            return []
        wrong = [name for name in self.gpus if not is_gpu(name)]
        if wrong:
            text = f"{wrong[0]!r} is no GPU; write 0 or GPU-8f2…, as `nvidia-smi -L` does, or none"
            return [Violation("gpus", text)]
        shares = [gpus_of_slot(self.gpus, each, self.slot_count) for each in range(self.slot_count)]
        twice = [share for share in shares if len({*share}) < len(share)]
        text = f"one slot would have a GPU twice ({', '.join(twice[0])})" if twice else ""
        return [Violation("gpus", text)] if text else []
