"""k-means: leaves assign their rows to the nearest centers and add them up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models.base import (
    Array,
    Batch,
    DataSchema,
    LeafSums,
    TensorViews,
    dense,
    make_layout,
)
from phalanx.specs import workspaces

CENTERS, SIZES, CANDIDATES = "centers", "sizes", "candidates"
"""Model: (clusters, features), and the rows of each cluster. Workspace: (candidates, features)."""


def is_beginning(sizes: Array) -> bool:
    """Whether there are no centers yet: then leaves contribute candidates."""
    return not sizes.any()


class KMeans:
    """Distances are Euclidean. The loss of a row is its squared distance to the nearest center."""

    evaluation_sums: tuple[str, ...] = ("loss",)

    def __init__(self, schema: DataSchema, clusters: int) -> None:
        tensors: list[tuple[str, tuple[int, ...], bool]] = [
            (CENTERS, (clusters, schema.features), False),
            (SIZES, (clusters,), False),
        ]
        workspace = workspaces.k_means(clusters, schema.features, schema.rows, schema.shards)
        workspace = workspace if schema.rows else {}
        self.layout = make_layout(tensors, schema.dtype, workspace=list(workspace.items()))
        self._shards = schema.shards
        self._dtype = np.dtype(schema.dtype)
        self._views = TensorViews(self.layout)

    def initial_parameters(self, seed: int) -> Array:
        """Return zeros: no centers yet."""
        return np.zeros(self.layout.element_count, self._dtype)

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """Contribute candidates, or of each cluster the sum of its rows and their number."""
        out[:] = 0
        tensors, sums = self._views(parameters), self._views(out)
        if is_beginning(tensors[SIZES]):
            self._candidates(batch, sums[CANDIDATES])
            return LeafSums(batch.rows, 0.0)
        nearest, distances = self._nearest(tensors[CENTERS], batch.features)
        clusters = len(tensors[SIZES])
        sums[SIZES][...] = np.bincount(nearest, minlength=clusters)
        for cluster in np.unique(nearest):
            members = batch.features[nearest == cluster]
            sums[CENTERS][cluster] = members.sum(axis=0)
        return LeafSums(batch.rows, float(distances.sum(dtype=np.float64)))

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        _, distances = self._nearest(self._views(parameters)[CENTERS], batch.features)
        return np.array([distances.sum(dtype=np.float64)], np.float64)

    def predict(self, parameters: Array, features: Any) -> Array:
        """Return (rows,) the number of the nearest center."""
        nearest, _ = self._nearest(self._views(parameters)[CENTERS], features)
        return nearest

    def _candidates(self, batch: Batch, out: Array) -> None:
        """The places shard, shard + shards, … are this shard's: rows at even distances."""
        places = np.arange(batch.shard, len(out), self._shards)
        rows = np.arange(len(places)) * batch.rows // max(1, len(places))
        out[places] = dense(batch.features[rows])

    @staticmethod
    def _nearest(centers: Array, features: Any) -> tuple[Array, Array]:
        """The number of each row's nearest center (of equal ones the first), and its squared
        distance."""
        if isinstance(features, np.ndarray):
            squares = np.einsum("ij,ij->i", features, features)
        else:
            squares = np.asarray(features.multiply(features).sum(axis=1)).ravel()
        products = np.asarray(features @ np.ascontiguousarray(centers.T))
        distances = (centers**2).sum(axis=1) - 2 * products
        nearest = distances.argmin(axis=1)
        least = distances[np.arange(len(nearest)), nearest] + squares
        return nearest, np.maximum(least, 0)
