"""Moments between two acts that belong together, at which a fault shows what no other can."""

from __future__ import annotations

from collections.abc import Callable

from phalanx.testing.simulation.loop import World

MOMENTS = {
    # Between what storage did and whoever waits for its answer:
    "term_raised": ("control", "aggregator"),
    "lease_granted": ("control", "storage"),
    "part_registered": ("aggregator", "storage"),
    "final_checkpoint": ("aggregator", "control", "user"),
    "job_submitted": ("control", "user"),
    "term_started": ("control", "aggregator"),
    "job_changed": ("control", "user"),
    "snapshot": ("control", "storage"),
    # Some range holds a version whole, others of the same job do not yet:
    "range_ahead": ("worker", "aggregator"),
    # Copies of late shards are asked for:
    "copies_asked": ("worker", "aggregator"),
}
"""Each moment with the kinds of process that are worth striking then."""


class Moments:
    """Tells those who wait for a moment, once; they act from outside of all processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    def wait(self, moment: str, act: Callable[[], None]) -> None:
        """Do something at the next moment of this kind."""
        self._waiting.setdefault(moment, []).append(act)

    def met(self, moment: str) -> None:
        """The moment is now."""
        for act in self._waiting.pop(moment, ()):
            self._world.at(self._world.now_s, act)
