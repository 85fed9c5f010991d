"""One byte for each element and one scale for each bucket, rounded at random without bias."""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.compressors.base import Array, Bytes, Codec, Key
from phalanx.streams import Stream, stream_key

_LEVELS = 127


class Int8(Codec):
    """Quantisation in the manner of Alistarh et al., "QSGD" (2017), by the largest of a bucket.

    An element x of a bucket with the largest magnitude m becomes one of the two multiples of
    m / 127 next to it, the nearer one with the greater probability, so that its expectation is x.
    """

    name = "int8"

    def __init__(self, dtype: np.dtype[Any], bucket: int, seed: int) -> None:
        super().__init__(dtype)
        self._bucket = bucket
        self._key = stream_key(seed, Stream.ROUNDING)
        self._little = dtype.newbyteorder("<")

    def block_bytes(self, count: int) -> int:
        """See `Codec`."""
        return self._scale_bytes(count) + count

    def encode_block(self, values: Array, block: int, key: Key) -> Bytes:
        """See `Codec`."""
        count = len(values)
        padded = np.zeros((-(-count // self._bucket), self._bucket), self.dtype)
        padded.reshape(-1)[:count] = values
        scales = np.abs(padded).max(axis=1) / self.dtype.type(_LEVELS)
        divisors = np.where(scales > 0, scales, self.dtype.type(1))
        padded /= divisors[:, None]
        padded.reshape(-1)[:count] += self._uniform(count, block, key)
        levels = np.clip(np.floor(padded), -_LEVELS, _LEVELS).astype(np.int8).reshape(-1)[:count]
        head = scales.astype(self._little).view(np.uint8)
        return np.concatenate((head, levels.view(np.uint8)))

    def decode_block(self, data: Bytes, out: Array) -> None:
        """See `Codec`."""
        count, head = len(out), self._scale_bytes(len(out))
        scales = data[:head].view(self._little)
        levels = data[head:].view(np.int8)
        full = count - count % self._bucket
        rows = (-1, self._bucket)
        with np.errstate(over="ignore", invalid="ignore"):  # of a peer that lies
            whole = scales[: full // self._bucket, None]
            np.multiply(levels[:full].reshape(rows), whole, out=out[:full].reshape(rows))
            if full < count:
                np.multiply(levels[full:], scales[-1], out=out[full:])

    def _uniform(self, count: int, block: int, key: Key) -> Array:
        counter = np.array([0, block, key.first, key.step], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        return generator.random(count, dtype=self.dtype.type)

    def _scale_bytes(self, count: int) -> int:
        return -(-count // self._bucket) * self.dtype.itemsize
