"""Which rows a shard has, for messages that name it."""

from __future__ import annotations

from phalanx.specs.balance import by_class
from phalanx.v1 import job_spec_pb2, training_pb2


def rows_of_shard(plan: training_pb2.JobPlan, shard: int, evaluation: bool) -> tuple[int, int]:
    """First row and number of rows of a shard within its split.

    All rows where shards are groups of columns. No row where the shard's rows are dealt out by
    class and lie apart.
    """
    if not evaluation and by_class(job_spec_pb2.JobSpec.FromString(plan.spec).data):
        return 0, 0
    if plan.by_columns and not evaluation:
        return 0, plan.train_rows
    rows = plan.evaluation_rows if evaluation else plan.train_rows
    shards = max(1, plan.evaluation_shards if evaluation else plan.shards)
    first = shard * rows // shards
    return first, (shard + 1) * rows // shards - first
