"""Casts to 16 bits: to the nearest value, ties to even."""

from __future__ import annotations

import math
import struct

import numpy as np

from phalanx.compressors.base import Array, Bytes, Codec, Key

_HALF_EXPONENT = 15
"""Blocks are scaled so that their largest element lies below 2**15; float16 ends at 65504."""

_EXPONENT = struct.Struct("<i")


class Bfloat16(Codec):
    """The upper half of a float32: its range, and 8 significant bits."""

    name = "bfloat16"

    def block_bytes(self, count: int) -> int:
        """See `Codec`."""
        return 2 * count

    def encode_block(self, values: Array, block: int, key: Key) -> Bytes:
        """See `Codec`."""
        with np.errstate(over="ignore"):
            bits = values.astype("<f4").view("<u4")
        odd = bits >> 16 & 1
        upper = (bits + (np.uint32(0x7FFF) + odd)) >> 16
        # Rounding must not make an infinity of a finite number.
        infinite = (upper & 0x7FFF) == 0x7F80
        upper[infinite] -= 1
        data: Bytes = upper.astype("<u2").view(np.uint8)
        return data

    def decode_block(self, data: Bytes, out: Array) -> None:
        """See `Codec`."""
        out[:] = (data.view("<u2").astype("<u4") << 16).view("<f4")


class Float16(Codec):
    """11 significant bits; each block carries a power of two, so that nothing overflows."""

    name = "float16"

    def block_bytes(self, count: int) -> int:
        """See `Codec`."""
        return _EXPONENT.size + 2 * count

    def encode_block(self, values: Array, block: int, key: Key) -> Bytes:
        """See `Codec`."""
        largest = float(np.abs(values).max())
        exponent = math.frexp(largest)[1] - _HALF_EXPONENT
        halves = np.ldexp(values, -exponent).astype("<f2")
        head = np.frombuffer(_EXPONENT.pack(exponent), np.uint8)
        return np.concatenate((head, halves.view(np.uint8)))

    def decode_block(self, data: Bytes, out: Array) -> None:
        """See `Codec`."""
        (exponent,) = _EXPONENT.unpack(data[: _EXPONENT.size].tobytes())
        with np.errstate(over="ignore"):  # of a peer that lies; the root looks at the result
            np.ldexp(data[_EXPONENT.size :].view("<f2").astype(self.dtype), exponent, out=out)
