"""How fast each worker computes the leaves of a job, as its heartbeats tell.

What counts is the time of a leaf in its process: the time of a step, and the examples per second of
a job that waits for all of its shards, are the same for fast workers and slow ones. Differences
that a shared machine makes by itself are taken for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HALF_LIFE_LEAVES = 4.0
HALF_LIFE_S = 1.0
"""A measure is half forgotten after so many leaves, but not within a shorter time."""

LEAVES_LEAST = 3
"""Leaves after which the first measure counts."""

EQUAL_WITHIN = 1.25
"""Workers whose leaves take up to so many times as long as usual, or as short, count as usual."""

SHORT_LEAF_S = 0.001
"""Leaves that take no longer than that say nothing: who is waited for decides, not who computes."""

SLOWEST, FASTEST = 1 / 64, 64.0

FORGOTTEN_AFTER_S, FORGOTTEN_AFTER_LEAVES = 10.0, 16
FORGOTTEN_HALF_S = 10.0
"""What was measured of one that computes nothing for longer than that is believed less and less."""


@dataclass
class Speed:
    """The measure of one worker in one job."""

    leaves: int = 0
    seconds: float = 0.0
    leaf_s: float = 0.0
    """Smoothed time of a leaf; 0: not known yet."""
    changed_s: float = 0.0
    first_s: float | None = None
    """When it was told for the first time."""

    def told(self, leaves: int, seconds: float, now_s: float) -> None:
        """Take in the two counters of a heartbeat."""
        if self.first_s is None:
            self.first_s = now_s
        new, took_s = leaves - self.leaves, seconds - self.seconds
        if new < 0 or took_s < 0:
            new, took_s, self.leaf_s = leaves, seconds, 0.0  # the worker began anew
        if new > 0:
            if self.known:
                elapsed_s = now_s - self.changed_s
                keep = max(0.5 ** (new / HALF_LIFE_LEAVES), 0.5 ** (elapsed_s / HALF_LIFE_S))
                self.leaf_s = keep * self.leaf_s + (1 - keep) * took_s / new
            else:
                self.leaf_s = seconds / leaves
            self.changed_s = now_s
        self.leaves, self.seconds = leaves, seconds

    @property
    def known(self) -> bool:
        """Whether there is a measure."""
        return self.leaves >= LEAVES_LEAST and self.leaf_s > 0

    def is_busy(self, part: float, now_s: float) -> bool:
        """Whether leaves took this part of the time since it was told first, once it was again."""
        if self.first_s is None or now_s <= self.first_s:
            return False
        return self.seconds >= part * (now_s - self.first_s)


def usual_leaf_s(speeds: Mapping[str, Speed], slots: Mapping[str, int]) -> float:
    """Return the time of a leaf on the median slot of those that are known; 0 if none is."""
    known = sorted((speeds[key].leaf_s, slots[key]) for key in slots if _known(speeds, key))
    half = sum(count for _, count in known) / 2
    for leaf_s, count in known:
        half -= count
        if half <= 0:
            return leaf_s
    return 0.0


def factors(
    speeds: Mapping[str, Speed], slots: Mapping[str, int], now_s: float
) -> dict[str, float]:
    """Return how many times as fast as usual each worker is; exactly 1 where no difference counts,
    or nothing is known."""
    usual_s = usual_leaf_s(speeds, slots)
    return {
        key: _factor(speeds[key], usual_s, now_s) if _known(speeds, key) else 1.0 for key in slots
    }


def _known(speeds: Mapping[str, Speed], worker_id: str) -> bool:
    return worker_id in speeds and speeds[worker_id].known


def _factor(speed: Speed, usual_s: float, now_s: float) -> float:
    if max(usual_s, speed.leaf_s) <= SHORT_LEAF_S:
        return 1.0
    measured, age_s = usual_s / speed.leaf_s, now_s - speed.changed_s
    kept_s = max(FORGOTTEN_AFTER_S, FORGOTTEN_AFTER_LEAVES * speed.leaf_s)
    if age_s > kept_s:
        measured **= 0.5 ** ((age_s - kept_s) / FORGOTTEN_HALF_S)
    if 1 / EQUAL_WITHIN <= measured <= EQUAL_WITHIN:
        return 1.0
    return min(max(measured, SLOWEST), FASTEST)
