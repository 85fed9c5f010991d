"""Placement by speed: the slowest worker's time is made as small as moving shards can make it.

Times are in leaves of a usual worker. A worker needs the time of its leaves, as many rounds of them
as its slots take, and a time for each vector that it sends: whole nodes are one vector, a node that
is split is several. A shard that moves has its data read once more, which is spread over the steps
in which the move pays.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from coordinator.control.core.placement import Owners, Placement, pieces
from coordinator.control.core.tree import node_count
from phalanx.texts import number_of

GAIN_LEAST = 0.15
"""By how much the slowest worker's time must fall for anything to move."""

MOVES_MAX = 64
"""Nodes that move at once; what is left moves the next time."""

TAKERS_TRIED = 4
"""Former hosts of its shards that each giver looks at."""


@dataclass(frozen=True)
class Pace:
    """What the work of each worker costs. `factors` are speeds: 1 is usual, 2 is twice as fast."""

    slots: Mapping[str, int]
    factors: Mapping[str, float]
    vector: float = 0.0
    """Of one more vector on the wire."""
    move: float = 0.0
    """Of one shard that moves to a worker that never had it, per step."""

    def time(self, worker: str, shards: int, vectors: int) -> float:
        """Return how long a worker takes for a step."""
        rounds = -(-shards // self.slots[worker])
        return rounds / self.factors[worker] + self.vector * vectors

    def least(self, width: int) -> float:
        """Return a time for a step that no placement beats."""
        return width / sum(self.slots[each] * self.factors[each] for each in self.slots)


@dataclass(frozen=True)
class Level:
    """A placement, and the time of the slowest worker before and after."""

    placement: Placement
    before: float
    after: float


@dataclass
class _Tree:
    width: int
    unit: int
    unit_travels: bool
    """Vectors are units, whoever hosts them."""
    had: Mapping[int, Collection[str]] = field(default_factory=dict)

    def vectors(self, shards: list[int]) -> int:
        if self.unit_travels:
            return -(-len(shards) // self.unit)
        return node_count(shards, self.width)


def slowest(
    owners: Owners, width: int, pace: Pace, unit: int = 1, *, unit_travels: bool = False
) -> float:
    """Return the time of the slowest worker under a placement."""
    return _slowest(owners, _Tree(width, unit, unit_travels), pace)


def level(
    owners: Owners,
    width: int,
    pace: Pace,
    unit: int = 1,
    *,
    unit_travels: bool = False,
    had: Mapping[int, Collection[str]] | None = None,
    all_have_some: bool = False,
) -> Level:
    """Move whole nodes between the workers of `pace` if the slowest gets clearly faster.

    `had` names who hosted a shard before, and may still have its data. Every owner is in `pace`.
    With `all_have_some` every worker of `pace` has a shard, and keeps one however slow it is.
    """
    tree = _Tree(width, unit, unit_travels, had or {})
    before = _slowest(owners, tree, pace)
    best: tuple[float, int, Owners] = (before, 0, owners)
    grain = unit
    least = len(pace.slots) if all_have_some else 0
    while grain < max(2 * unit, width) and grain * least <= width:
        wanted = _counts(owners, width, grain, pace, grain if all_have_some else 0)
        for candidate in (_toward(owners, wanted, tree), _contiguous(owners, wanted, tree)):
            moved = [shard for shard in candidate if candidate[shard] != owners[shard]]
            far = sum(candidate[shard] not in tree.had.get(shard, ()) for shard in moved)
            cost = _slowest(candidate, tree, pace) + pace.move * far
            best = min(best, (cost, len(moved), candidate), key=lambda each: each[:2])
        grain *= 2
    after = _slowest(best[2], tree, pace)
    if best[0] > before * (1 - GAIN_LEAST):
        return Level(Placement(dict(owners), frozenset(), "no better placement"), before, before)
    moved_shards = frozenset(shard for shard in owners if best[2][shard] != owners[shard])
    reason = (
        f"{number_of(len(moved_shards), 'shard')} moved by measured speed: a step of the slowest "
        f"worker takes {after:.2f} leaves instead of {before:.2f}"
    )
    return Level(Placement(best[2], moved_shards, reason), before, after)


def _slowest(owners: Owners, tree: _Tree, pace: Pace) -> float:
    held = _held(owners)
    return max(
        (pace.time(worker, len(shards), tree.vectors(shards)) for worker, shards in held.items()),
        default=0.0,
    )


def _held(owners: Owners) -> dict[str, list[int]]:
    held: dict[str, list[int]] = {}
    for shard in sorted(owners):
        held.setdefault(owners[shard], []).append(shard)
    return held


def _counts(owners: Owners, width: int, grain: int, pace: Pace, least: int = 0) -> dict[str, int]:
    """Return how many shards each worker should have, `least` or more, in multiples of the grain:
    each grain goes to whoever is through with it first, and among equals to who has most of the
    shards now."""
    held = {worker: len(shards) for worker, shards in _held(owners).items()}
    counts = dict.fromkeys(pace.slots, least)

    def entry(worker: str) -> tuple[float, int, str]:
        there = counts[worker] + grain
        return pace.time(worker, there, 1), counts[worker] - held.get(worker, 0), worker

    heap = [entry(worker) for worker in counts]
    heapq.heapify(heap)
    left = width - least * len(counts)
    while left > 0:
        worker = heap[0][2]
        counts[worker] += min(grain, left)
        left -= grain
        heapq.heapreplace(heap, entry(worker))
    return counts


def _toward(owners: Owners, wanted: Mapping[str, int], tree: _Tree) -> Owners:
    """Move nodes from those with too many shards to those with too few; the rest stays."""
    result = dict(owners)
    held = _held(owners)
    over = {worker: len(held.get(worker, ())) - count for worker, count in wanted.items()}
    for _ in range(MOVES_MAX):
        donor = max(over, key=lambda worker: (over[worker], worker))
        if over[donor] < 1:
            break
        offers = [
            (*_node_for(taker, held, donor, min(over[donor], -over[taker]), tree), taker)
            for taker in _takers(held[donor], over, tree)
        ]
        _, node, taker = max(offers, key=lambda each: each[0])
        if not node:
            break
        result.update(dict.fromkeys(node, taker))
        held[donor] = sorted(set(held[donor]) - set(node))
        held[taker] = sorted([*held.get(taker, []), *node])
        over[donor] -= len(node)
        over[taker] += len(node)
    return result


def _takers(offered: list[int], over: Mapping[str, int], tree: _Tree) -> list[str]:
    """Who may take some: the one that lacks most, and some that had shards of them before."""
    first = min(over, key=lambda worker: (over[worker], worker))
    had = dict.fromkeys(worker for shard in offered for worker in tree.had.get(shard, ()))
    others = [worker for worker in had if worker != first and over.get(worker, 0) < 0]
    return [first, *others[:TAKERS_TRIED]]


def _node_for(
    taker: str, held: Mapping[str, list[int]], donor: str, largest: int, tree: _Tree
) -> tuple[tuple[float, ...], list[int]]:
    """A node of the donor's with its worth: best one that the taker had, or one beside its own."""
    beside = set(held.get(taker, ()))
    best: tuple[tuple[float, ...], list[int]] = ((0, 0, 0, 0), [])
    for first, span in pieces(held[donor], tree.width, max(largest, tree.unit)):
        node = list(range(first, min(first + span, tree.width)))
        if len(node) > largest:
            continue
        had = sum(taker in tree.had.get(shard, ()) for shard in node)
        adjacent = node[0] - 1 in beside or node[-1] + 1 in beside
        worth = (had, len(node), adjacent, first)
        best = max(best, (worth, node), key=lambda each: each[0])
    return best


def _contiguous(owners: Owners, wanted: Mapping[str, int], tree: _Tree) -> Owners:
    """One run of whole units for each worker, in the order in which their shards lie now."""
    middle = {worker: sum(shards) / len(shards) for worker, shards in _held(owners).items()}
    result, first = Owners(), 0
    for worker in sorted(wanted, key=lambda each: (middle.get(each, math.inf), each)):
        units = -(-(first + wanted[worker]) // tree.unit)
        stop = min(tree.width, units * tree.unit)
        result.update(dict.fromkeys(range(first, stop), worker))
        first = stop
    return result
