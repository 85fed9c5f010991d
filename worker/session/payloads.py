"""Builds the frames of wire nodes straight from the slots' shared payload buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Codec, encoded_span
from phalanx.frames import encode_request
from phalanx.training.states import STATE_VECTOR
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import training_pb2
from worker.core.outbox import FrameOut
from worker.core.rounds import Fold, Part, shard_mask
from worker.memory import Arena

GoRecord = training_pb2.GoRecord

_VECTORS = {
    GoRecord.ACTION_INITIALISE: "parameters",
    GoRecord.ACTION_TRAIN: "gradient",
    GoRecord.ACTION_EVALUATE: "evaluation",
}


class FrameBuilder:
    """Encodes frames of one job; keeps small buffers for sums of parts.

    `codec` is what the leaf processes encode contributions with.
    """

    def __init__(self, codec: Codec | None = None) -> None:
        self._codec = codec
        self._sums: list[NDArray[Any]] = []

    def encode(self, out: FrameOut, arena: Arena) -> bytes:
        """The message for one frame, with the canonical sum of the node's parts as payload."""
        round, wire = out.round, out.wire
        go, totals = round.go, wire.totals
        # Filled where it is: a frame of its own would be copied into the header.
        header = exchange.ExchangeRequestHeader()
        frame = header.frame
        frame.term, frame.step, frame.round = go.term, go.version, go.round
        frame.range = out.range_index
        frame.node.first, frame.node.span = wire.node
        frame.vector = _VECTORS[go.action]
        frame.first_element, frame.element_count = out.first_element, out.element_count
        frame.shard_mask = shard_mask(wire.node, totals.mask, round.width)
        frame.example_count, frame.loss_sum = totals.count, totals.loss
        frame.copy = wire.copy
        if out.state >= 0:
            frame.vector, frame.state = STATE_VECTOR, out.state
            first = out.first_vector_element
            state = arena.array(round.parts[wire.node].made_state[out.state])
            return encode_request(header, state[first : first + out.element_count].data)
        if round.shard_step is not None:
            frame.shard_step = round.shard_step
        if wire.fold is None:
            return encode_request(header)
        if round.is_evaluation:
            payload = _sums(wire.fold)
        else:
            first = out.first_vector_element
            if self._codec is not None and go.action == GoRecord.ACTION_TRAIN:
                assert isinstance(wire.fold, Part), "an encoded node is one part"
                start, size = encoded_span(self._codec, first, out.element_count)
                raw = arena.raw(wire.fold.buffer)[start : start + size]
                return encode_request(header, raw.data)
            payload = self._piece(wire.fold, arena, first, first + out.element_count, 0)
        return encode_request(header, payload.data)

    def _piece(self, fold: Fold, arena: Arena, first: int, stop: int, depth: int) -> NDArray[Any]:
        """Elements [first, stop) of a sum: a view where there is nothing to add."""
        if isinstance(fold, Part):
            return arena.array(fold.buffer)[first:stop]
        left = self._piece(fold[0], arena, first, stop, depth)
        right = self._piece(fold[1], arena, first, stop, depth + 1)
        out = self._buffer(depth, stop - first, arena.dtype)
        with np.errstate(over="ignore"):  # whoever applies the sum looks at it
            np.add(left, right, out=out)
        return out

    def _buffer(self, depth: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        while len(self._sums) <= depth:
            self._sums.append(np.empty(0, dtype))
        if len(self._sums[depth]) < count:
            self._sums[depth] = np.empty(count, dtype)
        return self._sums[depth][:count]


def _sums(fold: Fold) -> NDArray[np.float64]:
    if isinstance(fold, Part):
        return np.array(fold.sums, np.float64)
    total: NDArray[np.float64] = _sums(fold[0]) + _sums(fold[1])
    return total
