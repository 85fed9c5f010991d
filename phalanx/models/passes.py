"""Models from sums over all rows: one pass adds them up, one leaf of the next makes the model.

Finding components and solving equations happens in a leaf, which may take its time, of the first
shard; the others contribute nothing to that pass. The same leaf tells the loss of what it has found
on all rows, as it follows from the sums: no leaf has seen a row and the model together.
"""

from __future__ import annotations

import hashlib
from functools import cache
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
from phalanx.models.linear import BIAS, WEIGHTS, LinearModel
from phalanx.models.losses import SquaredError
from phalanx.specs import workspaces

PASSES_OVER = "passes_over"
"""Workspace of one element: the passes that are over."""

MEAN, COMPONENTS, VARIANCES = "mean", "components", "variances"
PRODUCTS, SUMS, SQUARES = "products", "sums", "squares"
"""Workspace: sums over the rows of x xᵀ and of x; for the normal equations of x xᵀ, x y and y²."""


class Pca:
    """Principal components, by the covariance of the features.

    Components have length 1 and are ordered by the variance along them, largest first; the largest
    element of each is positive.
    """

    evaluation_sums: tuple[str, ...] = ("loss",)

    def __init__(self, schema: DataSchema, components: int) -> None:
        features = schema.features
        tensors = [
            (MEAN, (features,), False),
            (COMPONENTS, (components, features), False),
            (VARIANCES, (components,), False),
        ]
        workspace = workspaces.passes(features) if schema.rows else {}
        self.layout = make_layout(tensors, schema.dtype, workspace=list(workspace.items()))
        self._rows = schema.rows
        self._dtype = np.dtype(schema.dtype)
        self._views = TensorViews(self.layout)

    @property
    def numeric_fingerprint(self) -> str:
        """What LAPACK computes here, which the first leaf of a job does not ask for."""
        return solutions(self._dtype.name)

    def initial_parameters(self, seed: int) -> Array:
        """Return zeros."""
        return np.zeros(self.layout.element_count, self._dtype)

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        out[:] = 0
        tensors, sums = self._views(parameters), self._views(out)
        loss = 0.0
        if tensors[PASSES_OVER][0] == 0:
            sums[PRODUCTS][...] = dense(batch.features.T @ batch.features)
            sums[SUMS][...] = np.asarray(batch.features.sum(axis=0)).ravel()
        elif batch.shard == 0:
            loss = self._find(tensors, sums)
        return LeafSums(batch.rows, loss)

    def _find(self, tensors: dict[str, Array], found: dict[str, Array]) -> float:
        """Write mean, components and variances; return what the rows lose by them, squared."""
        mean = tensors[SUMS] / self._rows
        covariance = tensors[PRODUCTS] / self._rows - np.outer(mean, mean)
        # The divisor of an estimate from a sample.
        divisor = max(1, self._rows - 1)
        covariance *= self._rows / divisor
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        count = len(found[VARIANCES])
        chosen = vectors[:, ::-1][:, :count].T
        largest = np.abs(chosen).argmax(axis=1)
        signs = np.sign(chosen[np.arange(count), largest])
        found[MEAN][...] = mean
        found[COMPONENTS][...] = chosen * signs[:, np.newaxis]
        found[VARIANCES][...] = np.maximum(values[::-1][:count], 0)
        left = np.maximum(values[::-1][count:], 0)
        return divisor * float(left.sum(dtype=np.float64))

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """Squared distances between the rows and what the components keep of them."""
        tensors = self._views(parameters)
        rows = dense(batch.features) - tensors[MEAN]
        kept = rows @ tensors[COMPONENTS].T
        squares = np.einsum("ij,ij->i", rows, rows) - np.einsum("ij,ij->i", kept, kept)
        return np.array([np.maximum(squares, 0).sum(dtype=np.float64)], np.float64)

    def predict(self, parameters: Array, features: Any) -> Array:
        """Return (rows, components): the rows' coordinates along the components."""
        tensors = self._views(parameters)
        coordinates: Array = (dense(features) - tensors[MEAN]) @ tensors[COMPONENTS].T
        return coordinates


class NormalEquations(LinearModel):
    """Linear regression in closed form; among equally good solutions the shortest.

    ``l2`` is that of the job: λ/2‖w‖² beside the mean loss, without the bias.
    """

    def __init__(self, schema: DataSchema, bias: bool, l2: float) -> None:
        super().__init__(schema, 1, SquaredError(), bias)
        self._l2 = l2
        self._rows = schema.rows
        workspace = list(workspaces.equations(schema.features + int(bias)).items())
        tensors = [(each.name, tuple(each.shape), each.decay) for each in self.layout.tensors]
        self.layout = make_layout(tensors, schema.dtype, workspace=workspace)
        self._views = TensorViews(self.layout)

    @property
    def numeric_fingerprint(self) -> str:
        """See ``Pca``."""
        return solutions(self._dtype.name)

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """See ``Model``."""
        out[:] = 0
        tensors, sums = self._views(parameters), self._views(out)
        loss = 0.0
        if tensors[PASSES_OVER][0] == 0:
            self._add_up(batch, sums)
        elif batch.shard == 0:
            loss = self._solve(tensors, sums)
        return LeafSums(batch.rows, loss)

    def _add_up(self, batch: Batch, sums: dict[str, Array]) -> None:
        rows = dense(batch.features)
        if self._bias:
            rows = np.concatenate([rows, np.ones((batch.rows, 1), rows.dtype)], axis=1)
        sums[PRODUCTS][...] = rows.T @ rows
        sums[SUMS][...] = rows.T @ batch.targets
        sums[SQUARES][...] = batch.targets @ batch.targets

    def _solve(self, tensors: dict[str, Array], found: dict[str, Array]) -> float:
        """Write weights and bias; return the loss of all rows, ½ ‖X w − y‖² without the penalty."""
        products, products_with_targets = tensors[PRODUCTS], tensors[SUMS]
        weights = len(tensors[WEIGHTS])
        penalised, diagonal = np.array(products), np.arange(weights)
        penalised[diagonal, diagonal] += self._rows * self._l2
        solution = _solved(penalised, products_with_targets)
        found[WEIGHTS][...] = solution[:weights]
        if self._bias:
            found[BIAS][...] = solution[weights:]
        explained = solution @ (2 * products_with_targets - products @ solution)
        return 0.5 * max(0.0, float(tensors[SQUARES][0] - explained))


@cache
def solutions(dtype: str) -> str:
    """Return a hash of what LAPACK makes of some numbers, small and large matrices taking different
    kernels: equal hashes, equal bits. Computed once."""
    digest = hashlib.sha256()
    for size in (7, 160):
        raw = np.random.Philox(key=np.array([size, 0], np.uint64)).random_raw(size * size)
        # Numbers in [-1, 1) made of integers alone, so that making them cannot differ.
        numbers = ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).astype(dtype)
        square = numbers.reshape(size, size)
        for result in (*np.linalg.eigh((square + square.T) / 2), _solved(square, square[0])):
            digest.update(np.ascontiguousarray(result).tobytes())
    return digest.hexdigest()


def _solved(products: Array, sums: Array) -> Array:
    solution: Array = np.linalg.lstsq(products, sums, rcond=None)[0]
    return solution
