"""What is drawn by the seed of a job, apart by purpose: one use of it tells nothing of another.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) makes numbers of a key
and a counter. The key is the seed and the stream; the counter says what the numbers are for, such
as shard and step, so that nothing has to be remembered between two uses.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_WORD = 0xFFFF_FFFF_FFFF_FFFF


class Stream(IntEnum):
    """A use of the seed. Numbers never change: the bits of all results hang on them."""

    ROWS = 1
    PARAMETERS = 2
    ROUNDING = 3
    CENTERS = 6
    DUALS = 0x636F636F61
    SPLITS = 0x73706C6974


def stream_key(seed: int, stream: Stream) -> NDArray[np.uint64]:
    """Return the key of a stream; of a negative seed its 64 bits count."""
    return np.array([seed & _WORD, stream], dtype=np.uint64)


def stream_generator(
    seed: int, stream: Stream, counter: tuple[int, int, int] = (0, 0, 0)
) -> np.random.Generator:
    """Return what draws the numbers of one counter, whose lowest word counts the numbers."""
    words = np.array([0, *counter], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=stream_key(seed, stream), counter=words))
