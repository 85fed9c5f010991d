"""Standardisation of dense features: the one function that training and prediction share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Standardiser:
    """``(features - mean) * scale`` with the statistics of the train split.

    Attributes:
        mean: (features,) in the dtype of the features.
        scale: (features,) 1 / standard deviation, and 1 for a constant feature.
    """

    mean: NDArray[Any]
    scale: NDArray[Any]

    def apply(self, features: NDArray[Any]) -> None:
        """Standardise (rows, features) in place. Elementwise: the bits depend on no other row."""
        np.subtract(features, self.mean, out=features)
        np.multiply(features, self.scale, out=features)
