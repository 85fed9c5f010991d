"""Runs of jobs whose contributions are compared: who lies in them, and who is only different."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.simulation import jobs, versions
from tests.simulation.parts import VERIFIED

if TYPE_CHECKING:
    from tests.simulation.runs import Settings

VERIFIED_SHARE, VERIFIED_WORKERS = 0.3, 3
"""How many of the runs that have so many workers with the same bits compare contributions."""
FROM_THE_FIRST_SHARE = 0.4
"""Part of those in which whoever lies does so before jobs begin as well."""
UNEQUAL_SHARE, UNEQUAL_LIARS, UNEQUAL_WORKERS = 0.2, 2, 4
"""Part of those with so many workers in which some lie about the same leaves."""


def drawn(settings: Settings, seed: int) -> Settings:
    """Draw whether a run is such a one."""
    settings = _verified(settings, random.Random(f"verified {seed}"))
    settings = _unequal(settings, random.Random(f"unequal {seed}"))
    return versions.drawn(settings, random.Random(f"versions {seed}"))


def _verified(settings: Settings, chance: random.Random) -> Settings:
    """In a part of the swarm contributions are compared, and maybe a worker lies. There must be
    enough workers for that, and none of them may be gone for good. Nor may one compute other bits:
    a job that began with its bits, while the others were away, would rightly wait for ever."""
    possible = settings.workers - settings.mixed >= VERIFIED_WORKERS and not settings.parts
    possible = possible and not settings.wishes  # which leave a job too few of them
    tolerant = any(shape.tolerant for shape in settings.shapes)
    if not possible or tolerant or chance.random() >= VERIFIED_SHARE:
        return settings
    parts = chance.choice(sorted(VERIFIED))
    shapes = tuple(jobs.composed(shape, parts) for shape in settings.shapes)
    liars = chance.choice([0, 1])
    from_the_first = chance.random() < FROM_THE_FIRST_SHARE
    return replace(
        settings,
        shapes=shapes,
        liars=liars,
        from_the_first=from_the_first,
        lasting=False,
        mixed=False,
    )


def _unequal(settings: Settings, chance: random.Random) -> Settings:
    """In a part of them more than one lies about a leaf; those that do not are enough to agree."""
    verified = all(shape.parts in VERIFIED for shape in settings.shapes)
    enough = verified and settings.workers >= UNEQUAL_WORKERS and not settings.parts
    if not enough or chance.random() >= UNEQUAL_SHARE:
        return settings
    return replace(settings, liars=UNEQUAL_LIARS, unequal=True)
