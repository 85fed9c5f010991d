"""Counts copies of late shards, so that a batch in which none ever raced proves nothing of them."""

from __future__ import annotations

from typing import Any

from coordinator.aggregation.copying import Copying
from coordinator.aggregation.core.machine import JobRanges
from phalanx.testing.simulation.clocks import Environment
from tests.simulation.moments import Moments

_STEPS_KEPT = 3


class Races:
    """`asked`: copies asked for; `came`: frames of copies; `raced`: shards that came both ways."""

    def __init__(self, moments: Moments) -> None:
        self.asked = 0
        self.came = 0
        self.raced = 0
        self._moments = moments
        self._seen: dict[int, dict[tuple[int, ...], list[int]]] = {}

    def install(self, environment: Environment) -> None:
        """Count from now on."""
        contribute, hand_over = JobRanges.contribute, Copying._hand_over

        def contributing(ranges: JobRanges, frame: Any, *more: Any) -> Any:
            self._frame(ranges, frame)
            return contribute(ranges, frame, *more)

        def handing_over(copying: Copying, order: Any) -> None:
            self.asked += 1
            self._moments.met("copies_asked")
            hand_over(copying, order)

        environment.replace(JobRanges, "contribute", contributing)
        environment.replace(Copying, "_hand_over", handing_over)

    def _frame(self, ranges: JobRanges, frame: Any) -> None:
        seen = self._seen.setdefault(id(ranges), {})
        key = (frame.step, frame.round, frame.range, frame.first_element)
        masks = seen.get(key)
        if masks is None:
            for old in [known for known in seen if known[0] <= frame.step - _STEPS_KEPT]:
                del seen[old]
            masks = seen[key] = [0, 0]
        node = frame.node
        mine = (1 << node.first + node.span) - (1 << node.first)
        self.came += frame.copy
        self.raced += (mine & masks[not frame.copy] & ~masks[frame.copy]).bit_count()
        masks[frame.copy] |= mine
