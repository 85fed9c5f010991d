"""The state of a node while a part of it is computed: read at one version, written for the next.

What is read stays as it is, so that a part may be computed once more from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.reduction import Node
from phalanx.training.states import left_out_vectors
from phalanx.v1.training_pb2 import JobPlan
from worker.memory import Arena

Array = NDArray[Any]


class NodeState:
    """State of one node; empty where nodes have none.

    `buffers` are those to read, -1 for zero, then as many to write to; `names` are those of what
    each shard's optimizer remembers. See `phalanx.training.states.vectors_of` for the order.
    """

    def __init__(
        self,
        arena: Arena,
        plan: JobPlan,
        node: Node,
        buffers: Sequence[int],
        names: Sequence[str],
    ) -> None:
        half = len(buffers) // 2
        self._read = [arena.array(each) if each >= 0 else None for each in buffers[:half]]
        self._written = [arena.array(each) for each in buffers[half:]]
        self._left_out = left_out_vectors(plan)
        self._first = node.first
        self._names = names

    def inner(self, shard: int) -> dict[str, Array]:
        """What a shard's own optimizer remembers; a leaf updates it in place."""
        first = self._left_out + (shard - self._first) * len(self._names)
        indexes = range(first, first + len(self._names))
        return {name: self._carried(at) for name, at in zip(self._names, indexes, strict=True)}

    def add_left_out(self, values: Array, *, present: bool) -> Array | None:
        """Add what the node has left out so far to its contribution.

        Return where to write what this one leaves out; None where that is not made up for. Of a
        node without any shard `present` all stays as it is.
        """
        if not self._written or not self._left_out:
            return None
        if not present:
            return self._carried(0)
        before = self._read[0]
        if before is not None:
            np.add(values, before, out=values)
        return self._written[0]

    def _carried(self, index: int) -> Array:
        """A vector for the next version, as it is at this one."""
        before, after = self._read[index], self._written[index]
        after[:] = 0 if before is None else before
        return after
