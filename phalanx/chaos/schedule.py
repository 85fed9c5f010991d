"""Which fault happens when. Pure: a seed gives the same schedule everywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.errors import InvalidArgument

KILL, PAUSE, SLOW = "kill", "pause", "slow"
HOLD_S = 4.0
"""How long a process is paused or slow; longer than the lease of 2 s after which it is lost."""
JITTER = 0.2
"""Part of each period in which its fault may happen; the rest is left for the recovery."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault: what is done to a process of which role.

    ``weight`` is its part of the default mix; 0 means that it must be asked for.
    """

    name: str
    action: str
    role: str
    weight: int
    meaning: str

    @property
    def lasts_s(self) -> float:
        """How long the harm is done; a kill is over at once."""
        return 0.0 if self.action == KILL else HOLD_S


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill-worker", KILL, "worker", 8, "kill -9 of a worker"),
        Fault("pause-worker", PAUSE, "worker", 4, "SIGSTOP of a worker for 4 s"),
        Fault("slow-worker", SLOW, "worker", 2, "a worker is 10 times slower for 4 s"),
        Fault("kill-control", KILL, "control", 1, "kill -9 of a control process"),
        Fault("kill-aggregator", KILL, "aggregator", 1, "kill -9 of an aggregator"),
        Fault("kill-storage", KILL, "storage", 0, "kill -9 of storage"),
        Fault("pause-control", PAUSE, "control", 0, "SIGSTOP of a control process for 4 s"),
        Fault("pause-aggregator", PAUSE, "aggregator", 0, "SIGSTOP of an aggregator for 4 s"),
        Fault("pause-storage", PAUSE, "storage", 0, "SIGSTOP of storage for 4 s"),
    )
}


@dataclass(frozen=True)
class Planned:
    """A fault and its time, in seconds after the first may happen; ``pick`` in [0, 1) chooses the
    victim."""

    at_s: float
    fault: Fault
    pick: float

    def choose(self, victims: Sequence[str]) -> str:
        """Return one of the possible victims (at least one), whatever their order."""
        ordered = sorted(victims)
        return ordered[int(self.pick * len(ordered))]


def faults_named(names: Sequence[str]) -> list[Fault]:
    """Return the mix: one entry per part. No name gives the default mix; a repeated name counts
    more.

    Raises InvalidArgument for a name that is no fault.
    """
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise InvalidArgument(
            f"{unknown[0]!r} is no fault; choose from {', '.join(FAULTS)}", reason="NO_SUCH_FAULT"
        )
    if names:
        return [FAULTS[name] for name in names]
    return [fault for fault in FAULTS.values() for _ in range(fault.weight)]


def draw(mix: Sequence[Fault], every_s: float, duration_s: float, seed: int) -> list[Planned]:
    """Return one fault per period, in the proportions of the mix.

    The faults are dealt like cards: all of the mix, shuffled, before any comes again, so that also
    a short run has the wanted proportions.
    """
    chance = random.Random(seed)
    planned: list[Planned] = []
    deck: list[Fault] = []
    for period in range(int(duration_s / every_s)):
        if not deck:
            deck = list(mix)
            chance.shuffle(deck)
        at_s = (period + chance.random() * JITTER) * every_s
        planned.append(Planned(at_s, deck.pop(), chance.random()))
    return planned
