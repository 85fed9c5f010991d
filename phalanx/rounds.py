"""One round of one range: nodes fill trees, frame by frame, whatever order they arrive in.

A round reduces one named vector of `width` shards. The vector is cut into frames and each frame
has a tree of its own, so that a frame whose tree is complete can be used while others still
arrive. The scalars of a node (examples, loss, which shards are present) come with each of its
frames; the first frame of a node pins them and they enter the scalar tree once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Codec, decoded
from phalanx.errors import InvalidArgument
from phalanx.reducers import Steps
from phalanx.reduction import Node, TreeReducer
from phalanx.texts import number_of
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2


class Disagreement(Exception):
    """Two copies of the same work are not equal; the message says what and where."""


@dataclass(frozen=True)
class RoundSpec:
    """What one round reduces."""

    version: int
    number: int
    action: training_pb2.GoRecord.Action.ValueType
    vector: str
    dtype: np.dtype[np.generic]
    width: int
    #: (first element, element count) of each frame, from the start of the range.
    grid: list[tuple[int, int]]
    #: Copies of a leaf have equal bits on all workers of the job, so their losses must be equal.
    bitwise: bool = True
    #: What payloads are encoded with; None: raw elements.
    codec: Codec | None = None
    #: Shards of the nodes that may travel; 0: any.
    unit: int = 0


@dataclass(frozen=True)
class Totals:
    """The scalars of a complete tree."""

    example_count: int
    loss_sum: float
    #: Bit i: shard i is present.
    present: int
    #: What the reduced vector is to be divided by.
    divisor: int


class Round:
    """An open round: the trees of its frames, and the pinned scalars of its nodes."""

    refused: tuple[int, ...] = ()
    """Shards that were left out; here a sum that is not finite fails the job."""

    left_out: tuple[int, ...] = ()
    """Shards that the round did not wait for; here it waits for all."""

    at_once = False
    """All frames complete together, with so much to do that others must have their turn."""

    def __init__(self, spec: RoundSpec) -> None:
        self.spec = spec
        self._frames = {first: index for index, (first, _) in enumerate(spec.grid)}
        self._reducers: list[TreeReducer | None] = [TreeReducer(spec.width) for _ in spec.grid]
        self._scalars = NodeScalars(spec)
        self._open = len(spec.grid)

    @property
    def complete(self) -> bool:
        """Every frame's tree is complete and was taken."""
        return self._open == 0

    @property
    def missing(self) -> int:
        """Shards that some frame still lacks: bit i is shard i."""
        every = (1 << self.spec.width) - 1
        missing = 0
        for reducer in self._reducers:
            if reducer is not None:
                missing |= every & ~reducer.filled_shards
        return missing

    @property
    def totals(self) -> Totals:
        """Scalars of the whole tree; only once some frame's tree is complete."""
        return self._scalars.totals()

    def contribute(self, frame: pb.ContributionFrame, payload: memoryview) -> Sequence[int]:
        """Fill the frame's node. Return the indexes of the frames that this completes.

        Copies of what is there already are ignored. Raises `InvalidArgument` for what does not
        fit the round and `Disagreement` where pinned scalars differ.
        """
        node = check_node(frame.node, self.spec.width)
        mask = mask_of(frame, node, self.spec.width)
        index, values = payload_values(self.spec, self._frames, frame, payload, mask)
        if self._scalars.pin(node, frame.example_count, frame.loss_sum, mask):
            self._scalars.fill(node, frame.example_count, frame.loss_sum, mask)
        reducer = self._reducers[index]
        if reducer is None:
            return ()
        reducer.fill(node, values, mask >> node.first)
        return (index,) if reducer.complete else ()

    def reduce(self) -> Steps[None]:
        """What is to be done before the first frame is taken, in slices: nothing, here."""
        yield from ()

    def reduced(self, index: int) -> NDArray[np.generic] | None:
        """Reduced frame `index`, whose tree is complete; None where no shard was present."""
        reducer = self._reducers[index]
        assert reducer is not None
        values: NDArray[np.generic] | None = reducer.result[0]
        return values

    def take(self, index: int) -> NDArray[np.generic] | None:
        """Hand over the reduced frame `index`, None where no shard was present, and forget it."""
        reducer = self._reducers[index]
        assert reducer is not None
        assert reducer.complete
        self._reducers[index] = None
        self._open -= 1
        values: NDArray[np.generic] | None
        values, present = reducer.result
        if present != self._scalars.present:
            raise Disagreement(
                f"frame {index} of version {self.spec.version} holds other shards than the frames "
                "before it"
            )
        return values


