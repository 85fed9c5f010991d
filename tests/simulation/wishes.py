"""Jobs that may not run anywhere: what they ask of the cluster besides what they compute.

In a part of the runs workers stand in zones, jobs want one of these, or a few workers only, or to
come first, and not all of them may run at once. What must hold is looked at where leaves run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from phalanx.v1.job_spec_pb2 import JobSpec
from tests.simulation import jobs

SHARE = 0.03
"""Part of the swarm's runs in which jobs have wishes."""

ZONES = ("north", "south")
ZONE = "zone"
"""The label that says where a worker stands."""

SLOT_BYTES = {"north": 64 << 20, "south": 128 << 20}
SETTINGS = ("workers", "shapes", "wishes", "running_jobs_max", "odd", "lasting")
"""What `wishful` changes."""
PRIORITIES = (0, 20, 50, 90)
ODD_SHARE = 0.3
"""Part of these runs in which the first worker's own leaves have other bits."""
JOBS, WORKERS = 3, 3
"""So many of each there are at least: with fewer there is little to be shared."""


@dataclass(frozen=True)
class Wish:
    """What one job asks of the cluster."""

    priority: int = 50
    workers_max: int = 0
    """Workers that host it at most; 0: any number."""
    workers_min: int = 0
    """Workers that have to be there for it to begin; 0: one."""
    zone: str = ""
    """Where those workers have to be; empty: anywhere."""
    memory_bytes: int = 0
    """Memory that each of its leaves needs; 0: it does not say."""
    fall_back_s: float = 0.0
    """After so long it may go on with other bits; 0: never."""

    def write(self, spec: JobSpec) -> None:
        """Have a job ask for it."""
        spec.priority = self.priority
        resources = spec.resources
        if self.workers_max:
            resources.max_workers = self.workers_max
        if self.workers_min:
            resources.min_workers = self.workers_min
        if self.memory_bytes:
            resources.memory_bytes = self.memory_bytes
        if self.fall_back_s:
            spec.reproducibility.bitwise.fall_back_after.FromMilliseconds(
                int(self.fall_back_s * 1000)
            )
        if self.zone:
            resources.worker_labels[ZONE] = self.zone


def zone_of(worker: str) -> str:
    """Where a worker stands."""
    return ZONES[int(worker.rpartition("-")[2]) % len(ZONES)]


def slot_bytes_of(worker: str) -> int:
    """How much memory each of its slots has."""
    return SLOT_BYTES[zone_of(worker)]


def labels_of(worker: str) -> tuple[str, ...]:
    """What a worker says of itself."""
    return (f"{ZONE}={zone_of(worker)}",)


def may_compute(spec: JobSpec, worker: str) -> bool:
    """Whether a leaf of a job may run on a worker."""
    wanted = spec.resources
    there = ZONE not in wanted.worker_labels or wanted.worker_labels[ZONE] == zone_of(worker)
    return there and wanted.memory_bytes <= slot_bytes_of(worker)


def drawn(
    settings: Any, chance: random.Random, draw_job: Callable[[random.Random], jobs.Shape]
) -> Any:
    """The settings of a run of the swarm, in some of which jobs have wishes, see `wishful`."""
    # Those that compare contributions need more workers than a wish may leave them.
    possible = settings.lasting and not settings.script
    if not possible or chance.random() >= SHARE:
        return settings
    return wishful(settings, chance, draw_job)


def wishful(
    settings: Any, chance: random.Random, draw_job: Callable[[random.Random], jobs.Shape]
) -> Any:
    """The settings with wishes; `draw_job` draws more jobs where there are too few of them."""
    shapes = settings.shapes
    shapes += tuple(draw_job(chance) for _ in range(JOBS - len(shapes)))
    return replace(
        settings,
        workers=max(settings.workers, WORKERS),
        shapes=shapes,
        wishes=tuple(_draw(chance) for _ in shapes),
        running_jobs_max=chance.choice([1, 2, 64]),
        odd=chance.random() < ODD_SHARE,
        lasting=False,  # nobody may be gone for good: he may be the only one in his zone
    )


def _draw(chance: random.Random) -> Wish:
    zone = chance.choice(["", "", *ZONES])
    most = chance.choice([0, 0, 1, 2])
    # In a zone there may be one only.
    workers_min = 0 if zone or most == 1 else chance.choice([0, 2])
    return Wish(
        priority=chance.choice(PRIORITIES),
        workers_max=most,
        workers_min=workers_min,
        zone=zone,
        memory_bytes=0 if zone or workers_min else chance.choice([0, 0, 96 << 20]),
    )
