"""The support vector machine on a9a, and its optimum by liblinear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
from sklearn.datasets import load_svmlight_file
from sklearn.svm import LinearSVC

from phalanx.blas import one_blas_thread
from phalanx.testing.datasets import StoredDataset, shared_data, store

FEATURES = 123


@dataclass(frozen=True)
class A9aMargins:
    """Adult in LIBSVM form; the hinge loss is computed apart from the code under test."""

    features: scipy.sparse.csr_matrix
    signs: np.ndarray
    stored: StoredDataset

    def primal(self, w: np.ndarray, l2: float, *, squared: bool = False) -> float:
        """Mean loss + λ/2‖w‖²."""
        short = np.maximum(0, 1 - self.signs * (self.features @ w))
        return float((short**2 if squared else short).mean() + l2 / 2 * w @ w)

    def accuracy(self, w: np.ndarray) -> float:
        """Part of the rows on the right side."""
        return float((np.sign(self.features @ w) == self.signs).mean())


def margins_of_a9a(folder: Path) -> A9aMargins:
    """Load and store the data; skips the test where they are not there."""
    rows, labels = load_svmlight_file(str(shared_data("a9a") / "a9a"), n_features=FEATURES)
    features = scipy.sparse.csr_matrix(rows)
    # liblinear takes no 64-bit indices.
    features.indices, features.indptr = (
        each.astype(np.int32) for each in (features.indices, features.indptr)
    )
    stored = store(folder, features, (labels > 0).astype(np.int64), dtype="float64")
    return A9aMargins(features, np.where(labels > 0, 1.0, -1.0), stored)


def optimum(data: A9aMargins, l2: float, *, squared: bool = False) -> float:
    """P*, by liblinear's dual coordinate descent without an intercept."""
    solver = LinearSVC(
        loss="squared_hinge" if squared else "hinge",
        C=1 / (l2 * len(data.signs)),
        fit_intercept=False,
        dual=True,
        tol=1e-8,
        max_iter=1_000_000,
    )
    with one_blas_thread():
        w = solver.fit(data.features, data.signs).coef_.ravel()
    return data.primal(w, l2, squared=squared)
