"""What a compressor is, and encoding whole vectors block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Key:
    """What is encoded: the contribution of the node that starts at shard `first` in a step."""

    first: int = 0
    step: int = 0


class Codec(ABC):
    """Encodes blocks of one dtype."""

    name: ClassVar[str]
    feedback: ClassVar[bool] = False
    """What a node's contribution loses is its *residual*, and is added to its next one."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    @abstractmethod
    def block_bytes(self, count: int) -> int:
        """Size of an encoded block of `count` elements."""

    @abstractmethod
    def encode_block(self, values: Array, block: int, key: Key) -> Bytes:
        """Encode one block of finite values; `block` is its number in the vector."""

    @abstractmethod
    def decode_block(self, data: Bytes, out: Array) -> None:
        """Write the elements of an encoded block to all of `out`.

        Raises `InvalidArgument` for bytes that no block is encoded to.
        """

    def encoded_bytes(self, count: int) -> int:
        """Size of `count` elements that begin at a block's border."""
        blocks, rest = divmod(count, BLOCK_ELEMENTS)
        return blocks * self.block_bytes(BLOCK_ELEMENTS) + (self.block_bytes(rest) if rest else 0)


def encoded_span(codec: Codec, first: int, count: int) -> tuple[int, int]:
    """Where elements [first, first + count) lie in an encoded vector: first byte and bytes."""
    assert first % BLOCK_ELEMENTS == 0, "frames are whole blocks"
    return codec.encoded_bytes(first), codec.encoded_bytes(count)


def compress_in_place(
    codec: Codec, values: Array, data: Bytes, key: Key, residual: Array | None = None
) -> None:
    """Encode a vector into `data`, which may be the memory that holds `values`.

    No block is encoded to more bytes than it has (but for one of very few elements), so none
    overwrites another one that is still to come. What is lost goes to `residual`.
    """
    for block, first in enumerate(range(0, len(values), BLOCK_ELEMENTS)):
        piece = values[first : first + BLOCK_ELEMENTS]
        encoded = codec.encode_block(piece, block, key)
        if residual is not None:
            rest = residual[first : first + BLOCK_ELEMENTS]
            codec.decode_block(encoded, rest)
            np.subtract(piece, rest, out=rest)
        start = block * codec.block_bytes(BLOCK_ELEMENTS)
        data[start : start + len(encoded)] = encoded


def encoded(codec: Codec, values: Array, key: Key = Key()) -> Bytes:
    """Encode a vector."""
    blocks = range(0, len(values), BLOCK_ELEMENTS)
    return np.concatenate(
        [
            codec.encode_block(values[first : first + BLOCK_ELEMENTS], block, key)
            for block, first in enumerate(blocks)
        ]
    )


def decoded(codec: Codec, data: memoryview | Bytes, count: int) -> Array:
    """Decode `count` elements that begin at a block's border.

    Raises `InvalidArgument` for data of another size, or that nothing is encoded to.
    """
    raw = np.frombuffer(data, np.uint8)
    if len(raw) != codec.encoded_bytes(count):
        raise InvalidArgument(
            f"{count} elements as {codec.name} take {codec.encoded_bytes(count)} bytes, "
            f"not {len(raw)}"
        )
    out = np.empty(count, codec.dtype)
    for first in range(0, count, BLOCK_ELEMENTS):
        piece = out[first : first + BLOCK_ELEMENTS]
        start = codec.encoded_bytes(first)
        codec.decode_block(raw[start : start + codec.block_bytes(len(piece))], piece)
    return out
