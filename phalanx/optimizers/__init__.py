"""Optimizers as root functions: elementwise, and bit-equal however the vector is cut."""

from phalanx.optimizers.base import (
    PIECE_ELEMENTS,
    Optimizer,
    build_local_optimizer,
    build_optimizer,
    gradient_limit,
    round_limit,
)
from phalanx.optimizers.contributions import (
    ContributionOptimizer,
    Late,
    build_contribution_optimizer,
)
from phalanx.optimizers.schedules import learning_rate

__all__ = [
    "PIECE_ELEMENTS",
    "ContributionOptimizer",
    "Late",
    "Optimizer",
    "build_contribution_optimizer",
    "build_local_optimizer",
    "build_optimizer",
    "gradient_limit",
    "learning_rate",
    "round_limit",
]
