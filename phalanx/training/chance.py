"""Poisson sampling: each row enters each step by itself, with one probability.

That is what the accountant of private jobs takes for granted. Instead of a number for each row the
gaps between rows that are drawn are drawn, which have a geometric distribution, so that a step
costs what it draws and not what there is.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.privacy.secret import KEY_BYTES


def drawn_rows(key: bytes, shard: int, rows: int, step: int, rate: float) -> NDArray[np.int64]:
    """Return which of a shard's rows enter a step, in order: a pure function of its arguments.

    Args:
        key: that of the job's sampler.
        shard: the number of the shard.
        rows: rows of the shard.
        step: the version at which the gradient is taken.
        rate: probability of a row; from 1 on all are drawn.

    Raises InvalidArgument for a key that is none.
    """
    if rate >= 1.0:
        return np.arange(rows)
    if len(key) != KEY_BYTES:
        raise InvalidArgument("the plan of a private job has no key to draw rows by")
    counter = np.array([0, 0, shard, step], np.uint64)
    words = np.frombuffer(key, "<u8").astype(np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words, counter=counter))
    expected = rows * rate
    some = int(expected + 4.0 * math.sqrt(expected)) + 8
    drawn = generator.geometric(rate, some).cumsum() - 1
    while drawn[-1] < rows:
        drawn = np.append(drawn, drawn[-1] + generator.geometric(rate, some).cumsum())
    return drawn[: np.searchsorted(drawn, rows)]
