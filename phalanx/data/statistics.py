"""Statistics of features over the train split, and what standardisation makes of them.

Rows are taken in blocks of a size that depends on the number of features alone, and blocks are
merged in order (Chan's formula). The result therefore has the same bits however the rows arrived.
"""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from phalanx.data.manifest import DatasetManifest, Statistics

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FEATURE_LIMIT = 100_000
"""Wider data sets keep the count only: nobody standardises them, and the manifest stays small."""

_STEPS_WANTED = 8
"""In a standard deviation: with as many, rounding adds less than a thousandth to the variance."""

_BLOCK_ROWS = 4096
_BLOCK_ELEMENTS = 1 << 19

Float64 = NDArray[np.float64]


class Accumulator(Protocol):
    """Takes rows in order, gives the statistics of all of them."""

    def add(self, features: Any) -> None:
        """Rows in order."""
        ...

    def result(self) -> Statistics:
        """Statistics of the rows so far."""
        ...


class CountOnly:
    """For data that is too wide for statistics of every feature."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, features: Any) -> None:
        """Counts the rows."""
        self._count += features.shape[0]

    def result(self) -> Statistics:
        """The count alone."""
        return Statistics(count=self._count)


class DenseStatistics:
    """Mean, population standard deviation, minimum and maximum of each feature, in float64."""

    def __init__(self, features: int) -> None:
        rows = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, features)))
        self._block: Float64 = np.empty((rows, features))
        self._filled = 0
        self._count = 0
        self._mean: Float64 = np.zeros(features)
        self._squares: Float64 = np.zeros(features)
        self._minimum: Float64 = np.full(features, np.inf)
        self._maximum: Float64 = np.full(features, -np.inf)

    def add(self, features: NDArray[Any]) -> None:
        """Rows by features, in order."""
        taken = 0
        while taken < len(features):
            count = min(len(features) - taken, len(self._block) - self._filled)
            self._block[self._filled : self._filled + count] = features[taken : taken + count]
            self._filled += count
            taken += count
            if self._filled == len(self._block):
                self._merge()

    def result(self) -> Statistics:
        """Statistics of the rows so far; all zero without rows."""
        if self._filled:
            self._merge()
        if not self._count:
            zeros = (0.0,) * len(self._mean)
            return Statistics(0, zeros, zeros, zeros, zeros)
        return Statistics(
            count=self._count,
            mean=_mean(self._mean, self._minimum, self._maximum),
            std=_std(self._squares / self._count, self._minimum, self._maximum),
            minimum=tuple(self._minimum.tolist()),
            maximum=tuple(self._maximum.tolist()),
        )

    def _merge(self) -> None:
        block = self._block[: self._filled]
        count = self._filled
        self._filled = 0
        np.minimum(self._minimum, block.min(axis=0), out=self._minimum)
        np.maximum(self._maximum, block.max(axis=0), out=self._maximum)
        total = self._count + count
        with np.errstate(over="ignore", invalid="ignore"):
            mean = block.mean(axis=0)
            block -= mean
            block *= block
            delta = mean - self._mean
            self._squares += block.sum(axis=0) + delta * delta * (self._count * count / total)
            self._mean += delta * (count / total)
        self._count = total


class CsrStatistics:
    """The same for sparse rows; values that are not stored count as zeros."""

    def __init__(self, features: int) -> None:
        self._count = 0
        self._stored: NDArray[np.int64] = np.zeros(features, dtype=np.int64)
        self._sum: Float64 = np.zeros(features)
        self._squares: Float64 = np.zeros(features)
        self._minimum: Float64 = np.full(features, np.inf)
        self._maximum: Float64 = np.full(features, -np.inf)

    def add(self, features: "csr_array") -> None:
        """Sparse rows, in order; values are added one after another, so blocks do not matter."""
        values = features.data.astype(np.float64)
        where = features.indices
        np.add.at(self._stored, where, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            np.add.at(self._sum, where, values)
            np.add.at(self._squares, where, values * values)
        np.minimum.at(self._minimum, where, values)
        np.maximum.at(self._maximum, where, values)
        self._count += features.shape[0]

    def result(self) -> Statistics:
        """Statistics of the rows so far; all zero without rows."""
        count = max(1, self._count)
        mean = self._sum / count
        with np.errstate(over="ignore", invalid="ignore"):
            variance = np.maximum(self._squares / count - mean * mean, 0.0)
        has_zeros = self._stored < count
        minimum = np.where(has_zeros, np.minimum(self._minimum, 0.0), self._minimum)
        maximum = np.where(has_zeros, np.maximum(self._maximum, 0.0), self._maximum)
        return Statistics(
            count=self._count,
            mean=_mean(mean, minimum, maximum),
            std=_std(variance, minimum, maximum),
            minimum=tuple(minimum.tolist()),
            maximum=tuple(maximum.tolist()),
        )


def without_statistics(statistics: Statistics) -> int | None:
    """Return the first feature whose mean or deviation is beyond all numbers; None: no such one."""
    moments = np.array([statistics.mean, statistics.std])
    beyond = np.flatnonzero(~np.isfinite(moments).all(axis=0))
    return int(beyond[0]) if len(beyond) else None


def coarse_features(statistics: Statistics) -> list[tuple[int, float]]:
    """Return the features that float32 tells apart in steps which are large for how much they
    vary, and these steps: numbers such as times in seconds, far from zero and close together.

    One that float32 makes constant is among them from where it has no fractions on.
    """
    if not statistics.count or not statistics.mean:
        return []
    extremes = np.abs([statistics.minimum, statistics.maximum]).max(axis=0).astype(np.float32)
    steps = np.spacing(extremes).astype(np.float64)
    std = np.array(statistics.std)
    found = np.flatnonzero((steps > std / _STEPS_WANTED) & ((std > 0) | (steps > 1)))
    return [(int(feature), float(steps[feature])) for feature in found]


def _mean(mean: Float64, minimum: Float64, maximum: Float64) -> tuple[float, ...]:
    # That of a constant feature is rounded as well: what is left of it once it is centred would be
    # trained on. Adding 0 takes the sign of a zero away, which the order of the rows decides.
    found: list[float] = np.where(minimum == maximum, minimum + 0.0, mean).tolist()
    return tuple(found)


def _std(variance: Float64, minimum: Float64, maximum: Float64) -> tuple[float, ...]:
    # A constant feature's variance is rounding noise, and dividing by its root would blow it up.
    std: list[float] = np.where(minimum == maximum, 0.0, np.sqrt(variance)).tolist()
    return tuple(std)


def accumulator(features: int, sparse: bool) -> Accumulator:
    """The right accumulator for a data set."""
    if features > FEATURE_LIMIT:
        return CountOnly()
    return CsrStatistics(features) if sparse else DenseStatistics(features)


def mean_and_scale(statistics: Statistics, dtype: DTypeLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Standardised features are ``(features - mean) * scale``, with both arrays in ``dtype``.

    ``scale`` is 1 / std, and 1 for a feature that is constant in the train split. Computed in
    float64 and rounded once, so every process that standardises does it with the same bits.
    """
    mean = np.array(statistics.mean, dtype=np.float64)
    std = np.array(statistics.std, dtype=np.float64)
    scale = np.where(std > 0, 1.0 / np.where(std > 0, std, 1.0), 1.0)
    return mean.astype(dtype), scale.astype(dtype)


def standardise(features: Any, mean: NDArray[Any], scale: NDArray[Any]) -> None:
    """Standardises rows in place. Elementwise: a row's bits depend on no other row.

    Sparse rows are scaled and not centred, which would make them dense.
    """
    if isinstance(features, np.ndarray):
        np.subtract(features, mean, out=features)
        np.multiply(features, scale, out=features)
    else:
        features.data *= scale[features.indices]


def manifest_mean_and_scale(
    manifest: DatasetManifest, dtype: DTypeLike
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """``mean_and_scale`` of a data set; None where it is too wide to have statistics."""
    if len(manifest.statistics.mean) != manifest.features:
        return None
    return mean_and_scale(manifest.statistics, dtype)
