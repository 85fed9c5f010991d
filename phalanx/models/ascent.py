"""Coordinate ascent on the dual problem of the linear SVM, over the rows of one shard.

With n rows in all shards, s = ±1 and the penalty λ/2‖w‖², the hinge loss gives the two problems

    P(w) = λ/2 ‖w‖² + 1/n Σ max(0, 1 − sᵢ xᵢ·w)
    D(α) = 1/n Σ αᵢ − λ/2 ‖w(α)‖²,  w(α) = 1/(λ n) Σ αᵢ sᵢ xᵢ,  0 ≤ αᵢ ≤ 1

with D(α) ≤ P(w) for all α and w, and equality at the optimum. A shard knows w of the last step and
changes the α of its own rows alone (SDCA: Shalev-Shwartz and Zhang 2013). What the others change
meanwhile is made up for by a curvature σ′ times as large (CoCoA+: Ma et al. 2015, equation 11).

The loop over the rows is Python's, since each row depends on those before it: two to five
microseconds for one.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Array = NDArray[Any]


class _Rows(Protocol):
    """Rows beside a vector that grows by multiples of them."""

    #: ‖xᵢ‖² of each row.
    squares: list[float]

    def score(self, row: int) -> float:
        """Return the product of a row and the vector."""

    def add(self, row: int, factor: float) -> None:
        """Add a multiple of a row to the vector."""


def ascend(
    features: Array | csr_array,
    signs: Array,
    duals: Array,
    weights: Array,
    curvature: float,
    orders: Iterable[Array],
) -> NDArray[np.float64]:
    """Return new dual variables of the rows.

    Args:
        features: (rows, features), dense or CSR.
        signs: (rows,) ±1.
        duals: (rows,) α; never written.
        weights: (features,) w of all shards together; never written.
        curvature: σ′ / (λ n).
        orders: for each pass, which row comes when.
    """
    rows = _rows(features, weights)
    sign, alpha = signs.tolist(), duals.tolist()
    for order in orders:
        for row in order.tolist():
            old = alpha[row]
            short, square = 1.0 - sign[row] * rows.score(row), curvature * rows.squares[row]
            # The optimum of this one variable; of a row of zeros it is the upper end.
            new = min(1.0, max(0.0, old + short / square)) if square > 0.0 else 1.0
            if new != old:
                alpha[row] = new
                rows.add(row, curvature * (new - old) * sign[row])
    return np.array(alpha, np.float64)


def _rows(features: Array | csr_array, weights: Array) -> _Rows:
    if isinstance(features, np.ndarray):
        return _DenseRows(features, weights)
    return _SparseRows(features, weights)


class _DenseRows:
    def __init__(self, features: Array, weights: Array) -> None:
        self.squares: list[float] = np.square(features).sum(axis=1).tolist()
        self._features = features
        self._vector = weights.copy()
        self._scaled = np.empty_like(weights)

    def score(self, row: int) -> float:
        """See ``_Rows``."""
        return float(self._features[row] @ self._vector)

    def add(self, row: int, factor: float) -> None:
        """See ``_Rows``."""
        np.multiply(self._features[row], factor, out=self._scaled)
        np.add(self._vector, self._scaled, out=self._vector)


class _SparseRows:
    def __init__(self, features: csr_array, weights: Array) -> None:
        self.squares: list[float] = features.multiply(features).sum(axis=1).tolist()
        cuts = [slice(*each) for each in pairwise(features.indptr.tolist())]
        self._columns = [features.indices[cut] for cut in cuts]
        self._values = [features.data[cut] for cut in cuts]
        self._vector = weights.copy()

    def score(self, row: int) -> float:
        """See ``_Rows``."""
        return float(self._vector[self._columns[row]] @ self._values[row])

    def add(self, row: int, factor: float) -> None:
        """See ``_Rows``."""
        self._vector[self._columns[row]] += self._values[row] * factor
