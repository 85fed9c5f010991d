"""Nodes of the reduction tree as far as placement needs them: aligned runs of shards.

The arithmetic itself lives in `phalanx.reduction`; control loads no numeric library.
"""

from __future__ import annotations

from collections.abc import Iterable

from phalanx.v1.training_pb2 import TreeNode


def cover(first: int, stop: int, width: int) -> list[tuple[int, int]]:
    """Return the fewest aligned nodes (first, span) that make up shards [first, stop).

    Where `stop` is the right edge (`width`) the last node may reach past it.
    """
    top = 1
    while top < width:
        top *= 2
    limit = top if stop == width else stop
    nodes = []
    while first < stop:
        span = first & -first or top
        while first + span > limit:
            span //= 2
        nodes.append((first, span))
        first += span
    return nodes


def runs(shards: Iterable[int]) -> list[tuple[int, int]]:
    """Return the contiguous runs [first, stop) of a set of shards, in order."""
    found: list[tuple[int, int]] = []
    for shard in sorted(shards):
        if found and found[-1][1] == shard:
            found[-1] = (found[-1][0], shard + 1)
        else:
            found.append((shard, shard + 1))
    return found


def nodes_of(shards: Iterable[int], width: int) -> list[TreeNode]:
    """Return the fewest nodes that make up a set of shards of a tree of this width."""
    return [
        TreeNode(first=first, span=span)
        for run_first, run_stop in runs(shards)
        for first, span in cover(run_first, run_stop, width)
    ]


def shards_of(nodes: Iterable[TreeNode], width: int) -> set[int]:
    """Return the shards below some nodes; what is no aligned node of the tree is left out."""
    found: set[int] = set()
    for node in nodes:
        aligned = node.span > 0 and node.span & (node.span - 1) == 0 and node.first >= 0
        if aligned and node.first % node.span == 0 and node.first < width:
            found.update(range(node.first, min(node.first + node.span, width)))
    return found


def node_count(shards: Iterable[int], width: int) -> int:
    """Return how many vectors cross the wire for a set of shards."""
    return sum(len(cover(first, stop, width)) for first, stop in runs(shards))
