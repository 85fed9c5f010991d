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

BETWEEN_ROUNDS = "between_rounds"
"""The first of the two rounds of a step is over; the actor owns the parameters. Few jobs have such
steps, and there it comes all the time: it is struck at where it is asked for."""

LAST_MOMENTS = {
    **{moment: kinds for moment, kinds in MOMENTS.items() if moment != "term_raised"},
    # A term was raised while the job was running; the actor leads:
    "owner_replaced": ("control",),
    # The actors are a worker and the aggregator that it has just sent a part of a payload:
    "payload_sent": ("worker", "aggregator"),
}
"""Those of a run's last fault, see `last`; some come all the time, so they can be waited for."""

LAST_ACTS = {
    "range_ahead": ("kill", "power_cut", "power_cut"),
    "payload_sent": ("kill", "reset", "reset"),
    "owner_replaced": ("kill", "power_cut"),
}
"""What is done then, where not everything shows something."""


class Moments:
    """Tells those who wait for a moment, once; they act from outside of all processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        self._actors: dict[str, tuple[str, ...]] = {}

    def wait(self, moment: str, act: Callable[[], None]) -> None:
        """Do something at the next moment of this kind."""
        self._waiting.setdefault(moment, []).append(act)

    def met(self, moment: str, *actors: str) -> None:
        """The moment is now; the actors are processes that it is about."""
        waiting = self._waiting.pop(moment, None)
        if waiting is None:
            return
        self._actors[moment] = actors
        for act in waiting:
            self._world.at(self._world.now_s, act)

    def actors(self, moment: str) -> tuple[str, ...]:
        """Those that the moment was about for which somebody waited last."""
        return self._actors.get(moment, ())
