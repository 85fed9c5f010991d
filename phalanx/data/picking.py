"""Some of the features of stored or raw rows, dense or CSR."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_TABLE_FEATURES = 1 << 22
"""Up to this width, places are looked up in a table (16 MiB); then they are searched for."""


class FeaturePicker:
    """Copies the features at some places of rows that are ``width`` wide.

    ``runs`` are the places: rising ranges that do not touch. What is copied has the bits of the
    source, in the order of the places.
    """

    def __init__(self, runs: Sequence[range], width: int) -> None:
        self.width = width
        self.features = sum(len(run) for run in runs)
        self._runs = tuple(runs)
        self._places: NDArray[np.int64] = np.concatenate(
            [np.arange(run.start, run.stop, dtype=np.int64) for run in runs]
        )
        self._table: NDArray[np.int32] | None = None

    def dense(
        self, source: NDArray[Any], rows: slice | NDArray[np.int64], out: NDArray[Any]
    ) -> None:
        """Writes the features of some rows of ``source`` to ``out``, converted to its type."""
        if len(self._runs) == 1:
            [run] = self._runs
            out[...] = source[:, run.start : run.stop][rows]
            return
        # Whole rows first: that reads the source in long pieces.
        whole = source[rows] if isinstance(rows, slice) else np.take(source, rows, 0, mode="clip")
        if whole.dtype == out.dtype:
            # Without a copy in between, which mode "raise" would make.
            np.take(whole, self._places, axis=1, out=out, mode="clip")
        else:
            out[...] = np.take(whole, self._places, axis=1, mode="clip")

    def sparse(
        self, data: NDArray[Any], indices: NDArray[np.int32], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64]]:
        """Values, their new indices, and how many each row has, of rows one after another."""
        renumbered = self._renumbered(indices)
        kept = renumbered >= 0
        before = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum(kept, out=before[1:])
        ends = np.cumsum(lengths)
        return data[kept], renumbered[kept], before[ends] - before[ends - lengths]

    def rows(self, features: Any) -> Any:
        """The features of all rows of an array or a CSR matrix, in its type."""
        if isinstance(features, np.ndarray):
            out: NDArray[Any] = np.empty((len(features), self.features), features.dtype)
            self.dense(features, slice(0, len(features)), out)
            return out
        return self._csr_rows(features)

    def _csr_rows(self, features: "csr_array") -> "csr_array":
        lengths = np.diff(features.indptr).astype(np.int64)
        data, indices, lengths = self.sparse(features.data, features.indices, lengths)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        shape = (features.shape[0], self.features)
        return type(features)((data, indices, indptr), shape=shape)

    def _renumbered(self, indices: NDArray[np.int32]) -> NDArray[np.int32]:
        """The new index of each, -1 for features that are not picked."""
        if self.width > _TABLE_FEATURES:
            found = np.searchsorted(self._places, indices)
            found[found == self.features] = 0
            return np.where(self._places[found] == indices, found, -1).astype(np.int32)
        if self._table is None:
            self._table = np.full(self.width, -1, dtype=np.int32)
            self._table[self._places] = np.arange(self.features, dtype=np.int32)
        return self._table[indices]
