"""Sums of gradients of single rows, each shortened to a norm.

Linear models and perceptrons know the norm of each row's gradient without computing it row by row:
the gradient of a layer is the outer product of what goes in and of the derivative by what comes
out, so its norm is the product of theirs (Goodfellow, "Efficient per-example gradient computations"
2015). Of any other model the gradient of each row is computed by itself.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models.base import Array, Batch, ClippingModel, Model

MARGIN = 1.0 - 2.0**-20
"""So that rounding takes no shortened gradient over its norm."""


def clipped_gradient(
    model: Model, parameters: Array, batch: Batch, clip_norm: float, out: Array
) -> None:
    """Write the sum of the rows' gradients, each of a norm of `clip_norm` at most, into `out`.

    A row whose gradient is not finite counts as 0: whether there is one must not show either.
    """
    if isinstance(model, ClippingModel):
        model.clipped_gradient(parameters, batch, clip_norm, out)
        return
    out[:] = 0
    gradient = np.empty_like(out)
    for row in range(batch.rows):
        model.gradient(parameters, _row(batch, row), gradient)
        factor = _factor(gradient, clip_norm)
        if factor > 0.0:
            np.multiply(gradient, out.dtype.type(factor), out=gradient)
            np.add(out, gradient, out=out)


def clip_factors(squared_norms: NDArray[np.float64], clip_norm: float) -> NDArray[np.float64]:
    """Return (rows,) what shortens gradients of these squared norms; 0 where one is not finite."""
    norms = np.sqrt(squared_norms)
    longest = clip_norm * MARGIN
    factors: NDArray[np.float64] = np.ones_like(norms)
    np.divide(longest, norms, out=factors, where=norms > longest)
    factors[~np.isfinite(norms)] = 0.0
    return factors


def shorten(residual: Array, factors: NDArray[np.float64]) -> None:
    """Multiply each row; 0 takes away also what is not finite."""
    residual *= factors.astype(residual.dtype)[:, np.newaxis]
    residual[factors == 0.0] = 0


def without_infinite(rows: Any, factors: NDArray[np.float64]) -> Any:
    """Return rows to multiply a shortened residual with: those whose factor is 0 are all 0."""
    infinite = factors == 0.0
    if not infinite.any():
        return rows
    kept = rows.copy()
    if isinstance(kept, np.ndarray):
        kept[infinite] = 0
    else:
        kept.data[np.repeat(infinite, np.diff(kept.indptr))] = 0
    return kept


def squared_norms(rows: Any) -> NDArray[np.float64]:
    """Return (rows,) sums of squares in double precision, of a dense matrix or one in CSR."""
    if isinstance(rows, np.ndarray):
        wide = rows.astype(np.float64, copy=False)
        dense: NDArray[np.float64] = np.einsum("ij,ij->i", wide, wide)
        return dense
    numbers = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    squares = np.square(rows.data, dtype=np.float64)
    sums = np.zeros(rows.shape[0])
    np.add.at(sums, numbers, squares)
    return sums


def _factor(gradient: Array, clip_norm: float) -> float:
    wide = gradient.astype(np.float64)
    squared = float(wide @ wide)
    return float(clip_factors(np.array([squared]), clip_norm)[0]) if math.isfinite(squared) else 0.0


def _row(batch: Batch, row: int) -> Batch:
    rows = slice(row, row + 1)
    weights = None if batch.weights is None else batch.weights[rows]
    return replace(
        batch, features=batch.features[rows], targets=batch.targets[rows], weights=weights
    )
