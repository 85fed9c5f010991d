"""A job that goes on from another one: which checkpoint it takes over, and what it keeps of it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from coordinator.control.core.facts import JobFacts
from coordinator.control.core.state import Core
from coordinator.control.store import Store
from phalanx import specs
from phalanx.errors import DataLoss, InvalidArgument, NotFound, Violation, no_job
from phalanx.keys.caller import current_caller
from phalanx.training.asynchronous import NO_LIMIT, completed_steps
from phalanx.training.two_rounds import rounds_per_step
from phalanx.v1 import job_spec_pb2
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import Continued, JobSubmitted
from phalanx.v1.training_pb2 import JobPlan

_FIELD = "train.start.job"


@dataclass(frozen=True)
class Origin:
    """What a job goes on from, as it was at one moment: the other one may be deleted meanwhile."""

    continued: Continued
    plan: JobPlan

    def take_over(self, submitted: JobSubmitted) -> None:
        """Cut ranges and states as they were, and let those compute who give the same bits.

        Raises InvalidArgument where nothing is left to do, or what was done would not be the same.
        """
        checkpoint, plan = self.continued.checkpoint, submitted.plan
        _check_counts(checkpoint, plan)
        specs.check_rest(
            submitted.spec.train,
            plan.total_steps,
            self.plan.total_steps,
            specs.Reached(checkpoint.job_id, checkpoint.step, _elapsed_s(checkpoint)),
        )
        plan.range_count = checkpoint.range_count
        # Otherwise it follows from the checkpoints that the spec asks for, and they may be others.
        plan.state_every = self.plan.state_every
        if plan.bitwise and not self.continued.bit_identity_lost:
            plan.fingerprint = self.plan.fingerprint
            if self.plan.HasField("equipment"):
                plan.equipment.CopyFrom(self.plan.equipment)
        submitted.continued.CopyFrom(self.continued)


async def find_origin(spec: job_spec_pb2.JobSpec, core: Core, store: Store) -> Origin:
    """Return what a job takes over, and write down in its spec which step that is of.

    Raises NotFound (no such job or checkpoint), InvalidArgument (its spec is another), Unavailable.
    """
    job_id, step = specs.parse_reference(spec.train.start.job)
    other = core.facts.jobs.get(job_id)
    if other is None or not current_caller().may_act_in(other.spec.namespace):
        raise no_job(job_id, _FIELD)
    specs.check_same(spec, other.spec, job_id)
    listing = pb.ListCheckpointsRequest(job_id=job_id)
    listed = await store.call(store.storage.ListCheckpoints, listing)
    manifest = choose(other, list(listed.checkpoints), step)
    spec.train.start.job = f"{job_id}@{manifest.step}"
    return origin_of(other, manifest)


def origin_of(other: JobFacts, manifest: pb.CheckpointManifest) -> Origin:
    """Return what there is to take over of a job with one of its checkpoints."""
    plan = JobPlan()
    plan.CopyFrom(other.plan)
    continued = Continued(
        checkpoint=manifest,
        leaf_sha256=other.leaf_sha256,
        bit_identity_lost=other.plan.bitwise and not other.bit_identical,
    )
    if not continued.bit_identity_lost:
        continued.aggregator_fingerprint = other.aggregator_fingerprint
    return Origin(continued, plan)


def choose(
    other: JobFacts, checkpoints: list[pb.CheckpointManifest], step: int | None
) -> pb.CheckpointManifest:
    """Return the checkpoint at a step, or the newest. Raises NotFound.

    Where nodes have a state, the last one of a finished job is without: a job begins at the one
    before and computes the steps since once more.
    """
    whole = [each for each in checkpoints if not (each.final and other.plan.state_every)]
    for manifest in whole:
        if step is None or manifest.step == step:
            return manifest
    steps = ", ".join(str(each.step) for each in whole)
    message = (
        f"job {other.job_id} has no checkpoint{'' if step is None else f' at step {step}'}: "
        f"{f'only at step {steps}' if steps else 'none yet'}"
    )
    if len(whole) < len(checkpoints):
        message = (
            f"job {other.job_id} has no checkpoint{'' if step is None else f' at step {step}'} to "
            f"go on from: {f'only at step {steps}' if steps else 'none'}, as the last one of a "
            "finished job does not keep what its shards have kept back (checkpoints.every_steps)"
        )
    raise NotFound(message, reason="CHECKPOINT_NOT_FOUND", violations=[Violation(_FIELD, message)])


def gone(checkpoint: pb.CheckpointManifest) -> NotFound:
    """Return the error for a checkpoint that was replaced before it could be pinned."""
    message = (
        f"the checkpoint at step {checkpoint.step} of {checkpoint.job_id} was removed meanwhile; "
        "submit again for the newest one"
    )
    return NotFound(message, reason="CHECKPOINT_NOT_FOUND", violations=[Violation(_FIELD, message)])


def _check_counts(checkpoint: pb.CheckpointManifest, plan: JobPlan) -> None:
    """Refuse what cannot be counted on from: owners of ranges would find out only later."""
    job_id, step = checkpoint.job_id, checkpoint.step
    counted = step * max(1, plan.local_steps) * (plan.shards if plan.asynchronous else 1)
    counted *= rounds_per_step(plan)
    message = ""
    if not 0 <= counted < NO_LIMIT:
        message = f"is at step {step} of {job_id}, further than steps are counted"
    elif plan.asynchronous:
        try:
            completed_steps(checkpoint.root_state, plan.shards, step)
        except DataLoss as error:
            message = f"cannot be gone on from: {error.message}"
    if message:
        message += "; name another of its checkpoints, or take over a model with train.start.model"
        raise InvalidArgument(f"{_FIELD} {message}", violations=[Violation(_FIELD, message)])


def _elapsed_s(checkpoint: pb.CheckpointManifest) -> float:
    try:
        return float(json.loads(checkpoint.root_state)["elapsed_s"])
    except (ValueError, KeyError, TypeError) as error:
        message = f"the checkpoint at step {checkpoint.step} does not say how long the job has run"
        raise InvalidArgument(
            f"{message}: {error!r}", violations=[Violation(_FIELD, message)]
        ) from error
