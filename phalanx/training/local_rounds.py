"""Rounds of training in the calling process: the tree, the wire and the update, without any of
the processes that have them on a cluster; see `phalanx.training.local`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Key, build_down_codec, build_up_codec, decoded, encoded
from phalanx.errors import FailedPrecondition, PhalanxError
from phalanx.models.base import buffer_mask, decay_mask
from phalanx.optimizers import Optimizer, build_optimizer, round_limit
from phalanx.privacy.noise import build_noise
from phalanx.reducers import Contribution, build_reducer
from phalanx.reduction import Node, TreeReducer, all_finite
from phalanx.training.leaf import LeafOutcome
from phalanx.training.two_rounds import step_of
from phalanx.updates import build_update
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan, Layout

Array = NDArray[Any]


def units_of(plan: JobPlan) -> list[range]:
    """Return the shards of each node whose contribution is one."""
    span = max(1, plan.unit_span)
    return [range(first, min(first + span, plan.shards)) for first in range(0, plan.shards, span)]


def failure(message: str, reason: str) -> PhalanxError:
    """Return what ends the job."""
    return FailedPrecondition(message, reason=reason)


class Tree:
    """The tree of one round: the vector, and count and loss beside it."""

    def __init__(self, width: int) -> None:
        self._vectors = TreeReducer(width)
        self._losses = TreeReducer(width)
        self._count = 0

    def count(self, shard: int, outcome: LeafOutcome, present: bool) -> None:
        """Count a leaf; an empty one, or one that is not finite, is an absent child."""
        self._losses.fill(Node(shard, 1), outcome.loss_sum if present else None, int(present))
        self._count += outcome.count if present else 0

    def fill(self, shards: range, vector: Array | None, payloads: Mapping[int, Any]) -> None:
        """Fill the node of these shards; `payloads` tells which of them are present."""
        span = 1 << (len(shards) - 1).bit_length()
        mask = sum(1 << each for each, payload in payloads.items() if payload is not None)
        self._vectors.fill(Node(shards.start, span), vector if mask else None, mask)

    def result(self) -> tuple[Array | None, int, float]:
        """Return the sum of the vectors, the count and the sum of the losses."""
        vector, _ = self._vectors.result
        loss, _ = self._losses.result
        return vector, self._count, 0.0 if loss is None else loss


class Wire:
    """What the one side sends, as the other one sees it."""

    def __init__(self, spec: JobSpec) -> None:
        self._up_codec = build_up_codec(spec)
        self._down_codec = build_down_codec(spec.train)
        #: By the first shard of a node: what its contributions have lost so far.
        self.residuals: dict[int, Array] = {}

    def seen(self, parameters: Array) -> Array:
        """A version as workers see it."""
        if self._down_codec is None:
            return parameters
        return decoded(self._down_codec, encoded(self._down_codec, parameters), len(parameters))

    def contribution(self, values: Array | None, first: int, version: int) -> Array | None:
        """A node's contribution as the root sees it."""
        if values is None or self._up_codec is None:
            return values
        if self._up_codec.feedback and first in self.residuals:
            values = values + self.residuals[first]
            if not all_finite(values):
                message = (
                    f"the sum of the node of shard {first} in step {version + 1} is not finite"
                )
                raise failure(f"{message}; lower the learning rate or check the data", "NON_FINITE")
        data = encoded(self._up_codec, values, Key(first, version))
        seen = decoded(self._up_codec, data, len(values))
        if self._up_codec.feedback:
            self.residuals[first] = values - seen
        return seen


class Updating:
    """What makes versions of contributions: the job's own update or its optimizer, and before it
    a reducer, noise, a limit of the norm."""

    def __init__(self, plan: JobPlan, spec: JobSpec, layout: Layout, secret: bytes) -> None:
        self._plan = plan
        self._update = build_update(plan)
        self._optimizer: Optimizer | None = None
        if self._update is None:
            self._optimizer = build_optimizer(spec.train, plan.total_steps)
        self._reducer = build_reducer(spec.train, plan.shards)
        self._clip_norm = round_limit(spec)
        self._noise = build_noise(plan, secret)
        self._decay, self._buffers = decay_mask(layout), buffer_mask(layout)
        count, dtype = layout.element_count, np.dtype(layout.dtype)
        self._next: Array = np.empty(count, dtype)
        names = self._optimizer.state_names if self._optimizer else ()
        #: By name: what the optimizer remembers.
        self.state: dict[str, Array] = {name: np.zeros(count, dtype) for name in names}

    @property
    def reduces_leaves(self) -> bool:
        """Whether contributions are wanted one by one, beside their sum."""
        return self._reducer is not None

    @property
    def draws_noise(self) -> bool:
        """Whether a version has noise, which is drawn by the secret of the job."""
        return self._noise is not None

    def apply(
        self,
        parameters: Array,
        gradient: Array | None,
        count: int,
        leaves: dict[int, Contribution],
        version: int,
    ) -> Array:
        """Return the next version, of what the tree has summed or of the leaves by themselves.

        `parameters` are taken as room for the version after it.
        """
        divisor = count
        if self._reducer is not None:
            reduced = self._reducer.reduce(leaves)
            gradient = None if reduced is None else reduced.pieces[0]
            divisor = 0 if reduced is None else reduced.divisor
        if self._noise is not None:
            gradient = self._noise.added(gradient, 0, len(parameters), version, parameters.dtype)
            divisor = self._noise.divisor
        if gradient is None:
            return parameters
        self._make_next(parameters, gradient, divisor, version)
        if not all_finite(self._next):
            message = (
                f"step {step_of(self._plan, version) + 1} made parameters that are not finite; "
                "lower the learning rate or check the data"
            )
            raise failure(message, "PARAMETERS_NON_FINITE")
        newest, self._next = self._next, parameters
        return newest

    def _make_next(self, parameters: Array, gradient: Array, divisor: int, version: int) -> None:
        factor = Contribution([gradient], divisor).factor(self._clip_norm)
        if factor != 1.0:
            gradient = gradient * gradient.dtype.type(factor)
        if self._update is not None:
            self._next = self._update.apply(parameters, gradient, divisor, version)
            return
        assert self._optimizer is not None
        self._optimizer.apply(
            parameters,
            gradient,
            divisor,
            self._decay,
            self.state,
            version,
            self._next,
            buffers=self._buffers,
        )
