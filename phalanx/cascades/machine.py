"""Support vector machines of rows in memory: solved by libsvm, their kernel, their decisions.

Classes are told apart pair by pair, as libsvm does. The coefficients of a machine of k classes are
a (k - 1, vectors) array: a vector of class i has its coefficient against class j > i in row j - 1,
and against j < i in row j. Of two classes it is one row, with the sign of the second.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import FailedPrecondition
from phalanx.programs.cascade import KERNEL_MEGABYTES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BLOCK_ROWS = 512


@dataclass(frozen=True)
class Machine:
    """What libsvm found: `support` are its vectors among the rows that it was given, ascending."""

    support: Ints
    coefficients: Floats
    intercepts: Floats
    classes: Ints


def solve(features: Any, targets: Ints, c: float, gamma: float) -> Machine | None:
    """Return the machine of some rows; None where all of them are of one class."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import SVC

    if len(targets) == 0 or (targets == targets[0]).all():
        return None
    machine = SVC(C=c, gamma=gamma, cache_size=KERNEL_MEGABYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            machine.fit(features, targets)
        except ConvergenceWarning as error:
            raise FailedPrecondition(f"libsvm did not converge: {error}") from error
    order = np.argsort(machine.support_)
    coefficients = machine.dual_coef_
    if not isinstance(coefficients, np.ndarray):
        coefficients = coefficients.toarray()
    return Machine(
        machine.support_[order].astype(np.int64),
        np.ascontiguousarray(coefficients[:, order]),
        np.array(machine.intercept_, np.float64),
        machine.classes_.astype(np.int64),
    )


def pairs(classes: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of classes in the order of their intercepts."""
    for first in range(classes):
        for second in range(first + 1, classes):
            yield first, second


def pair_coefficients(coefficients: Floats, places: Ints, first: int, second: int) -> Floats:
    """Return what each vector counts between two classes; `places` are those of their classes."""
    found: Floats = np.where(places == first, coefficients[second - 1], 0.0)
    found[places == second] = coefficients[first][places == second]
    return found


def kernel(rows: Any, vectors: Any, gamma: float) -> Floats:
    """Return exp(-gamma ‖x - y‖²) of every row with every vector."""
    product = rows @ vectors.T
    if not isinstance(product, np.ndarray):
        product = product.toarray()
    distances = squares(rows)[:, None] + squares(vectors) - 2 * product
    found: Floats = np.exp(-gamma * np.maximum(distances, 0))
    return found


def squares(rows: Any) -> Floats:
    """Return the squared norm of each row."""
    found = (rows * rows).sum(axis=1)
    return np.asarray(found, np.float64).reshape(-1)


def dual_objective(
    vectors: Any, places: Ints, coefficients: Floats, classes: int, gamma: float
) -> float:
    """Return Σα - ½ Σ αᵢαⱼyᵢyⱼK(xᵢ, xⱼ), added up over the pairs of classes."""
    each = np.array([pair_coefficients(coefficients, places, *pair) for pair in pairs(classes)])
    total = float(np.abs(each).sum())
    for first in range(0, len(places), _BLOCK_ROWS):
        block = kernel(vectors[first : first + _BLOCK_ROWS], vectors, gamma)
        total -= float(np.sum(each[:, first : first + _BLOCK_ROWS] * (each @ block.T))) / 2
    return total


def decisions(
    values: Floats, places: Ints, coefficients: Floats, intercepts: Floats, classes: int
) -> Floats:
    """Return (rows, pairs) decision values of the kernel with all vectors.

    Of two classes a value above 0 is for the second, as scikit-learn has it; of more it is for the
    first of its pair.
    """
    columns = [
        values @ pair_coefficients(coefficients, places, first, second) + intercepts[number]
        for number, (first, second) in enumerate(pairs(classes))
    ]
    return np.stack(columns, axis=1)


def vote_shares(values: Floats, classes: int) -> Floats:
    """Return (rows, classes): which part of all pairs is for each class."""
    votes = np.zeros((len(values), classes))
    for number, (first, second) in enumerate(pairs(classes)):
        ahead = values[:, number] > 0
        votes[:, first] += ahead
        votes[:, second] += ~ahead
    votes /= values.shape[1]
    return votes