def payload_values(
    spec: RoundSpec,
    frames: Mapping[int, int],
    frame: pb.ContributionFrame,
    payload: memoryview,
    mask: int,
) -> tuple[int, NDArray[np.generic] | None]:
    """Which frame of the grid this is, and its elements; None where no shard is present.

    `frames` gives the index of a frame by its first element. Raises `InvalidArgument` for what is
    no frame of the round.
    """
    index = frames.get(frame.first_element)
    if frame.vector != spec.vector:
        raise InvalidArgument(
            f"vector {frame.vector!r} does not belong to this round; it takes {spec.vector!r}"
        )
    if index is None or spec.grid[index][1] != frame.element_count:
        raise InvalidArgument(
            f"elements {frame.first_element}+{frame.element_count} are no frame of the range"
        )
    if spec.unit and frame.node.span != spec.unit:
        raise InvalidArgument(
            f"the contribution of {number_of(frame.node.span, 'shard')} from {frame.node.first} on "
            f"cannot be taken: this job's travel by nodes of {spec.unit}"
        )
    if spec.codec is not None and mask:
        return index, decoded(spec.codec, payload, frame.element_count)
    expected = frame.element_count * spec.dtype.itemsize if mask else 0
    if len(payload) != expected:
        raise InvalidArgument(
            f"the payload of elements {frame.first_element}+{frame.element_count} has "
            f"{len(payload)} bytes instead of {expected}"
        )
    return index, np.frombuffer(payload, spec.dtype) if mask else None


class _Sums:
    """Examples and loss of a node, as one value of a tree."""

    __slots__ = ("count", "loss")

    def __init__(self, count: int, loss: float) -> None:
        self.count = count
        self.loss = loss

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.count + other.count, self.loss + other.loss)


class NodeScalars:
    """Example count, loss and presence: pinned by a node's first frame, reduced by the tree."""

    def __init__(self, spec: RoundSpec) -> None:
        self._spec = spec
        self._pinned: dict[tuple[int, int], tuple[int, bytes, int]] = {}
        self._known = 0
        self.present = 0
        self._sums = TreeReducer(spec.width)

    def pin(self, node: Node, count: int, loss: float, mask: int) -> bool:
        """Return whether this is the node's first frame. Raises `Disagreement`."""
        key = (node.first, node.span)
        bits = struct.pack("<d", loss)
        seen = self._pinned.get(key)
        if seen is not None:
            if seen[2] != mask or seen[0] != count:
                raise self._disagreement(node, "example count or shards present")
            if seen[1] != bits and self._spec.bitwise:
                raise self._disagreement(node, "loss")
            return False
        span = shards_of(node, self._spec.width)
        if self._known & span & (self.present ^ mask):
            raise self._disagreement(node, "shards present")
        self._pinned[key] = (count, bits, mask)
        self._known |= span
        self.present |= mask
        return True

    def fill(self, node: Node, count: int, loss: float, mask: int) -> None:
        """Let a node that was pinned enter the sums."""
        self._sums.fill(node, _Sums(count, loss) if mask else None, mask >> node.first)

    def totals(self) -> Totals:
        """The sums over all nodes; only once they make up the tree."""
        sums, present = self._sums.result
        if sums is None:
            return Totals(0, 0.0, 0, 0)
        return Totals(sums.count, sums.loss, present, sums.count)

    def _disagreement(self, node: Node, what: str) -> Disagreement:
        spec = self._spec
        return Disagreement(
            f"two copies of shards {node.first} to {node.first + node.span - 1} at version "
            f"{spec.version} differ in their {what}: the job's code or data is not the same "
            "on every run; make it deterministic, or set reproducibility to tolerant"
        )


def check_node(message: training_pb2.TreeNode, width: int) -> Node:
    """The node of a message, once it is known to be an aligned sub-tree of `width` shards."""
    first, span = message.first, message.span
    if span < 1 or span & (span - 1) or first < 0 or first % span or first >= width:
        raise InvalidArgument(
            f"({first}, {span}) is no node of a tree over {number_of(width, 'shard')}"
        )
    if span >= 2 * width:
        raise InvalidArgument(f"({first}, {span}) is above the root of {number_of(width, 'shard')}")
    return Node(first, span)


def shards_of(node: Node, width: int) -> int:
    """Bit i for each shard i below the node."""
    stop = min(node.first + node.span, width)
    return (1 << stop) - (1 << node.first)


def mask_of(frame: pb.ContributionFrame, node: Node, width: int) -> int:
    """Shards present in the frame's node as bits of shard numbers; checks mask and scalars."""
    span = shards_of(node, width)
    if not frame.shard_mask:
        mask = span
    else:
        mask = int.from_bytes(frame.shard_mask, "little") << node.first
        if mask & ~span:
            raise InvalidArgument(f"the shard mask of {node} names shards outside of it")
    if frame.example_count < 0 or not math.isfinite(frame.loss_sum):
        raise InvalidArgument(
            f"{node} carries {number_of(frame.example_count, 'example')} and "
            f"loss {frame.loss_sum}; a leaf that is not finite must be left out"
        )
    if not mask and (frame.example_count or frame.loss_sum):
        raise InvalidArgument(f"{node} has no shard present and yet examples or a loss")
    return mask
