"""Which states of which nodes are in which buffers.

A node's state at version t + 1 is made together with its contribution to the step at t, into
buffers of its own: until t + 1 is whole here, the one at t may be needed again.
"""

from __future__ import annotations

from phalanx.reduction import Node
from worker.core.buffers import BufferPool

Buffers = tuple[int, ...]

ZERO: Buffers = ()
"""The state of every node at version 0: nothing to read."""


class States:
    """States by node and version, of one job in one term."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._held: dict[Node, dict[int, Buffers]] = {}

    def find(self, node: Node, version: int) -> Buffers | None:
        """The buffers of a state; None: it is not here."""
        if version == 0:
            return ZERO
        return self._held.get(node, {}).get(version)

    def newest(self, node: Node, version: int) -> int:
        """The newest version not above `version` whose state is here; 0 where none is."""
        return max((each for each in self._held.get(node, ()) if each <= version), default=0)

    def put(self, node: Node, version: int, buffers: Buffers) -> Buffers:
        """Keep a state; return the buffers that it is in, which are others if it was here."""
        held = self._held.setdefault(node, {})
        if version in held:
            self._give_back(buffers)
        else:
            held[version] = buffers
        return held[version]

    def forget_before(self, version: int, base: int) -> None:
        """Forget what is of no use for `version` or later: no state is made again from before
        `base`."""
        for node, held in list(self._held.items()):
            least = max(base, self.newest(node, version))
            for old in [each for each in held if each < least]:
                self._give_back(held.pop(old))
            if not held:
                del self._held[node]

    def clear(self) -> None:
        """Forget everything."""
        for held in self._held.values():
            for buffers in held.values():
                self._give_back(buffers)
        self._held.clear()

    def _give_back(self, buffers: Buffers) -> None:
        for buffer in buffers:
            self._pool.give_back(buffer)
