"""What the plan of a job says about its rounds."""

from __future__ import annotations

import numpy as np

from coordinator.aggregation.core.rounds import Round, RoundSpec
from coordinator.aggregation.core.whole import LeavesRound
from phalanx.reducers import build_reducer
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
        train = job_spec_pb2.JobSpec.FromString(plan.spec).train
        self._reducer = build_reducer(train.reduction, plan.shards)

    def open(
        self, go: GoRecord, grid: list[tuple[int, int]], parameters: np.dtype[np.generic]
    ) -> AnyRound:
        """The round of a go record in a range of such `parameters`, cut as `grid`."""
        spec = round_spec(self._plan, go, grid, parameters)
        if go.action == GoRecord.ACTION_TRAIN and self._reducer is not None:
            return LeavesRound(spec, self._reducer)
        return Round(spec)


def round_spec(
    plan: training_pb2.JobPlan,
    go: GoRecord,
    grid: list[tuple[int, int]],
    parameters: np.dtype[np.generic],
) -> RoundSpec:
    """What the round of a go record reduces in a range of such `parameters`, cut as `grid`."""
    if go.action == GoRecord.ACTION_EVALUATE:
        sums = len(plan.evaluation_sums)
        return RoundSpec(
            go.version, go.round, go.action, EVALUATION_VECTOR, np.dtype("<f8"),
            plan.evaluation_shards, [(0, sums)], plan.bitwise,
        )  # fmt: skip
    initialise = go.action == GoRecord.ACTION_INITIALISE
    return RoundSpec(
        go.version, go.round, go.action,
        PARAMETERS_VECTOR if initialise else GRADIENT_VECTOR, parameters,
        1 if initialise else plan.shards, grid, plan.bitwise,
    )  # fmt: skip


def expected_examples(plan: training_pb2.JobPlan, version: int) -> int:
    """Examples that the sampler gives to the step at `version`, over all shards.

    Shards differ by one row at most, and each gives `rows_per_leaf` rows until it runs out in the
    last step of an epoch.
    """
    step_in_epoch = version % max(plan.steps_per_epoch, 1)
    small, larger = divmod(plan.train_rows, plan.shards)
    skipped = step_in_epoch * plan.rows_per_leaf

    def leaf_rows(shard_rows: int) -> int:
        return min(max(shard_rows - skipped, 0), plan.rows_per_leaf)

    return larger * leaf_rows(small + 1) + (plan.shards - larger) * leaf_rows(small)
