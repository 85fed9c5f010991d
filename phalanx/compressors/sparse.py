"""Only the largest elements of each block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from phalanx.compressors.base import Array, Bytes, Codec, Key
from phalanx.errors import InvalidArgument

_INDEX = np.dtype("<u2")
"""Of an element in its block of 65,536."""


class TopK(Codec):
    """The `fraction` of each block's elements that are largest, as indexes and values.

    Of equal elements those that come first are taken. A block of which that would save nothing is
    sent as it is.
    """

    name = "top_k"
    feedback = True

    def __init__(self, dtype: np.dtype[Any], fraction: float) -> None:
        super().__init__(dtype)
        self._fraction = fraction
        self._little = dtype.newbyteorder("<")

    def block_bytes(self, count: int) -> int:
        """See `Codec`."""
        return min(self._kept(count) * self._kept_bytes, count * self.dtype.itemsize)

    def encode_block(self, values: Array, block: int, key: Key) -> Bytes:
        """See `Codec`."""
        if self._is_whole(len(values)):
            return values.astype(self._little).view(np.uint8)
        indexes = _largest(np.abs(values), self._kept(len(values)))
        kept = values[indexes].astype(self._little)
        return np.concatenate((indexes.astype(_INDEX).view(np.uint8), kept.view(np.uint8)))

    def decode_block(self, data: Bytes, out: Array) -> None:
        """See `Codec`."""
        if self._is_whole(len(out)):
            out[:] = data.view(self._little)
            return
        head = self._kept(len(out)) * _INDEX.itemsize
        indexes = data[:head].copy().view(_INDEX)
        if indexes[-1] >= len(out) or (indexes[1:] <= indexes[:-1]).any():
            raise InvalidArgument("the indexes of a block's largest elements are not in order")
        out[:] = 0
        out[indexes] = data[head:].copy().view(self._little)

    @property
    def _kept_bytes(self) -> int:
        return _INDEX.itemsize + self.dtype.itemsize

    def _kept(self, count: int) -> int:
        return min(count, max(1, math.ceil(self._fraction * count)))

    def _is_whole(self, count: int) -> bool:
        return self._kept(count) * self._kept_bytes >= count * self.dtype.itemsize


def _largest(sizes: Array, kept: int) -> Array:
    """Indexes of the `kept` largest, in order; how a library breaks ties must not matter."""
    least = np.partition(sizes, len(sizes) - kept)[len(sizes) - kept]
    taken = sizes > least
    equal = np.flatnonzero(sizes == least)
    taken[equal[: kept - int(np.count_nonzero(taken))]] = True
    return np.flatnonzero(taken)
