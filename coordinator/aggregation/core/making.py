"""Makes the ranges of a job, of whichever kind it needs."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.aggregation.core.asynchronous import AsynchronousRanges
from coordinator.aggregation.core.backups import BackupRanges
from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.core.stateful import StatefulRanges
from coordinator.aggregation.core.two_rounds import TwoRoundRanges, VerifiedTwoRoundRanges
from coordinator.aggregation.core.verified import VerifiedRanges
from phalanx.optimizers import build_contribution_optimizer, build_optimizer
from phalanx.privacy.noise import build_noise
from phalanx.specs import parts
from phalanx.training.decisions import RootDecider
from phalanx.updates import build_update
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan, ParameterRange


def make_ranges(
    plan: JobPlan,
    term: int,
    owned: Sequence[ParameterRange],
    secret: int = 0,
    noise_secret: bytes = b"",
    seal_key: bytes = b"",
) -> JobRanges:
    """Return the `owned` ranges of a job in one term.

    By the `secret`, of 128 bits, contributions are drawn for an audit: who computes them must not
    know it. Of the `noise_secret` the noise of a private job is made: it is that of the job, the
    same in every term. With the `seal_key` what the root decides is sealed. Raises
    FailedPrecondition where a private job comes without its secret.
    """
    ranges = _made(plan, term, owned, secret, noise_secret)
    ranges.seal_with(seal_key)
    return ranges


def _made(
    plan: JobPlan, term: int, owned: Sequence[ParameterRange], secret: int, noise_secret: bytes
) -> JobRanges:
    train = JobSpec.FromString(plan.spec).train
    decider = RootDecider(plan, term) if owned[0].index == 0 else None
    if plan.asynchronous:
        late = build_contribution_optimizer(train, plan.total_steps)
        return AsynchronousRanges(plan, term, owned, late, decider)
    update = build_update(plan)
    optimizer = build_optimizer(train, plan.total_steps) if update is None else update
    noise = build_noise(plan, noise_secret)
    if plan.by_columns:
        if plan.verified:
            return VerifiedTwoRoundRanges(plan, term, owned, optimizer, decider, secret)
        return TwoRoundRanges(plan, term, owned, optimizer, decider)
    if plan.verified:
        return VerifiedRanges(plan, term, owned, optimizer, decider, secret, noise)
    if noise is not None:
        return JobRanges(plan, term, owned, optimizer, decider, noise)
    kind: type[JobRanges] = StatefulRanges if plan.state_every else JobRanges
    if parts.backup_shards(train):
        kind = BackupRanges
    return kind(plan, term, owned, optimizer, decider)
