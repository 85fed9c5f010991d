"""k-means: where the centers begin, and where they move.

Lloyd, "Least squares quantization in PCM" (1982); the beginning is k-means++ of Arthur and
Vassilvitskii (2007), on rows that the shards have drawn.
"""

from __future__ import annotations

import numpy as np

from phalanx.models.base import TensorViews
from phalanx.models.k_means import CANDIDATES, CENTERS, SIZES, is_beginning
from phalanx.streams import Stream, stream_generator
from phalanx.updates.base import Array, Update
from phalanx.v1.training_pb2 import Layout


class KMeansUpdate(Update):
    """First draws the centers of the candidates, then moves each to the mean of its rows."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self._views = TensorViews(layout)
        self._seed = seed

    def apply(self, parameters: Array, total: Array, count: int, version: int) -> Array:
        """See ``Update``. A center without rows stays where it is."""
        now, sums = self._views(parameters), self._views(total)
        following = np.array(parameters)
        then = self._views(following)
        if is_beginning(now[SIZES]):
            then[CENTERS][...] = self._drawn(sums[CANDIDATES], len(now[SIZES]))
            then[SIZES][...] = 1
            return following
        rows = sums[SIZES]
        some = rows > 0
        then[CENTERS][some] = sums[CENTERS][some] / rows[some, np.newaxis]
        then[SIZES][...] = rows
        return following

    def _drawn(self, candidates: Array, clusters: int) -> Array:
        """Centers among the candidates: each with a chance as its squared distance to those before;
        where all are centers already, any."""
        chances = stream_generator(self._seed, Stream.CENTERS).random(clusters)
        chosen = [int(chances[0] * len(candidates))]
        distances = ((candidates - candidates[chosen[0]]) ** 2).sum(axis=1)
        for chance in chances[1:]:
            weights = distances if distances.any() else np.ones(len(candidates))
            reached = np.searchsorted(np.cumsum(weights), chance * weights.sum(), side="right")
            chosen.append(min(int(reached), len(candidates) - 1))
            nearest = ((candidates - candidates[chosen[-1]]) ** 2).sum(axis=1)
            distances = np.minimum(distances, nearest)
        drawn: Array = candidates[chosen]
        return drawn
