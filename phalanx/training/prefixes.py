"""The first steps of a training, from which another process goes on to the same bits.

Leaves are functions of the parameters, the step and the seed, so nothing else of the rows, the
sampler or the random numbers has to be kept: what optimizers and nodes remember, and what the root
has decided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

PARAMETERS, OPTIMIZER, RESIDUALS, INNER = "parameters", "optimizer", "residuals", "inner"


@dataclass(frozen=True)
class Prefix:
    """What a training is after some of its steps: vectors by name, and the state of the root as
    JSON."""

    arrays: Mapping[str, NDArray[Any]]
    root: str
