"""Root functions: what is done with a reduced frame. An optimizer is one kind.

A round reduces a named vector over shards; its root function consumes the frames as they become
complete, in any order. `OptimizerRoot` and `AssignRoot` turn each into the same frame of the next
parameter version, at once; `UpdateRoot` makes all of them of all of them; `SumRoot` keeps the
reduced vector for the root's decision.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.core.state import RangeParameters
from phalanx.privacy.noise import GradientNoise
from phalanx.reduction import all_finite
from phalanx.rounds import Totals


class NonFiniteResult(Exception):
    """A reduced frame, or what was made of it, holds NaN or infinity."""


class RootFunction(Protocol):
    """Consumes the reduced frames of one round of one range."""

    def frame_complete(
        self, index: int, values: NDArray[np.generic] | None, totals: Totals
    ) -> bool:
        """Take reduced frame `index` (None: no shard present). True: it made a parameter frame.

        Raises `NonFiniteResult` where finite contributions overflowed.
        """
        ...


class AssignRoot:
    """INITIALISE: the reduced vector is version 0."""

    def __init__(self, parameters: RangeParameters, version: int) -> None:
        self._parameters = parameters
        self._version = version

    def frame_complete(
        self, index: int, values: NDArray[np.generic] | None, totals: Totals
    ) -> bool:
        """Publish the frame as it came."""
        if values is None:
            raise NonFiniteResult("the initial parameters are missing: shard 0 sent none")
        require_finite(values, "the initial parameters are not finite")
        self._parameters.versions.publish(self._version, index, values)
        return True


class OptimizerRoot:
    """TRAIN: the optimizer makes version v + 1 from version v and the mean gradient.

    In a private job the `noise` is added before, whatever came, and the divisor is its own.
    """

    def __init__(
        self, parameters: RangeParameters, version: int, noise: GradientNoise | None = None
    ) -> None:
        self._parameters = parameters
        self._version = version
        self._noise = noise

    def frame_complete(
        self, index: int, values: NDArray[np.generic] | None, totals: Totals
    ) -> bool:
        """Apply the frame; without any example the parameters stay as they are."""
        divisor = totals.divisor
        if self._noise is not None:
            values, divisor = self._with_noise(self._noise, index, values), self._noise.divisor
        if values is None or divisor == 0:
            self._parameters.keep(index, self._version)
            return True
        updated = self._parameters.apply(index, self._version, values, divisor)
        require_finite(
            updated,
            f"step {self._version + 1} made parameters that are not finite; "
            "lower the learning rate or check the data",
        )
        self._parameters.versions.publish(self._version + 1, index, updated)
        return True

    def _with_noise(
        self, noise: GradientNoise, index: int, values: NDArray[np.generic] | None
    ) -> NDArray[np.generic]:
        parameters = self._parameters
        first, count = parameters.grid[index]
        first += parameters.piece.first_element
        return noise.added(values, first, count, self._version, parameters.dtype)


class UpdateRoot:
    """TRAIN where version v + 1 needs all of the sums: nothing is made before the last frame.

    ``step`` is the job's, for messages.
    """

    def __init__(self, parameters: RangeParameters, version: int, step: int) -> None:
        self._parameters = parameters
        self._version = version
        self._step = step
        self._sums: dict[int, NDArray[np.generic] | None] = {}

    def frame_complete(
        self, index: int, values: NDArray[np.generic] | None, totals: Totals
    ) -> bool:
        """Keep the frame; with the last one make the version. Without any example it is as it
        was."""
        parameters, version = self._parameters, self._version
        self._sums[index] = values
        if len(self._sums) < len(parameters.grid):
            return False
        sums = [each for _, each in sorted(self._sums.items()) if each is not None]
        if len(sums) < len(parameters.grid) or totals.divisor == 0:
            for each in range(len(parameters.grid)):
                parameters.keep(each, version)
            return True
        updated = parameters.update(version, sums, totals.divisor)
        require_finite(
            updated,
            f"step {self._step + 1} made parameters that are not finite; check the data, and the "
            "learning rate if there is one",
        )
        for each, (first, count) in enumerate(parameters.grid):
            parameters.versions.publish(version + 1, each, updated[first : first + count])
        return True


class SumRoot:
    """EVALUATE and other statistics: keeps the reduced vector, whole at the round's end."""

    def __init__(self, grid: list[tuple[int, int]], dtype: np.dtype[np.generic], what: str) -> None:
        self._grid = grid
        self._what = what
        self.result: NDArray[np.generic] = np.zeros(sum(count for _, count in grid), dtype)

    def frame_complete(
        self, index: int, values: NDArray[np.generic] | None, totals: Totals
    ) -> bool:
        """Keep the frame; absent shards add nothing."""
        if values is not None:
            require_finite(values, f"the sums of {self._what} are not finite")
            first, count = self._grid[index]
            self.result[first : first + count] = values
        return False


def require_finite(values: NDArray[np.generic], message: str) -> None:
    """Raise `NonFiniteResult` with `message` if any element is NaN or infinite."""
    if not all_finite(values):
        raise NonFiniteResult(message)
