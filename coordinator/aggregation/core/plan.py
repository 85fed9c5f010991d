"""What the plan of a job says about its rounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coordinator.aggregation.core.whole import HeldRound, LeavesRound
from phalanx.compressors import build_up_codec
from phalanx.optimizers import round_limit
from phalanx.reducers import build_reducer
from phalanx.rounds import Round, RoundSpec
from phalanx.v1 import job_spec_pb2, training_pb2
from phalanx.v1.training_pb2 import GoRecord

EVALUATION_VECTOR = "evaluation"
GRADIENT_VECTOR = "gradient"
PARAMETERS_VECTOR = "parameters"

TERMINAL_ACTIONS = (GoRecord.ACTION_PAUSE, GoRecord.ACTION_STOP, GoRecord.ACTION_FAIL)


AnyRound = Round | LeavesRound


class Rounds:
    """Makes the rounds of a job's ranges, of the parts that the job is composed of."""

    def __init__(self, plan: training_pb2.JobPlan) -> None:
        self._plan = plan
        spec = job_spec_pb2.JobSpec.FromString(plan.spec)
        self._reducer = build_reducer(spec.train, plan.shards)
        self._codec = build_up_codec(spec)
        self._clip_norm = round_limit(spec)
        self._spare = spec.train.synchronous.backup_shards

    def open(
        self, go: GoRecord, grid: list[tuple[int, int]], parameters: np.dtype[np.generic]
    ) -> AnyRound:
        """The round of a go record in a range of such `parameters`, cut as `grid`."""
        plan = self._plan
        if go.action == GoRecord.ACTION_EVALUATE:
            grid = [(0, len(plan.evaluation_sums))]
            return Round(
                self._spec(go, EVALUATION_VECTOR, plan.evaluation_shards, np.dtype("<f8"), grid)
            )
        if go.action == GoRecord.ACTION_INITIALISE:
            return Round(self._spec(go, PARAMETERS_VECTOR, 1, parameters, grid))
        spec = self.gradients(go, grid, parameters)
        if self._reducer is not None:
            return LeavesRound(spec, self._reducer, self._spare, self._clip_norm)
        return Round(spec) if self._clip_norm is None else HeldRound(spec, self._clip_norm)

    @property
    def clip_norm(self) -> float | None:
        """The longest norm of the mean gradient that is applied; None: no limit."""
        return self._clip_norm

    def gradients(
        self, go: GoRecord, grid: list[tuple[int, int]], parameters: np.dtype[np.generic]
    ) -> RoundSpec:
        """What contributions to the training look like under a go record."""
        spec = self._spec(go, GRADIENT_VECTOR, self._plan.shards, parameters, grid)
        return replace(spec, codec=self._codec, unit=self._plan.unit_span)

    def _spec(
        self,
        go: GoRecord,
        vector: str,
        width: int,
        dtype: np.dtype[np.generic],
        grid: list[tuple[int, int]],
    ) -> RoundSpec:
        bitwise = self._plan.bitwise
        return RoundSpec(go.version, go.round, go.action, vector, dtype, width, grid, bitwise)
