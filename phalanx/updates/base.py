"""What an update is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


class Update(ABC):
    """Makes a version of the whole vector from the one before and the sum of all contributions.

    A pure function of its arguments. It runs in the aggregator between two steps, which wait for
    it, and while it runs no other job's step is reduced there: what takes long belongs into a leaf.
    """

    @abstractmethod
    def apply(self, parameters: Array, total: Array, count: int, version: int) -> Array:
        """Return the parameters of ``version + 1``.

        Args:
            parameters: (n,) those of ``version``; never written.
            total: (n,) the sum of the contributions; may be written and returned.
            count: examples that contributed, 1 or more.
            version: from 0.
        """
