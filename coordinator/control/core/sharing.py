"""How running jobs share the workers, and which queued one is next: pure functions.

Jobs that may run anywhere are on all workers, whose slots share their time by weight
(`worker.core.shares`). What is left to placement is where jobs are that may not: a limited job goes
to the workers with the least to do, and the others have fewer shards there, as they get less of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

AGEING_S = 60.0
"""A queued job gains one point of priority in such a time, so that each has its turn."""


def weight(priority: int) -> int:
    """Return how much of the slots a job gets, relative to others; even the last gets some."""
    return max(1, priority)


def rank(priority: int, waited_s: float) -> float:
    """Return how urgent a queued job is: its priority, and how long it has waited."""
    return priority + max(0.0, waited_s) / AGEING_S


def load(slots: int, weights: Iterable[int]) -> float:
    """Return how crowded a worker is: the weights of the jobs that it hosts, per slot."""
    return sum(weights) / slots


def parts(own: int, everywhere: int, limited: Mapping[str, int]) -> dict[str, float]:
    """Return what part of each worker's time a job gets, 1 where it gets most.

    `own` is its weight, `everywhere` the sum of those of the other jobs that are on all workers,
    `limited` that of the jobs that are on each worker and not on all.
    """
    least = min(limited.values(), default=0)
    usual = own + everywhere + least
    return {key: usual / (own + everywhere + more) for key, more in limited.items()}
