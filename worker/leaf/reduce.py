"""Runs all leaves of a part and reduces them in canonical order, inside one process.

The sum of a node is built in its left child's buffer, so a part of S shards needs the payload
buffer and log2(S) more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.reduction import Node

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Sums:
    """Scalars of a leaf or node; bit i of `mask`: shard `first + i` is present."""

    count: int
    loss: float
    mask: int


LeafFunction = Callable[[int, Array], Sums]
"""(shard, out) → scalars; writes the payload to all of `out` unless the mask is 0."""


class Scratch:
    """Buffers for right children, one per depth, kept between calls."""

    def __init__(self, element_count: int, dtype: np.dtype[Any]) -> None:
        self._shape = element_count
        self._dtype = dtype
        self._buffers: list[Array] = []

    def at(self, depth: int) -> Array:
        """The buffer of one depth."""
        while len(self._buffers) <= depth:
            self._buffers.append(page_aligned(self._shape, self._dtype))
        return self._buffers[depth]


def reduce_node(
    node: Node, width: int, leaf: LeafFunction, out: Array, scratch: Scratch, depth: int = 0
) -> Sums:
    """Run the leaves below `node` in shard order and leave their sum in `out`.

    Absent shards pass through: with a mask of 0 `out` holds nothing of use.
    """
    if node.is_leaf:
        return leaf(node.first, out)
    left = reduce_node(node.left, width, leaf, out, scratch, depth)
    if node.right.first >= width:
        return left
    half = node.span // 2
    if not left.mask:
        right = reduce_node(node.right, width, leaf, out, scratch, depth)
        return Sums(right.count, right.loss, right.mask << half)
    other = scratch.at(depth)
    right = reduce_node(node.right, width, leaf, other, scratch, depth + 1)
    if not right.mask:
        return left
    np.add(out, other, out=out)
    return Sums(left.count + right.count, left.loss + right.loss, left.mask | right.mask << half)


def page_aligned(element_count: int, dtype: np.dtype[Any]) -> Array:
    """An array that starts on a page, as the shared buffers do: kernels see one alignment only."""
    size_bytes = element_count * dtype.itemsize
    raw = np.empty(size_bytes + 4096, np.uint8)
    offset = -raw.ctypes.data % 4096
    return raw[offset : offset + size_bytes].view(dtype)
