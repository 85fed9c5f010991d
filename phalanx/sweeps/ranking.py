"""Which configurations are best: pure functions of all scores of a round.

Scores are added up exactly and configurations with equal means are ordered by their numbers, so
that neither the order in which trials end nor that in which they are listed matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One configuration, trained without one fold and scored on it; None: it has no score."""

    configuration: int
    fold: int
    score: float | None
    note: str = ""


@dataclass(frozen=True)
class Scored:
    """All folds of a configuration, in order."""

    configuration: int
    scores: tuple[float | None, ...]
    note: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over the folds; None where one has no score."""
        known = [score for score in self.scores if score is not None]
        if len(known) < len(self.scores):
            return None
        scaled, exponent = _scaled(known)
        return math.ldexp(math.fsum(scaled) / len(known), exponent)

    @property
    def std(self) -> float | None:
        """Standard deviation over the folds."""
        mean = self.mean
        if mean is None:
            return None
        scaled, exponent = _scaled([score - mean for score in self.scores if score is not None])
        squares = math.fsum(each**2 for each in scaled)
        return math.ldexp(math.sqrt(squares / len(scaled)), exponent)


def _scaled(numbers: Sequence[float]) -> tuple[list[float], int]:
    """Return numbers as parts of a power of two, exactly, and its exponent: what a model scores
    that grew without bounds has squares, and sums, beyond all numbers."""
    _, exponent = math.frexp(max(abs(each) for each in numbers))
    return [math.ldexp(each, -exponent) for each in numbers], exponent


def scored(trials: Iterable[Trial]) -> list[Scored]:
    """Put the folds of each configuration together, by number."""
    folds: dict[int, dict[int, Trial]] = {}
    for trial in trials:
        folds.setdefault(trial.configuration, {})[trial.fold] = trial
    return [
        Scored(
            number,
            tuple(each[fold].score for fold in sorted(each)),
            next((each[fold].note for fold in sorted(each) if each[fold].note), ""),
        )
        for number, each in sorted(folds.items())
    ]


def best_first(entries: Sequence[Scored], *, more_is_better: bool) -> list[Scored]:
    """Order configurations by their means, the best first; those without a score are last."""

    def place(entry: Scored) -> tuple[bool, float, int]:
        mean = entry.mean
        if mean is None:
            return True, 0.0, entry.configuration
        return False, -mean if more_is_better else mean, entry.configuration

    return sorted(entries, key=place)


def ranks(entries: Sequence[Scored], *, more_is_better: bool) -> Mapping[int, int]:
    """Return 1 + the number of configurations that are better, by configuration."""
    ordered = best_first(entries, more_is_better=more_is_better)
    found: dict[int, int] = {}
    for place, entry in enumerate(ordered):
        same = place and entry.mean == ordered[place - 1].mean
        found[entry.configuration] = found[ordered[place - 1].configuration] if same else place + 1
    return found
