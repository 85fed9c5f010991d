"""The last fault of a run, alone: later faults, and whoever is left, repair what a bug has broken.

A frame that is lost with its stream comes again when its worker is replaced, when its job gets a
new term, when others compute copies. As long as something goes wrong every second, something of
that follows soon, and a bug in the one part that should have repaired it does not show. So in a
part of the runs everything is healed at a moment that matters, but for one thing that goes wrong
at that very moment; in some of these a single worker is left from then on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.simulation.cluster import Cluster
from tests.simulation.faults import ACTS, Faults
from tests.simulation.moments import LAST_ACTS, LAST_MOMENTS
from tests.simulation.scripts import CONVERGES_S

SHARE = 0.5
"""Part of the swarm's runs that end so."""

ALONE_SHARE = 0.35
"""Part of those in which only one worker is left."""


def drawn(settings: Any, chance: random.Random) -> Any:
    """The settings of a run of the swarm, some of which end with a last strike."""
    if settings.script or chance.random() >= SHARE:
        return settings
    moment = chance.choice(sorted(LAST_MOMENTS))
    act = chance.choice(LAST_ACTS.get(moment, ACTS))
    what = f"{moment} {chance.choice(LAST_MOMENTS[moment])} {act}"
    # Of a verified job one worker alone can do no step.
    verified = any(shape.verified for shape in settings.shapes)
    anybody = not verified and not settings.wishes
    if not settings.mixed and chance.random() < ALONE_SHARE and anybody:
        settings = replace(settings, converges_s=CONVERGES_S)
        what += " alone"
    # What comes seldom may come at any time.
    from_s = 0.0 if moment == "owner_replaced" else chance.uniform(0.15, 0.8)
    if moment == "range_ahead":
        aggregators = max(2, settings.aggregators)
        settings = replace(settings, aggregators=aggregators, range_min_bytes=64)
    return replace(settings, last=what, last_s=from_s * settings.faults_s)


class LastStrike:
    """Waits for its moment: "MOMENT KIND ACT", and " alone" where one worker is to be left."""

    def __init__(self, cluster: Cluster, faults: Faults, what: str, chance: random.Random) -> None:
        self.struck_s = -1.0
        """When its moment was; negative: it has not come."""
        self.struck = False
        """Whether there was somebody to be struck then."""
        self._cluster = cluster
        self._faults = faults
        self._what = what.split()
        self._chance = chance

    def lie_in_wait(self, from_s: float, heal: Callable[[], None]) -> None:
        """Strike at the first such moment from then on, and have everything else healed first."""
        if self._what:
            world, moments = self._cluster.world, self._faults.moments
            world.at(from_s, lambda: moments.wait(self._what[0], lambda: self._strike(heal)))

    def _strike(self, heal: Callable[[], None]) -> None:
        cluster, world = self._cluster, self._cluster.world
        moment, kind, act, *alone = self._what
        if not cluster.healed:
            world.stop()  # this was the time of faults
        heal()
        self.struck_s = world.now_s
        if alone:
            cluster.lose([each for each in cluster.workers if each != self._survivor(moment)])
        self.struck = self._faults.strike(self._chance, moment, kind, act)

    def _survivor(self, moment: str) -> str:
        actors = self._faults.moments.actors(moment)
        workers = [name for name in actors if name in self._cluster.workers]
        return workers[0] if workers else self._cluster.workers[0]
