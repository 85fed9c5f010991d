"""How far a job is, as often as one looks, also while control is away."""

from __future__ import annotations

import http.client
import math
import re
import statistics
import urllib.request
from collections.abc import Sequence

from phalanx.chaos.report import Commit, Span, gaps
from phalanx.chaos.victims import Victim

SCRAPE_TIMEOUT_S = 0.5
SEEN_WITHIN_S = 0.5
"""How soon commits are usually seen; recorded times that are further away are another clock's."""
_LINE = re.compile(
    r"^phalanx_job_(step|examples_lost_total|examples_doubled_total)"
    r'\{job_id="([^"]*)"\} ([0-9.e+]+)$',
    re.MULTILINE,
)


class StepLog:
    """The steps that were seen to be committed, and when each was first seen."""

    def __init__(self) -> None:
        self._commits: list[Commit] = []

    def saw(self, step: int, unix_s: float) -> None:
        """Note that the job is at this step now. After a roll-back what was undone is forgotten."""
        while self._commits and self._commits[-1].step > step:
            self._commits.pop()
        if not self._commits or self._commits[-1].step < step:
            self._commits.append(Commit(step, unix_s))

    @property
    def usual_gap_s(self) -> float:
        """The median of the seconds per step; 0.0 as long as nobody knows."""
        found = gaps(self._commits, Span(-math.inf, math.inf))
        return statistics.median(found) if found else 0.0

    def better(self, points: Sequence[Commit]) -> list[Commit]:
        """Return the commits that were recorded with their own times if they are as many as those
        that were seen, and by the same clock. Long jobs record only some, and the clock is that of
        the machine of the aggregator. Seen are the latest, which may not be recorded yet."""
        if not points or len(points) < len(self._commits) or not self._agrees(points):
            return list(self._commits)
        later = (each for each in self._commits if each.step > points[-1].step)
        return [*points, *(each for each in later if each.unix_s > points[-1].unix_s)]

    def _agrees(self, points: Sequence[Commit]) -> bool:
        recorded = {point.step: point.unix_s for point in points}
        late_s = [
            each.unix_s - recorded[each.step] for each in self._commits if each.step in recorded
        ]
        return not late_s or 0 <= statistics.median(late_s) <= SEEN_WITHIN_S


class Gauges:
    """What the aggregators' metrics say of one job; they begin at 0 after a restart."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._steps: dict[int, int] = {}
        self._counts: dict[tuple[int, str], int] = {}

    def read(self, aggregators: Sequence[Victim]) -> int | None:
        """Return the step of whoever got further (or back) since the last time; None if nobody
        did."""
        moved: list[int] = []
        for each in aggregators:
            if each.role != "aggregator":
                continue
            for name, value in _scrape(each.metrics_address, self._job_id).items():
                if name != "step":
                    self._counts[each.pid, name] = value
                elif self._steps.get(each.pid) != value:
                    self._steps[each.pid] = value
                    moved.append(value)
        # Ranges commit the same steps one after another; the last of them makes the version whole.
        return min(moved, default=None)

    @property
    def lost(self) -> int | None:
        """Examples lost, over all processes that were read; None if none was."""
        return self._sum("examples_lost_total")

    @property
    def doubled(self) -> int | None:
        """Examples doubled, over all processes that were read; None if none was."""
        return self._sum("examples_doubled_total")

    def _sum(self, name: str) -> int | None:
        found = [count for (_, seen), count in self._counts.items() if seen == name]
        return sum(found) if found else None


def parse(text: str, job_id: str) -> dict[str, int]:
    """Return the values of one job in a page of metrics."""
    return {name: int(float(value)) for name, job, value in _LINE.findall(text) if job == job_id}


def _scrape(address: str, job_id: str) -> dict[str, int]:
    try:
        # Not through a proxy: the address is one of this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{address}/metrics", timeout=SCRAPE_TIMEOUT_S) as answer:
            return parse(answer.read().decode(), job_id)
    except (OSError, http.client.HTTPException):
        # It has just been killed, or is stopped.
        return {}
