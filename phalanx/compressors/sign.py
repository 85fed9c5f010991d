"""One bit for each element and one scale for each bucket."""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.compressors.base import Array, Bytes, Codec, Key

BUCKET = 512
"""Elements that share a scale: few enough for it to be near to them."""


class Sign(Codec):
    """Each element becomes plus or minus the mean magnitude of its bucket."""

    name = "sign"
    feedback = True

    def __init__(self, dtype: np.dtype[Any]) -> None:
        super().__init__(dtype)
        self._little = dtype.newbyteorder("<")

    def block_bytes(self, count: int) -> int:
        """See `Codec`."""
        return self._scale_bytes(count) + -(-count // 8)

    def encode_block(self, values: Array, block: int, key: Key) -> Bytes:
        """See `Codec`."""
        count = len(values)
        padded = np.zeros((-(-count // BUCKET), BUCKET), self.dtype)
        # Divided first: the sum of large elements is no number.
        np.divide(np.abs(values), self.dtype.type(BUCKET), out=padded.reshape(-1)[:count])
        scales = padded.sum(axis=1)
        scales[-1] *= self.dtype.type(BUCKET / (count - BUCKET * (len(scales) - 1)))
        head = scales.astype(self._little).view(np.uint8)
        return np.concatenate((head, np.packbits(values < 0, bitorder="little")))

    def decode_block(self, data: Bytes, out: Array) -> None:
        """See `Codec`."""
        head = self._scale_bytes(len(out))
        scales = data[:head].copy().view(self._little)
        negative = np.unpackbits(data[head:], count=len(out), bitorder="little").view(np.bool_)
        out[:] = np.repeat(scales, BUCKET)[: len(out)]
        np.negative(out, out=out, where=negative)

    def _scale_bytes(self, count: int) -> int:
        return -(-count // BUCKET) * self.dtype.itemsize
