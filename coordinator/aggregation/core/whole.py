"""A round whose contributions count only once they are whole.

Rules that compare the shards' contributions, and rules by which the first so many count, need one
range and whole contributions: a part of one must never be in a step that the rest of it is not in.
So frames are collected by node, a whole contribution goes to a *sink*, and when all that the round
needs are in, all of its frames complete at once. What is to be done then is a lot, and is done in
slices: first `reduce`, then one frame after the other is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from phalanx.reducers import Contribution, Reducer, Slices, Steps
from phalanx.reduction import Node, nodes_of_mask, shards_of_mask
from phalanx.rounds import (
    NodeScalars,
    Round,
    RoundSpec,
    Totals,
    check_node,
    mask_of,
    payload_values,
    shards_of,
)
from phalanx.v1 import aggregation_service_pb2 as pb

Array = NDArray[Any]


@dataclass
class _Arriving:
    """Frames of one node that are here; `left` are still to come."""

    frames: list[Array | None]
    left: int


@dataclass(frozen=True)
class _Whole:
    """A contribution all of whose frames are here."""

    node: Node
    mask: int
    loss_sum: float
    values: Contribution


class HeldRound(Round):
    """A round of trees whose mean is shortened to a norm: no frame is done before all are."""

    at_once = True

    def __init__(self, spec: RoundSpec, clip_norm: float) -> None:
        super().__init__(spec)
        self._clip_norm = clip_norm
        self._held: set[int] = set()
        self._factor = 1.0

    def contribute(self, frame: pb.ContributionFrame, payload: memoryview) -> Sequence[int]:
        """Take one frame; see `Round.contribute`. All frames complete with the last one."""
        # A copy of what is held completes its frame again.
        self._held.update(super().contribute(frame, payload))
        return () if len(self._held) < len(self.spec.grid) else sorted(self._held)

    def reduce(self) -> Steps[None]:
        """Find out how much the mean is to be shortened, in slices."""
        totals = self.totals
        if totals.divisor:
            pieces = [self.reduced(index) for index in sorted(self._held)]
            mean = Contribution([each for each in pieces if each is not None], totals.divisor)
            self._factor = yield from mean.factor_steps(self._clip_norm, Slices())

    def take(self, index: int) -> Array | None:
        """Hand over reduced frame `index`, shortened."""
        return _shortened(super().take(index), self._factor)


class LeavesRound:
    """Collects the contribution of each shard and hands all of them to a reducer.

    It is done without the last `spare` shards: what of them is not whole by then is left out.
    """

    at_once = True

    def __init__(
        self, spec: RoundSpec, reducer: Reducer, spare: int = 0, clip_norm: float | None = None
    ) -> None:
        """`clip_norm` is the longest norm of what the reducer gives."""
        self.spec = spec
        self._spare = spare
        self._clip_norm = clip_norm
        self._reducer = reducer
        self._index = {first: index for index, (first, _) in enumerate(spec.grid)}
        self._scalars = NodeScalars(spec)
        self._arriving: dict[int, _Arriving] = {}
        self._whole: list[_Whole] = []
        self._in = 0
        self._closed = False
        #: Shards whose contributions were not finite, and so left out.
        self.refused: tuple[int, ...] = ()
        #: Shards that were not whole when the round had all that it needs.
        self.left_out: tuple[int, ...] = ()
        self._reduced: list[Array | None] = []
        self._left = len(spec.grid)
        self._divisor = 0
        self._factor = 1.0

    @property
    def complete(self) -> bool:
        """Every frame was taken."""
        return self._left == 0

    @property
    def missing(self) -> int:
        """Shards that are not whole here and still wanted: bit i is shard i."""
        return 0 if self._closed else ~self._in & ((1 << self.spec.width) - 1)

    @property
    def totals(self) -> Totals:
        """Scalars of all contributions; only once they are reduced."""
        totals = self._scalars.totals()
        return Totals(totals.example_count, totals.loss_sum, totals.present, self._divisor)

    def contribute(self, frame: pb.ContributionFrame, payload: memoryview) -> Sequence[int]:
        """Take one frame; see `Round.contribute`. All frames complete with the last one."""
        node = check_node(frame.node, self.spec.width)
        if self._closed:
            return ()
        mask = mask_of(frame, node, self.spec.width)
        index, values = payload_values(self.spec, self._index, frame, payload, mask)
        if self._scalars.pin(node, frame.example_count, frame.loss_sum, mask):
            self._arriving[node.first] = _Arriving(
                [None] * len(self.spec.grid), len(self.spec.grid)
            )
        arriving = self._arriving.get(node.first)
        if arriving is None:
            return ()
        if values is None:
            arriving.left = 0
        elif arriving.frames[index] is None:
            arriving.frames[index] = values
            arriving.left -= 1
        if arriving.left == 0:
            self._keep(node, frame, mask)
        if self.missing.bit_count() > self._spare:
            return ()
        self._close()
        return range(len(self.spec.grid))

    def reduce(self) -> Steps[None]:
        """Reduce all contributions, in slices; their memory is free afterwards."""
        whole, self._whole = self._whole, []
        reduced = yield from self._reducer.steps({each.node.first: each.values for each in whole})
        self.refused = tuple(sorted(each.node.first for each in whole if not each.values.finite))
        for each in whole:
            if each.node.first in self.refused:
                self._scalars.fill(each.node, 0, 0.0, 0)
            else:
                self._scalars.fill(each.node, each.values.count, each.loss_sum, each.mask)
        if reduced is None:
            self._reduced = [None] * self._left
            return
        mean = Contribution(reduced.pieces, reduced.divisor)
        self._factor = yield from mean.factor_steps(self._clip_norm, Slices())
        self._reduced = list(reduced.pieces)
        self._divisor = reduced.divisor

    def take(self, index: int) -> Array | None:
        """Hand over reduced frame `index`; None: the step changes nothing."""
        self._left -= 1
        values, self._reduced[index] = self._reduced[index], None
        return _shortened(values, self._factor)

    def _keep(self, node: Node, frame: pb.ContributionFrame, mask: int) -> None:
        frames = self._arriving.pop(node.first).frames
        self._in |= shards_of(node, self.spec.width)
        if mask and frame.example_count:
            pieces = [each for each in frames if each is not None]
            values = Contribution(pieces, frame.example_count)
            self._whole.append(_Whole(node, mask, frame.loss_sum, values))
        else:
            self._scalars.fill(node, 0, 0.0, 0)

    def _close(self) -> None:
        """What the round needs is in: whatever is not whole by now is left out."""
        missing = self.missing
        self.left_out = shards_of_mask(missing)
        for node in nodes_of_mask(missing, self.spec.width):
            self._scalars.fill(node, 0, 0.0, 0)
        self._arriving.clear()
        self._closed = True


def _shortened(values: Array | None, factor: float) -> Array | None:
    if values is None or factor == 1.0:
        return values
    shortened: Array = values * values.dtype.type(factor)
    return shortened
