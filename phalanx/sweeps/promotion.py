"""Which trials of a rung go on to the next: ASHA, with results in an order that no machine changes.

Asynchronous successive halving promotes a trial once it is among the best 1 / `reduction` of the
results of its rung so far. Whose results these are would depend on who was fast. Here the trials of
a rung have places, and the results so far are those of a run of places from the first: whichever
end first, each place decides the same. So promotions are a function of the results alone, and yet
none waits for trials of later places.

The places of the first rung are drawn by the seed: a grid lists neighbours one after another, and
where they become better and better each would be among the best of those before it. Those of
the next rung are the places by which its trials were promoted, as each result promotes one trial
at most: itself, or the best of those that it makes room for.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any


def places_of(seed: int, count: int) -> list[int]:
    """Return which configuration has each place of the first rung."""

    def drawn(configuration: int) -> bytes:
        return hashlib.sha256(f"sweep/{seed}/place/{configuration}".encode()).digest()

    return sorted(range(count), key=drawn)


def first_places(places: int, reduction: float) -> int:
    """Return how many places have to be known before one of their trials may be promoted."""
    return min(places, math.ceil(reduction))


def promotions_max(places: int, reduction: float) -> int:
    """Return how many trials of a rung may be promoted at most: the places of the next rung."""
    return places - first_places(places, reduction) + 1


@dataclass
class Rung:
    """What is known of a rung up to a place.

    `entries` are configurations with their means, None without a score, by place; `promoted`
    are places with the configurations that were promoted by them. `places` are those of the
    entries; fewer where a version wrote some of them that did not say.
    """

    reduction: float
    more_is_better: bool
    place: int = -1
    entries: list[tuple[int, float | None]] = field(default_factory=list)
    promoted: list[tuple[int, int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def add(self, place: int, configuration: int, mean: float | None) -> None:
        """Take in the result of a place, and promote whom it makes one of the best."""
        self.place = place
        self.entries.append((configuration, mean))
        self.places.append(place)
        self._promote(int(len(self.entries) / self.reduction))

    def close(self, place: int) -> None:
        """There are no more places. One goes on, so that some trial is trained to its end."""
        self.place = place
        if not self.promoted:
            self._promote(1)

    def promoted_by(self, place: int) -> int | None:
        """Return whom a place has promoted; None: nobody."""
        return dict(self.promoted).get(place)

    def place_of(self, configuration: int) -> int | None:
        """Return the place that a configuration has in the rung; None where it is not known."""
        if len(self.places) != len(self.entries):
            return None
        known = zip(self.entries, self.places, strict=True)
        return next((place for (each, _), place in known if each == configuration), None)

    def _promote(self, count: int) -> None:
        """Promote the best of so many that was not promoted; equal ones by their numbers."""
        before = {configuration for _, configuration in self.promoted}
        scored = [
            (-mean if self.more_is_better else mean, configuration)
            for configuration, mean in self.entries
            if mean is not None
        ]
        for _, configuration in sorted(scored)[:count]:
            if configuration not in before:
                self.promoted.append((self.place, configuration))
                return

    def to_json(self) -> dict[str, Any]:
        """Return what the next place has to know."""
        return {
            "place": self.place,
            "entries": self.entries,
            "promoted": self.promoted,
            "places": self.places,
        }

    def take(self, document: dict[str, Any]) -> None:
        """Go on where `to_json` was."""
        self.place = document["place"]
        self.entries = [tuple(each) for each in document["entries"]]
        self.promoted = [tuple(each) for each in document["promoted"]]
        self.places = list(document.get("places", ()))
