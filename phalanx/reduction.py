"""The canonical reduction: one fixed binary tree over shard ids.

Theory of operation. A job of `width` shards is reduced by the recursion

    T(lo, 2h) = T(lo, h) + T(lo + h, h)

over aligned nodes: a node covers `span` shards from `first` on, `span` is a power of two and
`first` a multiple of it. A child without any shard (past the right edge, or left out because its
leaf was bad) passes its sibling through unchanged; nothing is ever added to zero, since that
would turn -0.0 into 0.0. The grouping depends on shard ids only, so the sum has the same bits
whatever the arrival order and whoever computed which node.

Filling. A value fills its node; two filled children fill the parent; a filled node ignores later
values and frees its descendants. Copies of the same work are bit-equal, so it never matters which
one arrived first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument

Array = NDArray[Any]


@dataclass(frozen=True, order=True)
class Node:
    """An aligned sub-tree: the shards [first, first + span)."""

    first: int
    span: int

    def __post_init__(self) -> None:
        if self.span < 1 or self.span & (self.span - 1) or self.first < 0 or self.first % self.span:
            raise InvalidArgument(
                f"[{self.first}, {self.first + self.span}) is no node: the span must be a power of "
                "two and the first shard a multiple of it"
            )

    @property
    def is_leaf(self) -> bool:
        """Whether the node is a single shard."""
        return self.span == 1

    @property
    def left(self) -> Node:
        """The child with the lower half of the shards."""
        return Node(self.first, self.span // 2)

    @property
    def right(self) -> Node:
        """The child with the upper half of the shards."""
        half = self.span // 2
        return Node(self.first + half, half)

    @property
    def parent(self) -> Node:
        """The node of twice the span that this one is a child of."""
        span = self.span * 2
        return Node(self.first - self.first % span, span)


def root(width: int) -> Node:
    """Return the smallest node that covers `width` shards (1 or more)."""
    if width < 1:
        raise InvalidArgument(f"a tree needs at least 1 shard, not {width}")
    return Node(0, 1 << (width - 1).bit_length())


def cover(first: int, stop: int, width: int) -> list[Node]:
    """Return the fewest aligned nodes that make up the shards [first, stop) of a tree, in order.

    Where `stop` is the right edge (`width`) the last node may reach past it.
    """
    if not 0 <= first <= stop <= width:
        raise InvalidArgument(f"shards [{first}, {stop}) do not lie within [0, {width})")
    top = root(width)
    limit = top.span if stop == width else stop
    nodes: list[Node] = []
    while first < stop:
        span = first & -first or top.span
        while first + span > limit:
            span //= 2
        nodes.append(Node(first, span))
        first += span
    return nodes


def children_present(node: Node, width: int) -> tuple[Node, ...]:
    """Return the children of `node` that hold a shard of a tree over `width` shards."""
    return (node.left,) if node.right.first >= width else (node.left, node.right)


def full_mask(node: Node, width: int) -> int:
    """Return the mask of a node with all its shards present: bit i is shard `first + i`."""
    return (1 << max(0, min(node.span, width - node.first))) - 1


@dataclass
class _Filled:
    value: Array | None
    mask: int
    #: Whether the array is the reducer's own and may be written to.
    owned: bool


class TreeReducer:
    """Reduces one vector piece over `width` shards; see the module's theory of operation.

    Values are arrays of one shape and dtype. They are never written to and may be read-only views;
    they are held until their sum is formed.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._root = root(width)
        self._filled: dict[Node, _Filled] = {}

    @property
    def complete(self) -> bool:
        """Whether the whole tree is filled."""
        return self._root in self._filled

    @property
    def result(self) -> tuple[Array | None, int]:
        """The sum, None where no shard was present, and the mask of the shards present.

        Only once complete. The array may be the caller's own input where only one was present.
        """
        filled = self._filled[self._root]
        return filled.value, filled.mask

    def fill(self, node: Node, value: Array | None, mask: int) -> bool:
        """Fill `node`; return False where it, or a node above it, was filled before.

        Args:
            node: which sub-tree the value is the sum of.
            value: the sum over the present shards; None where none is present.
            mask: bit i tells that shard `node.first + i` is present.

        Raises:
            InvalidArgument: the node lies outside the tree, or mask and value do not fit it.
        """
        self._check(node, value, mask)
        if self._is_covered(node):
            return False
        self._free_below(node)
        self._put(node, _Filled(value, mask, owned=False))
        return True

    def _check(self, node: Node, value: Array | None, mask: int) -> None:
        if node.first >= self._width or node.span > self._root.span:
            raise InvalidArgument(f"{node} lies outside a tree over {self._width} shards")
        if mask < 0 or mask & ~full_mask(node, self._width):
            raise InvalidArgument(f"the shard mask {mask:#x} names shards outside {node}")
        if (value is None) != (mask == 0):
            raise InvalidArgument(f"{node} must have a value exactly if a shard is present")

    def _is_covered(self, node: Node) -> bool:
        while node != self._root:
            if node in self._filled:
                return True
            node = node.parent
        return node in self._filled

    def _free_below(self, node: Node) -> None:
        if node.is_leaf:
            return
        stop = node.first + node.span
        for other in [o for o in self._filled if node.first <= o.first < stop]:
            del self._filled[other]

    def _put(self, node: Node, filled: _Filled) -> None:
        while node != self._root:
            parent = node.parent
            present = children_present(parent, self._width)
            if len(present) == 2:
                sibling = present[1] if node == present[0] else present[0]
                other = self._filled.pop(sibling, None)
                if other is None:
                    break
                left, right = (filled, other) if node == present[0] else (other, filled)
                filled = _add(left, right, parent.span // 2)
            node = parent
        self._filled[node] = filled


def _add(left: _Filled, right: _Filled, half: int) -> _Filled:
    """Return left + right, in this order, into an array that the reducer owns."""
    mask = left.mask | right.mask << half
    if left.value is None or right.value is None:
        kept = right if left.value is None else left
        return _Filled(kept.value, mask, kept.owned)
    if left.owned:
        out = left.value
    elif right.owned:
        out = right.value
    else:
        out = np.empty_like(left.value)
    np.add(left.value, right.value, out=out)
    return _Filled(out, mask, owned=True)


def reduce_leaves(payloads: Mapping[int, Array | None], width: int) -> Array | None:
    """Reduce whole leaves in one call: the reference for everything that does it piecewise.

    Args:
        payloads: shard → its sum; a shard that is missing or None is absent.
        width: number of shards of the tree.
    """

    def reduce(node: Node) -> Array | None:
        if node.first >= width:
            return None
        if node.is_leaf:
            return payloads.get(node.first)
        left, right = reduce(node.left), reduce(node.right)
        if left is None or right is None:
            return right if left is None else left
        total: Array = left + right
        return total

    return reduce(root(width))
