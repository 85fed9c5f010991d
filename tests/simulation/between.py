"""Jobs that are between two steps: a range is ahead of others, or one of a step's two rounds is
over. Whoever is struck then has what nobody else has."""

from __future__ import annotations

from coordinator.aggregation.core.machine import JobRanges
from phalanx.testing.simulation.loop import World
from tests.simulation import jobs
from tests.simulation.moments import BETWEEN_ROUNDS, Moments


class Between:
    """Tells of such moments, and counts what came of them."""

    def __init__(self, world: World, moments: Moments) -> None:
        self.rolled_back = 0
        """Terms that ended between the two rounds of a step."""
        self._world = world
        self._moments = moments
        self._newest: dict[tuple[str, int], int] = {}
        self._rounds: dict[str, tuple[int, int]] = {}
        """By job: its term, and the version that it got to in that."""

    def got_to(self, ranges: JobRanges, shape: jobs.Shape, version: int) -> None:
        """A range has a version whole."""
        if ranges.plan.range_count > 1:
            self._is_ahead(ranges, version)
        elif shape.rounds > 1:
            self._is_within(ranges, shape, version)

    def _is_ahead(self, ranges: JobRanges, version: int) -> None:
        key = (ranges.plan.job_id, ranges.term)
        if version > self._newest.get(key, 0):
            self._newest[key] = version
            self._moments.met("range_ahead")

    def _is_within(self, ranges: JobRanges, shape: jobs.Shape, version: int) -> None:
        job_id, term = ranges.plan.job_id, ranges.term
        before, newest = self._rounds.get(job_id, (term, 0))
        self.rolled_back += term > before and newest % shape.rounds != 0
        self._rounds[job_id] = term, version
        if version % shape.rounds:
            self._moments.met(BETWEEN_ROUNDS, self._world.loop.current.name)
