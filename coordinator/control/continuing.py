"""A job that goes on from another one: which checkpoint it takes over, and what it keeps of it."""

from __future__ import annotations

from coordinator.control.core.facts import JobFacts
from coordinator.control.core.state import Core
from coordinator.control.store import Store
from phalanx import specs
from phalanx.errors import NotFound, Violation
from phalanx.v1 import job_spec_pb2
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import Continued, JobSubmitted

_FIELD = "train.start.job"


async def continue_from(spec: job_spec_pb2.JobSpec, core: Core, store: Store) -> Continued:
    """Return what a job takes over, and write down in its spec which step that is of.

    Raises NotFound (no such job or checkpoint), InvalidArgument (its spec is another), Unavailable.
    """
    job_id, step = specs.parse_reference(spec.train.start.job)
    other = core.facts.jobs.get(job_id)
    if other is None:
        message = f"there is no job {job_id!r}; `phalanx jobs` shows what there is"
        raise NotFound(message, reason="JOB_NOT_FOUND", violations=[Violation(_FIELD, message)])
    specs.check_same(spec, other.spec, job_id)
    listing = pb.ListCheckpointsRequest(job_id=job_id)
    listed = await store.call(store.storage.ListCheckpoints, listing)
    manifest = _chosen(list(listed.checkpoints), job_id, step)
    spec.train.start.job = f"{job_id}@{manifest.step}"
    return Continued(checkpoint=manifest, aggregator_fingerprint=other.aggregator_fingerprint)


def keep_cut_and_bits(submitted: JobSubmitted, core: Core) -> None:
    """Cut the ranges as they were, and let those compute who give the bits that it began with."""
    checkpoint, plan = submitted.continued.checkpoint, submitted.plan
    plan.range_count = checkpoint.range_count
    other: JobFacts | None = core.facts.jobs.get(checkpoint.job_id)
    if other is not None and other.bit_identical and plan.bitwise:
        plan.fingerprint = other.fingerprint


def _chosen(
    checkpoints: list[pb.CheckpointManifest], job_id: str, step: int | None
) -> pb.CheckpointManifest:
    """Return the checkpoint at a step, or the newest. Raises NotFound."""
    for manifest in checkpoints:
        if step is None or manifest.step == step:
            return manifest
    steps = ", ".join(str(each.step) for each in checkpoints)
    there = f"only at step {steps}" if steps else "none yet"
    message = f"job {job_id} has no checkpoint{'' if step is None else f' at step {step}'}: {there}"
    raise NotFound(message, reason="CHECKPOINT_NOT_FOUND", violations=[Violation(_FIELD, message)])
