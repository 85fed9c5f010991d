"""Computing a finished job again, without its cluster."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.errors import FailedPrecondition, NotFound
from phalanx.sdk.in_process import IN_PROCESS, job_code
from phalanx.sdk.job import Job
from phalanx.sdk.methods import LIST_CHECKPOINTS
from phalanx.tasks import is_task_set

if TYPE_CHECKING:
    from phalanx.sdk.cluster import Cluster
    from phalanx.training.replay import ReplayLog
    from phalanx.v1.job_spec_pb2 import JobSpec
    from phalanx.v1.training_pb2 import JobPlan


@dataclass(frozen=True)
class Verdict:
    """Both hashes of the parameters."""

    job_id: str
    steps: int
    cluster_sha256: str
    local_sha256: str
    bit_identical: bool
    #: An asynchronous job, computed again in the order that its log tells.
    replayed: bool = False

    @property
    def equal(self) -> bool:
        """Whether this process computed the same bits."""
        return self.cluster_sha256 == self.local_sha256

    @property
    def explanation(self) -> str:
        """Why the hashes may differ."""
        if self.replayed:
            return (
                "the order of the contributions is that of the log, so either this machine's "
                "processor or library versions have another numeric fingerprint, or the workers' "
                "differed, or the job's code is not a pure function of its arguments"
            )
        if not self.bit_identical:
            return "the job ran on workers with different numeric fingerprints, as its model says"
        return (
            "either this machine's processor or library versions have another numeric fingerprint "
            "(`phalanx workers --json` shows the workers'), or the job's code is not a pure "
            "function of its arguments, or something is broken"
        )

    def to_json(self) -> dict[str, object]:
        """Return the JSON of ``--json``."""
        return {
            "job_id": self.job_id,
            "steps": self.steps,
            "cluster_sha256": self.cluster_sha256,
            "local_sha256": self.local_sha256,
            "equal": self.equal,
        }


def verify_job(cluster: Cluster, job_id: str) -> Verdict:
    """Compute a job again in this process and return both hashes.

    Downloads the chunks that the job reads. An asynchronous job is replayed in the order of its
    log, and a job that went on from another one is computed from the very beginning. Raises
    FailedPrecondition unless the job has succeeded, where it has no log or its origin is gone, and
    where nobody wrote down what its parameters depend on, or it has none.
    """
    from phalanx.data.manifest import DatasetManifest
    from phalanx.specs import job_plan
    from phalanx.training.local import train_in_process

    job = cluster.get(job_id)
    if job.result is None:
        raise FailedPrecondition(
            f"job {job_id} is {job.state}; only a job that has succeeded can be verified"
        )
    _demand_all_is_known(job, in_process=cluster.backend.address == IN_PROCESS)
    spec = job.message.spec
    dataset = cluster.data.get(spec.data.name)
    plan = job_plan(spec, dataset, job_id)
    until_step = None
    if spec.train.start.job or spec.train.stop.HasField("wall_time"):
        # Its steps follow from more than its own rules: those of another job, or a clock.
        until_step = job.result.steps if job.result.best is None else job.result.best.step
        _forget_stop_rules(plan)
    first = _first_of(cluster, job)
    replay = replay_log_of(cluster, job) if plan.asynchronous else None
    manifest = DatasetManifest.from_json(cluster.backend.get_blob(plan.manifest_digest))
    with tempfile.TemporaryDirectory(prefix="phalanx-verify-") as name:
        folder = Path(name)

        def fetch(digest: str) -> Path:
            path = folder / digest
            if not path.exists():
                cluster.backend.get_blob_to(digest, path)
            return path

        start_model = None
        if first.train.start.model:
            start_model = cluster.models.cached(first.train.start.model) / "model.safetensors"
        trained = train_in_process(
            plan,
            manifest,
            fetch,
            code_dir=job_code(spec, fetch, folder / "code"),
            start_model=start_model,
            replay=replay,
            until_step=until_step,
        )
    return Verdict(
        job_id=job_id,
        steps=trained.steps,
        cluster_sha256=job.result.parameters_sha256,
        local_sha256=trained.parameters_sha256,
        bit_identical=job.result.bit_identical,
        replayed=plan.asynchronous,
    )


def _demand_all_is_known(job: Job, *, in_process: bool) -> None:
    """Raise FailedPrecondition for a job whose parameters nobody can compute again from its spec
    and its data, with what its own books say."""
    spec, result = job.message.spec, job.result
    assert result is not None
    if is_task_set(spec):
        raise FailedPrecondition(
            f"job {job.id} is a set of independent tasks, which has no parameters to compare; "
            f"`phalanx results {job.id}` shows what each of them returned"
        )
    books = (
        f"its own books: examples lost {result.examples_lost}, counted twice "
        f"{result.examples_doubled}"
    )
    if spec.train.synchronous.backup_shards and result.examples_lost:
        raise FailedPrecondition(
            f"job {job.id} left out contributions that came too late (backup_shards), and which "
            f"they were is not written down, so its bits cannot be computed again; {books}"
        )
    if spec.train.stale.bound and not in_process:
        raise FailedPrecondition(
            f"contributions of job {job.id} were applied in the order in which they came, which "
            f"stale jobs do not write down, so its bits cannot be computed again; {books}"
        )


def _first_of(cluster: Cluster, job: Job) -> JobSpec:
    """Return the spec of the job that began where a job goes on, over any number of jobs.

    Raises FailedPrecondition where one of them is deleted.
    """
    from phalanx.specs import parse_reference

    spec = job.message.spec
    while spec.train.start.job:
        earlier, _ = parse_reference(spec.train.start.job)
        try:
            spec = cluster.get(earlier).message.spec
        except NotFound as error:
            raise FailedPrecondition(
                f"job {job.id} goes on from {earlier}, which is deleted: what that one began with "
                "is not known any more"
            ) from error
    return spec


def _forget_stop_rules(plan: JobPlan) -> None:
    """Nothing ends the job but its last step, and nothing has to be measured for it."""
    from phalanx.v1.job_spec_pb2 import JobSpec

    spec = JobSpec.FromString(plan.spec)
    spec.train.stop.Clear()
    plan.spec = spec.SerializeToString(deterministic=True)
    plan.evaluation_shards = 0


def replay_log_of(cluster: Cluster, job: Job) -> ReplayLog | None:
    """Return the order in which a finished asynchronous job applied its contributions.

    None for a job that ran in this process, where it is always the same. Raises FailedPrecondition
    where the job was not asked to write it down, and NotFound where it is not kept any more.
    """
    from phalanx.data.checkpoint_parts import parse_part
    from phalanx.training.replay import ReplayLog
    from phalanx.v1.storage_service_pb2 import ListCheckpointsRequest

    train = job.message.spec.train
    if cluster.backend.address == IN_PROCESS:
        return None
    if not train.asynchronous.replay_log:
        raise FailedPrecondition(
            f"contributions of job {job.id} were applied in the order in which they came, and it "
            "was not written down; submit it with train.asynchronous.replay_log: true"
        )
    answer = cluster.backend.call(LIST_CHECKPOINTS, ListCheckpointsRequest(job_id=job.id))
    for checkpoint in answer.checkpoints:
        if checkpoint.final:
            _, vectors = parse_part(cluster.backend.get_blob(checkpoint.parts[0].digest))
            return ReplayLog.restored(vectors, checkpoint.step * job.message.spec.data.shards)
    raise NotFound(f"the last checkpoint of job {job.id}, which has the log, is not kept any more")
