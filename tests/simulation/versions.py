"""A worker with an older version of a library, which gives other bits, where all jobs need that.

It is honest, so nobody may take it for one that lies; and since it tells its version, no job that
began with another one may be set up there at all.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phalanx.needs import TORCH
from tests.simulation.parts import VERIFIED

if TYPE_CHECKING:
    from tests.simulation.runs import Settings

SHARE = 0.3
"""Part of the runs with enough workers whose contributions are compared."""
OTHERS, AGREEING = 3, 2
"""Workers of the newer version, and those among them that do not lie: so many have to agree."""
OLD, NEW = "2.12.0", "2.13.0"
NEEDED = {"logistic_regression": TORCH}
"""What the models of jobs are made with in these runs."""


def drawn(settings: Settings, chance: random.Random) -> Settings:
    """Have the last worker of some runs be of an older version; the others are enough to agree."""
    verified = all(shape.parts in VERIFIED for shape in settings.shapes)
    others = settings.workers - 1
    enough = others >= OTHERS and others - settings.liars >= AGREEING
    if not verified or not enough or settings.mixed or chance.random() >= SHARE:
        return settings
    return replace(settings, old=True)


def version_of(worker: str, old: set[str]) -> str:
    """The version that a worker has."""
    return OLD if worker in old else NEW


def misplaced(plan: Any, worker: str, old: set[str]) -> bool:
    """Whether a job is set up by a worker of another version than it began with."""
    began = plan.equipment.libraries.get(TORCH.package, "")
    return bool(began) and began != version_of(worker, old)
