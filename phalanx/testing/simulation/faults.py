"""Seeded fault schedules: each run draws which kinds of fault it has, and how likely each is.

A run with every fault all the time finds less than many runs with a few each (swarm testing): some
faults hide what others would show. So each kind is in a run or not, and those that are have very
different weights.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping

from phalanx.testing.simulation.loop import World

End = Callable[[], None]
Begin = Callable[[random.Random], tuple[str, End | None, float] | None]
"""Begins a fault: what was done, how it ends, after how many seconds; None: not possible now."""


def nothing() -> None:
    """The end of a fault that ends by itself."""


class Schedule:
    """Draws and performs the faults of one run; `fired` counts them by kind."""

    def __init__(
        self,
        world: World,
        kinds: Mapping[str, Begin],
        *,
        every_s: float,
        share: float = 0.6,
    ) -> None:
        self.fired: Counter[str] = Counter()
        self._world = world
        self._kinds = kinds
        self._every_s = every_s
        self._chance = random.Random(f"faults {world.seed}")
        chosen = [kind for kind in kinds if self._chance.random() < share]
        self.weights = {kind: self._chance.expovariate(1.0) + 0.15 for kind in chosen}
        self._open: dict[int, tuple[str, End]] = {}
        self._number = 0
        self._until_s = 0.0

    def begin(self, first_s: float, until_s: float) -> None:
        """Let faults happen between two moments."""
        self._until_s = until_s
        if self.weights:
            self._world.at(first_s, self._next)

    def heal(self) -> None:
        """End every fault that still lasts, and begin no other."""
        self._until_s = 0.0
        while self._open:
            self._end(next(iter(self._open)))

    def _next(self) -> None:
        world = self._world
        if world.now_s >= self._until_s:
            return
        kinds = list(self.weights)
        kind = self._chance.choices(kinds, [self.weights[each] for each in kinds])[0]
        begun = self._kinds[kind](self._chance)
        if begun is not None:
            what, end, after_s = begun
            self.fired[kind] += 1
            world.note(0, f"{kind} {what}".encode())
            world.say(f"FAULT {kind}: {what} for {after_s:.2f} s")
            if end is not None:
                self._number += 1
                number = self._number
                self._open[number] = (what, end)
                world.at(world.now_s + after_s, lambda: self._end(number))
        world.at(world.now_s + self._chance.expovariate(1.0 / self._every_s), self._next)

    def _end(self, number: int) -> None:
        found = self._open.pop(number, None)
        if found is not None:
            self._world.say(f"FAULT over: {found[0]}")
            found[1]()
