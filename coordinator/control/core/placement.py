"""Which worker hosts which shards: pure functions, each with the reason of its result.

A worker gets few contiguous runs, so that few vectors cross the wire; runs are proportional to
slots, or to slots times speed where workers are known to differ: `slots` may be either. Placement
is stable: a death moves only the shards of the dead, a join as few as balance needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.control.core.tree import cover, node_count, runs
from phalanx.texts import number_of

Owners = dict[int, str]
"""Worker by shard; a shard without an owner is missing."""

UNEVEN_ACCEPTED = 1.1
"""A placement this much slower is taken if it sends fewer vectors."""


@dataclass(frozen=True)
class Placement:
    """A placement of one tree and why it is so; `moved` are the shards with a new owner."""

    owners: Owners
    moved: frozenset[int]
    reason: str


def loads(owners: Owners, slots: Mapping[str, float]) -> dict[str, int]:
    """Return the number of shards of each worker in `slots`."""
    counted = dict.fromkeys(slots, 0)
    for worker in owners.values():
        if worker in counted:
            counted[worker] += 1
    return counted


def place_first(width: int, slots: Mapping[str, float], unit: int = 1) -> Placement:
    """Place all shards of a tree on workers that hold nothing of it yet; whole nodes of `unit`."""
    if not slots or width == 0:
        return Placement({}, frozenset(), "no worker to place shards on")
    candidates = _runs(width, slots, unit)
    grain = min(_fitting(candidates, slots), key=lambda key: _cost(candidates[key], width, slots))
    owners = candidates[grain]
    vectors, _ = _cost(owners, width, slots)
    reason = (
        f"{number_of(width, 'shard')} on {number_of(len(slots), 'worker')} by slots, "
        f"in runs of {grain}: {number_of(vectors, 'vector')}"
    )
    return Placement(owners, frozenset(owners), reason)


def place_members(width: int, slots: Mapping[str, float], unit: int = 1) -> Owners:
    """Place all shards as `place_first` does, on as many workers as can have some at no cost.

    For workers that hold everything anyway: one that gets no shard would be a spare that has yet
    to be sent all of it.
    """
    if not slots or width == 0:
        return {}
    candidates = {**_runs(width, slots, unit), 0: _one_node_each(width, slots, unit)}

    def worth(key: int) -> tuple[int, tuple[int, float]]:
        owners = candidates[key]
        return -len(set(owners.values())), _cost(owners, width, slots)

    return candidates[min(_fitting(candidates, slots), key=worth)]


def place_orphans(
    owners: Owners,
    orphans: Iterable[int],
    width: int,
    takers: Mapping[str, float],
    preferred: Mapping[int, str] | None = None,
    avoided: Mapping[int, frozenset[str]] | None = None,
    unit: int = 1,
) -> Placement:
    """Give `orphans` to workers in `takers` (slots by worker); all other shards stay.

    `preferred` names who still holds a shard; `avoided` those that failed at it, who get it only if
    there is nobody else. Whole nodes go to the worker with the least load, a neighbour if equal.
    """
    result, wanted = dict(owners), sorted(orphans)
    if not wanted or not takers:
        return Placement(result, frozenset(), "nothing to place")
    counted, single = loads(result, takers), []
    for shard in wanted:
        holder = (preferred or {}).get(shard, "")
        if holder in takers:
            result[shard] = holder
            counted[holder] += 1
        else:
            single.append(shard)
    largest = max(unit, len(single) // len(takers))
    for first, span in pieces(single, width, largest):
        piece = list(range(first, min(first + span, width)))
        chosen = _least_loaded(piece, result, counted, takers, avoided or {})
        result.update(dict.fromkeys(piece, chosen))
        counted[chosen] += len(piece)
    names = ", ".join(sorted({result[shard] for shard in wanted}))
    reason = f"{number_of(len(wanted), 'shard')} without a host, to {names}, who had the least load"
    return Placement(result, frozenset(wanted), reason)


def rebalance(
    owners: Owners,
    width: int,
    slots: Mapping[str, float],
    takers: Collection[str],
    unit: int = 1,
) -> Placement:
    """Move whole nodes from the slowest worker to the fastest of `takers` while that helps.

    Nothing moves unless the slowest gets clearly faster: each move cuts runs into pieces.
    """
    result, moved = dict(owners), set[int]()
    counted, total = loads(result, slots), sum(slots.values())
    share = {worker: int(-(-width * count // total)) for worker, count in slots.items()}
    for _ in range(width if takers else 0):
        # A slow worker with no more than its share is as it should be; another may have too much.
        donors = [worker for worker in slots if counted[worker] - share[worker] >= unit]
        if not donors:
            break
        donor = max(donors, key=lambda worker: (counted[worker] / slots[worker], worker))
        taker = min(takers, key=lambda worker: (counted[worker] / slots[worker], worker))
        # Nobody gives below its share or takes above it, so that no shard moves twice.
        count = min(counted[donor] - share[donor], share[taker] - counted[taker])
        if count < unit:
            break
        node = _largest_node(result, width, donor, taker, count)
        result.update(dict.fromkeys(node, taker))
        moved.update(node)
        counted[donor] -= len(node)
        counted[taker] += len(node)
    involved = {result[shard] for shard in moved} | {owners[shard] for shard in moved}
    touched = {worker: slots[worker] for worker in slots if worker in involved}
    if not moved or _slowest(result, touched) * UNEVEN_ACCEPTED > _slowest(owners, touched):
        return Placement(dict(owners), frozenset(), "already balanced")
    reason = (
        f"{number_of(len(moved), 'shard')} moved: no worker has much more per slot than another"
    )
    return Placement(result, frozenset(moved), reason)


def _contiguous(width: int, slots: Mapping[str, float], grain: int) -> Owners:
    """Cut [0, width) into one run per worker, proportional to slots, at multiples of the grain."""
    total, passed, first, owners = sum(slots.values()), 0.0, 0, Owners()
    last = list(slots)[-1]
    for worker, count in slots.items():
        passed += count
        stop = min(width, round(width * passed / total / grain) * grain)
        if worker == last:
            stop = width
        owners.update(dict.fromkeys(range(first, stop), worker))
        first = max(first, stop)
    return owners


def _runs(width: int, slots: Mapping[str, float], unit: int) -> dict[int, Owners]:
    """Placements in one run per worker, by the grain at multiples of which runs begin."""
    candidates = {}
    grain = unit
    while grain <= max(width, unit):
        candidates[grain] = _contiguous(width, slots, grain)
        grain *= 2
    return candidates


def _one_node_each(width: int, slots: Mapping[str, float], unit: int) -> Owners:
    """One node for each worker, the largest for those with most slots; the last may get none."""
    nodes = cover(0, width, width)
    while len(nodes) < len(slots):
        first, span = max(nodes, key=lambda node: (min(node[1], width - node[0]), node[0]))
        if span <= unit:
            break
        nodes.remove((first, span))
        half = span // 2
        nodes += [(start, half) for start in (first, first + half) if start < width]
    nodes.sort(key=lambda node: (-min(node[1], width - node[0]), node[0]))
    workers = sorted(slots, key=lambda worker: -slots[worker])
    return {
        shard: worker
        for worker, (first, span) in zip(workers, nodes, strict=False)
        for shard in range(first, min(first + span, width))
    }


def _fitting(candidates: Mapping[int, Owners], slots: Mapping[str, float]) -> list[int]:
    """Keys of the placements that are not much slower than the fastest."""
    slowest = {key: _slowest(owners, slots) for key, owners in candidates.items()}
    limit = min(slowest.values()) * UNEVEN_ACCEPTED
    return [key for key in candidates if slowest[key] <= limit]


def _cost(owners: Owners, width: int, slots: Mapping[str, float]) -> tuple[int, float]:
    """Vectors that cross the wire, and how long the slowest takes."""
    vectors = sum(node_count(shards, width) for shards in _by_worker(owners).values())
    return vectors, _slowest(owners, slots)


def _slowest(owners: Owners, slots: Mapping[str, float]) -> float:
    return max(count / slots[worker] for worker, count in loads(owners, slots).items())


def _by_worker(owners: Owners) -> dict[str, list[int]]:
    held: dict[str, list[int]] = {}
    for shard, worker in owners.items():
        held.setdefault(worker, []).append(shard)
    return held


def _shards(owners: Owners, worker: str) -> list[int]:
    return [shard for shard, owner in owners.items() if owner == worker]


def pieces(shards: Sequence[int], width: int, largest: int) -> list[tuple[int, int]]:
    """Nodes that make up the shards, split until none is larger than `largest` shards."""
    pieces = []
    stack = [
        node
        for first, stop in reversed(runs(shards))
        for node in reversed(cover(first, stop, width))
    ]
    while stack:
        first, span = stack.pop()
        if min(span, width - first) > largest and span > 1:
            half = span // 2
            if first + half < width:
                stack.append((first + half, half))
            stack.append((first, half))
        else:
            pieces.append((first, span))
    return pieces


def _least_loaded(
    shards: Sequence[int],
    owners: Owners,
    counted: Mapping[str, float],
    slots: Mapping[str, float],
    avoided: Mapping[int, frozenset[str]],
) -> str:
    failed = frozenset[str]().union(*(avoided.get(shard, frozenset()) for shard in shards))
    candidates = [worker for worker in slots if worker not in failed] or list(slots)
    neighbours = {owners.get(shards[0] - 1), owners.get(shards[-1] + 1)}

    def cost(worker: str) -> tuple[float, bool, str]:
        load = (counted[worker] + len(shards)) / slots[worker]
        return load, worker not in neighbours, worker

    return min(candidates, key=cost)


def _largest_node(owners: Owners, width: int, donor: str, taker: str, largest: int) -> list[int]:
    """The donor's largest node of at most `largest` shards, beside the taker's if possible."""
    found = pieces(_shards(owners, donor), width, largest)
    neighbours = {shard for shard, worker in owners.items() if worker == taker}

    def worth(piece: tuple[int, int]) -> tuple[int, bool, int]:
        first, span = piece
        size = min(first + span, width) - first
        adjacent = first - 1 in neighbours or first + size in neighbours
        return size, adjacent, first

    first, span = max(found, key=worth)
    return list(range(first, min(first + span, width)))
