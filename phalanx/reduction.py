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

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.texts import number_of

Array = NDArray[Any]


class _Shards(NamedTuple):
    first: int
    span: int


class Node(_Shards):
    """An aligned sub-tree: the shards [first, first + span).

    A tuple, since nodes are made, hashed and compared many times in every step.
    """

    __slots__ = ()

    def __new__(cls, first: int, span: int) -> Self:
        """Make the node; raises `InvalidArgument` where there is none."""
        if span < 1 or span & (span - 1) or first < 0 or first % span:
            raise InvalidArgument(
                f"[{first}, {first + span}) is no node: the span must be a power of "
                "two and the first shard a multiple of it"
            )
        return tuple.__new__(cls, (first, span))

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
    return Node(0, _root_span(width))


def _root_span(width: int) -> int:
    if width < 1:
        raise InvalidArgument(f"a tree needs at least 1 shard, not {width}")
    return 1 << (width - 1).bit_length()


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


def shards_mask(nodes: Iterable[Node], width: int) -> int:
    """Return the shards below any of the nodes of a tree: bit i is shard i."""
    mask = 0
    for node in nodes:
        mask |= (1 << min(node.first + node.span, width)) - (1 << min(node.first, width))
    return mask


def shards_of_mask(mask: int) -> tuple[int, ...]:
    """Return the shards of a mask (bit i is shard i), in order."""
    return tuple(shard for shard in range(mask.bit_length()) if mask >> shard & 1)


def nodes_of_mask(mask: int, width: int) -> list[Node]:
    """Return the fewest aligned nodes that make up these shards (bit i is shard i), in order."""
    nodes: list[Node] = []
    first = 0
    while mask >> first:
        first += ((mask >> first) & -(mask >> first)).bit_length() - 1
        run = mask >> first
        stop = first + (~run & (run + 1)).bit_length() - 1
        nodes += cover(first, stop, width)
        first = stop
    return nodes


def children_present(node: Node, width: int) -> tuple[Node, ...]:
    """Return the children of `node` that hold a shard of a tree over `width` shards."""
    return (node.left,) if node.right.first >= width else (node.left, node.right)


def full_mask(node: Node, width: int) -> int:
    """Return the mask of a node with all its shards present: bit i is shard `first + i`."""
    return (1 << max(0, min(node.span, width - node.first))) - 1


class TreeReducer:
    """Reduces one vector piece over `width` shards; see the module's theory of operation.

    Values are arrays of one shape and dtype, or plain numbers. They are never written to and may
    be read-only views; they are held until their sum is formed.
    """

    # Nodes are numbered as in a binary heap: the root is 1, the children of i are 2 i and 2 i + 1.
    # A filled node maps to its value, its mask, and whether the value is an array of our own.

    def __init__(self, width: int) -> None:
        self._width = width
        self._top = _root_span(width)
        self._filled: dict[int, tuple[Any, int, bool]] = {}
        self._form: tuple[Any, ...] | None = None
        self._covered = 0

    @property
    def complete(self) -> bool:
        """Whether the whole tree is filled."""
        return 1 in self._filled

    @property
    def result(self) -> tuple[Any, int]:
        """The sum, None where no shard was present, and the mask of the shards present.

        Only once complete. The array may be the caller's own input where only one was present.
        """
        value, mask, _ = self._filled[1]
        return value, mask

    @property
    def filled_shards(self) -> int:
        """The shards below filled nodes: bit i is shard i, whether present or left out."""
        return self._covered

    def fill(self, node: Node, value: Any, mask: int) -> bool:
        """Fill `node`; return False where it, or a node above it, was filled before.

        Args:
            node: which sub-tree the value is the sum of.
            value: the sum over the present shards; None where none is present.
            mask: bit i tells that shard `node.first + i` is present.

        Raises:
            InvalidArgument: the node lies outside the tree, or mask or value do not fit it.
        """
        self._check(node, value, mask)
        filled = self._filled
        index = (self._top + node.first) // node.span
        above = index
        while above:
            if above in filled:
                return False
            above >>= 1
        if node.span > 1 and filled:
            self._free_below(index)
        self._put(index, node, (value, mask, False))
        self._covered |= shards_mask((node,), self._width)
        return True

    def _check(self, node: Node, value: Any, mask: int) -> None:
        if node.first >= self._width or node.span > self._top:
            raise InvalidArgument(
                f"{node} lies outside a tree over {number_of(self._width, 'shard')}"
            )
        if mask < 0 or mask >> min(node.span, self._width - node.first):
            raise InvalidArgument(f"the shard mask {mask:#x} names shards outside {node}")
        if (value is None) != (mask == 0):
            raise InvalidArgument(f"{node} must have a value exactly if a shard is present")
        if isinstance(value, np.ndarray):
            form = (value.dtype, value.shape)
            if self._form is None:
                self._form = form
            elif form != self._form:
                raise InvalidArgument(
                    f"{node} has {_described(form)}, the nodes before it {_described(self._form)}"
                )

    def _free_below(self, index: int) -> None:
        depth = index.bit_length()
        for other in list(self._filled):
            levels = other.bit_length() - depth
            if levels > 0 and other >> levels == index:
                del self._filled[other]

    def _put(self, index: int, node: Node, entry: tuple[Any, int, bool]) -> None:
        filled, width = self._filled, self._width
        first, span = node.first, node.span
        while index > 1:
            if index & 1:
                other = filled.pop(index - 1, None)
                if other is None:
                    break
                entry = _sum(other, entry, span)
                first -= span
            elif first + span < width:
                other = filled.pop(index + 1, None)
                if other is None:
                    break
                entry = _sum(entry, other, span)
            index >>= 1
            span *= 2
        filled[index] = entry


def _sum(
    left: tuple[Any, int, bool], right: tuple[Any, int, bool], half: int
) -> tuple[Any, int, bool]:
    """Return left + right, in this order, in an array of our own where there is one."""
    mask = left[1] | right[1] << half
    if left[0] is None:
        return right[0], mask, right[2]
    if right[0] is None:
        return left[0], mask, left[2]
    if left[2]:
        np.add(left[0], right[0], out=left[0])
        return left[0], mask, True
    if right[2]:
        np.add(left[0], right[0], out=right[0])
        return right[0], mask, True
    total = left[0] + right[0]
    return total, mask, isinstance(total, np.ndarray)


def _described(form: tuple[Any, ...]) -> str:
    return f"{form[0]} of shape {form[1]}"


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


def all_finite(vector: Array) -> bool:
    """Return whether no element of a vector is NaN or infinite; fast, and without memory.

    The sum of squares tells it in one pass. It may overflow where all elements are finite, so only
    then they are looked at one by one.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.dot(vector, vector))
    return isfinite(squares) or bool(np.isfinite(vector).all())
