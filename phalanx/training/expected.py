"""How many examples the sampler gives to a step, for the ledger of what was lost or doubled."""

from __future__ import annotations

from functools import lru_cache

from phalanx.privacy.settings import is_private, sampling_rate
from phalanx.training.two_rounds import row_shards
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec, Train


def expected_examples(plan: training_pb2.JobPlan, step: int) -> int:
    """Examples that the sampler gives to a step of the job, over all shards.

    Shards differ by one row at most, and each gives `rows_per_leaf` rows until it runs out in the
    last step of an epoch. With local steps a step of the job is several of each shard. Where shards
    are groups of columns, all of them see the rows of one. In a private job each row of each shard
    comes by chance, so the sampler is asked again.
    """
    if is_private(_train(plan.spec)):
        return sum(expected_of_shard(plan, shard, step) for shard in range(plan.shards))
    each = max(1, plan.local_steps)
    return sum(_examples_of(plan, own) for own in range(step * each, (step + 1) * each))


def expected_of_shard(plan: training_pb2.JobPlan, shard: int, step: int) -> int:
    """Examples that the sampler gives to one step of one shard."""
    shard, shards = (0, 1) if plan.by_columns else (shard, plan.shards)
    first, stop = (each * plan.train_rows // shards for each in (shard, shard + 1))
    train = _train(plan.spec)
    if is_private(train):
        from phalanx.training.chance import drawn_rows  # the SDK is without arrays

        rate = sampling_rate(train, plan.train_rows)
        return len(drawn_rows(plan.sampler_key, shard, stop - first, step, rate))
    skipped = step % max(plan.steps_per_epoch, 1) * plan.rows_per_leaf
    return min(max(stop - first - skipped, 0), plan.rows_per_leaf)


def _examples_of(plan: training_pb2.JobPlan, step: int) -> int:
    step_in_epoch = step % max(plan.steps_per_epoch, 1)
    shards = row_shards(plan)
    small, larger = divmod(plan.train_rows, shards)
    skipped = step_in_epoch * plan.rows_per_leaf

    def leaf_rows(shard_rows: int) -> int:
        return min(max(shard_rows - skipped, 0), plan.rows_per_leaf)

    return larger * leaf_rows(small + 1) + (shards - larger) * leaf_rows(small)


@lru_cache(maxsize=16)
def _train(spec: bytes) -> Train:
    return JobSpec.FromString(spec).train
