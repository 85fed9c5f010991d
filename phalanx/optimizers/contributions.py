"""Updates by one shard's contribution, computed on parameters that have changed meanwhile.

The staleness τ of a contribution is the number of versions that were made after the one that it has
read. What is done about it is a rule of its own, before the optimizer: nothing, a learning rate
divided by τ (Zhang et al., "Staleness-aware async-SGD", 2016), or a gradient corrected to first
order for the change of the parameters (Zheng et al., "Asynchronous stochastic gradient descent with
delay compensation", 2017, the adaptive form). All are elementwise, so the bits do not depend on how
the vector is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.optimizers.base import Optimizer, build_optimizer
from phalanx.v1 import job_spec_pb2

Array = NDArray[Any]

MEAN_SQUARE = "delay_mean_square"
_DECAY = 0.95
_EPSILON = 1e-7


@dataclass(frozen=True)
class Late:
    """How a contribution relates to the version that it is applied to."""

    #: Step of the job, by which the learning rate is scheduled.
    step: int
    #: Contributions applied before this one.
    update: int
    #: Versions made since the one that the contribution has read.
    staleness: int


class ContributionOptimizer:
    """An optimizer for contributions that are applied one by one; for one thread at a time.

    Attributes:
        state_names: those of the optimizer, and of the rule for staleness.
    """

    def __init__(self, optimizer: Optimizer, *, scaled: bool, strength: float | None) -> None:
        """`strength` is that of the delay compensation; None: none."""
        self._optimizer = optimizer
        self._scaled = scaled
        self._strength = strength
        own = () if strength is None else (MEAN_SQUARE,)
        self.state_names = (*optimizer.state_names, *own)

    def apply_late(
        self,
        parameters: Array,
        gradient_sum: Array,
        count: int,
        decay: Array | None,
        state: Mapping[str, Array],
        late: Late,
        read: Array,
        out: Array,
        buffers: Array | None = None,
    ) -> None:
        """Write the next version to ``out``; update ``state`` in place.

        Args:
            parameters: (n,) the newest version; never written.
            gradient_sum: (n,) sum over ``count`` examples, at ``read``; never written.
            count: number of examples, 1 or more.
            decay: (n,) bool, where L2 and weight decay act; None: nowhere.
            state: name → (n,) vector.
            late: how old ``read`` is.
            read: (n,) the version that the contribution was computed at.
            out: (n,), may not overlap the inputs.
            buffers: (n,) bool, as for ``Optimizer.apply``; what they become is not corrected.
        """
        own = dict(state)
        if self._strength is not None:
            mean_square = own.pop(MEAN_SQUARE)
            corrected = self._compensated(parameters, gradient_sum, count, mean_square, read)
            if buffers is not None:
                n = corrected.dtype.type(count)
                np.divide(gradient_sum, n, out=corrected, where=buffers)
            gradient_sum, count = corrected, 1
        scale = 1.0 / max(1, late.staleness) if self._scaled else 1.0
        self._optimizer.apply(
            parameters,
            gradient_sum,
            count,
            decay,
            own,
            late.step,
            out,
            update=late.update,
            rate_scale=scale,
            buffers=buffers,
        )

    def _compensated(
        self, parameters: Array, gradient_sum: Array, count: int, mean_square: Array, read: Array
    ) -> Array:
        """g + λ/√(MS + ε) · g ⊙ g ⊙ (w - w_read), where MS is the running mean of g²."""
        real = parameters.dtype.type
        with np.errstate(all="ignore"):  # the caller looks whether the result is finite
            mean = gradient_sum / real(count)
            squares = mean * mean
            mean_square *= real(_DECAY)
            mean_square += squares * real(1.0 - _DECAY)
            weight = real(self._strength) / np.sqrt(mean_square + real(_EPSILON))
            compensated: Array = mean + weight * squares * (parameters - read)
        return compensated


def build_contribution_optimizer(
    train: job_spec_pb2.Train, total_steps: int
) -> ContributionOptimizer:
    """Return what applies contributions one by one; ``total_steps`` are steps of the job.

    Stale-bounded training takes the default rule: the learning rate divided by the staleness.
    """
    kind = train.asynchronous.WhichOneof("staleness") if train.HasField("asynchronous") else None
    strength = None
    if kind == "delay_compensated":
        strength = train.asynchronous.delay_compensated.strength
    optimizer = build_optimizer(train, total_steps)
    return ContributionOptimizer(optimizer, scaled=kind in (None, "scaled"), strength=strength)
