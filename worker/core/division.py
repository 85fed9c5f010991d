"""How the nodes of a worker are split over its slots.

A worker owes whole nodes of the tree. Its slots compute aligned pieces of them, so that a slot
reduces as much as it can by itself and the session adds as little as possible, and no slot has
more shards than an equal share.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from functools import lru_cache

from phalanx.reduction import Node, children_present


def shard_count(node: Node, width: int) -> int:
    """Shards below `node` in a tree over `width` shards; its right edge may reach past the last."""
    return max(0, min(node.first + node.span, width) - node.first)


def contains(outer: Node, inner: Node) -> bool:
    """Whether `inner` is `outer` or below it."""
    return outer.first <= inner.first and inner.first + inner.span <= outer.first + outer.span


def shards_of(nodes: Iterable[Node], width: int) -> list[int]:
    """Return the shards below disjoint `nodes` of a tree over `width` shards, in order."""
    return sorted(
        shard for node in nodes for shard in range(node.first, min(node.first + node.span, width))
    )


def units_around(nodes: Iterable[Node], unit: int, width: int) -> list[Node]:
    """Return the nodes of `unit` shards that hold a shard of `nodes`, in order."""
    firsts = {
        first
        for node in nodes
        for first in range(node.first - node.first % unit, node.first + node.span, unit)
        if first < width
    }
    return [Node(first, unit) for first in sorted(firsts)]


def divide(
    nodes: Iterable[Node], slots: int, width: int, start: int = 0, grain: int = 1
) -> list[list[Node]]:
    """Split disjoint `nodes` into aligned pieces: one list per slot, in shard order.

    No slot gets more than ceil(shards / slots) shards, but for pieces of `grain` shards, which are
    never split. Large pieces are kept whole where that bound allows it. `start` rotates the slots,
    so that a retry meets another process.
    """
    return [list(owned) for owned in _divide(tuple(nodes), slots, width, start, grain)]


@lru_cache(maxsize=64)
def _divide(
    nodes: tuple[Node, ...], slots: int, width: int, start: int, grain: int
) -> tuple[tuple[Node, ...], ...]:
    # The same division comes back every step.
    heap = [(-shard_count(node, width), node) for node in nodes]
    total = -sum(size for size, _ in heap)
    share = -(-total // slots)
    heapq.heapify(heap)
    pieces: list[list[Node]] = [[] for _ in range(slots)]
    loads = [(0, slot) for slot in range(slots)]
    while heap:
        size, node = heapq.heappop(heap)
        load, slot = loads[0]
        if load - size > share and node.span > grain:
            for child in children_present(node, width):
                heapq.heappush(heap, (-shard_count(child, width), child))
            continue
        pieces[(slot + start) % slots].append(node)
        heapq.heapreplace(loads, (load - size, slot))
    return tuple(tuple(sorted(piece)) for piece in pieces)
