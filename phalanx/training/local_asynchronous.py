"""Contributions that commit one by one, inside the calling process.

Without a log the shards take turns, so that each contribution has read the newest version. With the
log of a run on a cluster the versions are read and applied in the order of that run, which gives
the same parameters, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import FailedPrecondition
from phalanx.models.base import buffer_mask, decay_mask
from phalanx.optimizers import Late, build_contribution_optimizer, gradient_limit
from phalanx.reducers import Contribution
from phalanx.reduction import all_finite
from phalanx.training.asynchronous import Clocks, StepSums, stale_bound
from phalanx.training.leaf import LeafOutcome
from phalanx.training.replay import ReplayLog
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan, Layout

Array = NDArray[Any]

RunLeaf = Callable[[Array, int, int, Array], "LeafOutcome | None"]
"""(parameters, shard, step of the shard, out) → outcome; None: left out, as the spec says."""


class AsynchronousSteps:
    """Steps of a job, each of as many commits as it has shards."""

    def __init__(
        self, plan: JobPlan, layout: Layout, parameters: Array, replay: ReplayLog | None
    ) -> None:
        """`parameters` tell the length and type of the vectors; `replay` is the log to follow."""
        train = JobSpec.FromString(plan.spec).train
        self._shards = plan.shards
        self._optimizer = build_contribution_optimizer(train, plan.total_steps)
        self._clip_norm = gradient_limit(train)
        self._clocks = Clocks(plan.shards, stale_bound(train))
        self._decay, self._buffers = decay_mask(layout), buffer_mask(layout)
        self._replay = replay
        self._last_reads = replay.last_reads() if replay is not None else {}
        self._kept: dict[int, Array] = {}
        self._state = {name: np.zeros_like(parameters) for name in self._optimizer.state_names}

    def run(
        self,
        parameters: Array,
        limit: int,
        seen: Callable[[Array], Array],
        leaf: RunLeaf,
        received: Callable[[Array, int, int], Array],
    ) -> tuple[Array, StepSums]:
        """Make one step of the job: the parameters after it, and its sums.

        Args:
            parameters: (n,) the newest version; not written to.
            limit: the step that no shard may start yet.
            seen: what a worker sees of a version.
            leaf: runs one leaf.
            received: what the root sees of the contribution of a shard in one of its steps.
        """
        self._clocks.limit = limit
        sums, out = StepSums(), np.empty_like(parameters)
        for _ in range(self._shards):
            version = self._clocks.total
            self._keep(version, parameters)
            shard, read_version = self._next(version)
            step, read = self._clocks.step_of(shard), self._kept[read_version]
            outcome = leaf(seen(read), shard, step, out)
            count, loss = (0, 0.0) if outcome is None else (outcome.count, outcome.loss_sum)
            if count:
                late = Late(version // self._shards, version, version - read_version)
                parameters = self._apply(parameters, received(out, shard, step), count, late, read)
            self._clocks.commit(shard, step)
            sums.add(count, loss, version - read_version)
            self._forget(version)
        return parameters, sums

    def _next(self, version: int) -> tuple[int, int]:
        """Whose contribution commits next, and which version it has read."""
        if self._replay is not None:
            if version >= len(self._replay):
                raise FailedPrecondition(
                    f"the replay log ends after {len(self._replay)} commits, and the job does not",
                    reason="REPLAY_LOG_ENDS",
                )
            return self._replay.commit(version)
        shard = self._clocks.first_of(range(self._shards))
        assert shard is not None, "the shard that is furthest behind may always start"
        return shard, version

    def _keep(self, version: int, parameters: Array) -> None:
        if self._replay is None:
            self._kept = {version: parameters}
        elif version in self._last_reads:
            self._kept[version] = parameters

    def _forget(self, commit: int) -> None:
        """Let versions go that no later commit has read."""
        for version in [kept for kept in self._kept if self._last_reads.get(kept, -1) <= commit]:
            del self._kept[version]

    def _apply(
        self, parameters: Array, gradient: Array, count: int, late: Late, read: Array
    ) -> Array:
        factor = Contribution([gradient], count).factor(self._clip_norm)
        if factor != 1.0:
            gradient = gradient * gradient.dtype.type(factor)
        following = np.empty_like(parameters)
        self._optimizer.apply_late(
            parameters,
            gradient,
            count,
            self._decay,
            self._state,
            late,
            read,
            following,
            self._buffers,
        )
        if not all_finite(following):
            raise FailedPrecondition(
                f"update {late.update + 1} made parameters that are not finite; "
                "lower the learning rate or check the data",
                reason="PARAMETERS_NON_FINITE",
            )
        return following
