"""Proving of a finished job, without its cluster: its ledger, and that its bits come out again."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.errors import DataLoss, FailedPrecondition, NotFound
from phalanx.programs import graph_of
from phalanx.sdk.in_process import IN_PROCESS, job_code
from phalanx.sdk.job import Job
from phalanx.sdk.methods import GET_MODEL, LIST_CHECKPOINTS, READ_TASK_RESULTS
from phalanx.sdk.values import Result
from phalanx.sdk.verdict import TaskLedger, Verdict
from phalanx.tasks import is_program, is_task_set
from phalanx.texts import number_of
from phalanx.v1.task_service_pb2 import TaskResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phalanx.data.manifest import DatasetManifest
    from phalanx.sdk.cluster import Cluster
    from phalanx.training.ledger import Ledger
    from phalanx.training.left_out import LeftOutLog
    from phalanx.training.local import TrainedModel
    from phalanx.training.replay import ReplayLog
    from phalanx.v1.dataset_service_pb2 import Dataset
    from phalanx.v1.job_spec_pb2 import JobSpec
    from phalanx.v1.storage_service_pb2 import CheckpointManifest
    from phalanx.v1.training_pb2 import JobPlan


def verify_job(cluster: Cluster, job_id: str) -> Verdict:
    """Count what a job has used, and compute it again in this process.

    Downloads the chunks that the job reads. A job whose contributions commit one by one is replayed
    in the order of its log, and one that went on from another is computed from the very beginning.
    Where nobody wrote down what the parameters depend on, or where other bits come out and this
    process has another numeric fingerprint than the job's workers, the verdict says so, and the
    ledger is counted all the same. Not that of a private job, whose rows are drawn by a secret. A
    set of tasks has its results counted; of a program they are all made again as well.

    Raises FailedPrecondition unless the job has succeeded, and where its data set or its origin is
    deleted; NotFound where the last checkpoint is needed and is not kept any more; DataLoss where
    it cannot be read.
    """
    job = cluster.get(job_id)
    if job.result is None:
        raise FailedPrecondition(
            f"job {job_id} is {job.state}; only a job that has succeeded can be verified"
        )
    if is_task_set(job.message.spec):
        return _verify_tasks(cluster, job, job.result)
    if is_program(job.message.spec):
        return _verify_program(cluster, job, job.result)
    return _Training(cluster, job, job.result).verdict()


def replay_log_of(cluster: Cluster, job: Job) -> ReplayLog | None:
    """Return the order in which a finished job applied its contributions one by one.

    None for a job that ran in this process, where it is always the same. Raises FailedPrecondition
    where the job was not asked to write it down, and NotFound where it is not kept any more.
    """
    if cluster.backend.address == IN_PROCESS:
        return None
    if not _keeps_log(job.message.spec):
        raise FailedPrecondition(_not_written_down(job.message.spec))
    return _read_log(cluster, job, _last_checkpoint(cluster, job))


def _verify_tasks(cluster: Cluster, job: Job, result: Result) -> Verdict:
    return Verdict(
        job_id=job.id,
        steps=result.steps,
        cluster_sha256="",
        local_sha256="",
        bit_identical=False,
        tasks=_counted(_results_of(cluster, job), len(job.message.spec.tasks.arguments)),
    )


def _verify_program(cluster: Cluster, job: Job, result: Result) -> Verdict:
    from phalanx.sdk.verifying_programs import verify_program
    from phalanx.specs import job_plan, model_name

    spec = job.message.spec
    plan = job_plan(spec, _dataset_of(cluster, job), job.id)
    if name := model_name(spec):
        model = cluster.models.describe(name)
        plan.model_files.update({file.path: file.digest for file in model.files})
    results = _results_of(cluster, job)
    outcome = next((each for each in results if each.task == plan.total_steps - 1), None)
    values = {each.task: each.stored for each in results if not each.HasField("failure")}
    # Nothing is written of tasks that were passed over: their results follow from those of others.
    passed = [TaskResult(task=task) for task in graph_of(plan).passed_over(values)]
    return verify_program(
        job,
        result,
        plan,
        _counted([*results, *passed], plan.total_steps),
        "" if outcome is None else outcome.stored.digest,
        lambda folder: _fetcher(cluster, folder),
    )


def _results_of(cluster: Cluster, job: Job) -> list[TaskResult]:
    """Return what is written of the tasks of a job."""
    from phalanx.v1.job_service_pb2 import ReadTaskResultsRequest

    request = ReadTaskResultsRequest(job_id=job.id)
    pages = cluster.backend.stream(READ_TASK_RESULTS, request)
    return [each for page in pages for each in page.results]


def _counted(results: list[TaskResult], count: int) -> TaskLedger:
    found, tasks = Counter(each.task for each in results), range(count)
    given_up = {each.task for each in results if each.HasField("failure")}
    return TaskLedger(
        tasks=count,
        done=len(found.keys() - given_up),
        given_up=tuple(sorted(given_up)),
        # A result of a task that is not there is one too many as well.
        doubled=tuple(sorted(task for task in found if found[task] > 1 or task not in tasks)),
        missing=tuple(task for task in tasks if not found[task]),
    )


@dataclass(frozen=True)
class _Record:
    """What is written of a job: which steps shards have completed, in which order, without whom."""

    completed: tuple[int, ...]
    examples: int | None
    log: ReplayLog | None = None
    left_out: LeftOutLog | None = None


class _Training:
    """Verifies one job that has trained a model."""

    def __init__(self, cluster: Cluster, job: Job, result: Result) -> None:
        from phalanx.data.manifest import DatasetManifest
        from phalanx.specs import job_plan, parts

        self._cluster = cluster
        self._job = job
        self._result = result
        self._spec = job.message.spec
        self._has_backups = parts.backup_shards(self._spec.train) > 0
        dataset = _dataset_of(cluster, job)
        self._plan = job_plan(self._spec, dataset, job.id)
        manifest = cluster.backend.get_blob(self._plan.manifest_digest)
        self._manifest: DatasetManifest = DatasetManifest.from_json(manifest)

    def verdict(self) -> Verdict:
        """Read what is written, compute the job again if that is enough, and count."""
        result = self._result
        if self._spec.train.HasField("privacy"):
            return self._secret_verdict()
        first = _first_of(self._cluster, self._job)
        record = self._record()
        why = self._unknown(record) or self._without_model(first)
        with tempfile.TemporaryDirectory(prefix="phalanx-verify-") as name:
            trained = None if why else self._trained(Path(name), first, record)
        sha256 = "" if trained is None else trained.parameters_sha256
        like_workers = False
        if trained is not None and sha256 != result.parameters_sha256:
            workers = self._fingerprint()
            same = workers == _own_fingerprint()
            # Which PyTorch the workers had, their fingerprint does not say.
            like_workers = same and not self._spec.train.model.HasField("torch")
            why = self._excuse(elsewhere=bool(workers) and not same)
        return Verdict(
            job_id=self._job.id,
            steps=result.steps if trained is None else trained.steps,
            cluster_sha256=result.parameters_sha256,
            local_sha256=sha256,
            bit_identical=result.bit_identical,
            replayed=self._plan.asynchronous or self._has_backups,
            like_workers=like_workers,
            ledger=self._ledger(record, trained),
            not_compared=why,
        )

    def _secret_verdict(self) -> Verdict:
        """What can be said of a job whose rows and noise nobody may know."""
        return Verdict(
            job_id=self._job.id,
            steps=self._result.steps,
            cluster_sha256=self._result.parameters_sha256,
            local_sha256="",
            bit_identical=self._result.bit_identical,
            not_compared=(
                "the job is private: its rows were drawn and its noise was made by a secret that "
                "its cluster does not tell"
            ),
        )

    def _record(self) -> _Record:
        """Read what the last checkpoint says.

        Without one, all shards have completed all steps, where they commit together.
        """
        from phalanx.training.asynchronous import completed_steps

        job, result, shards = self._job, self._result, self._plan.shards
        together = (result.steps,) * shards
        if self._cluster.backend.address == IN_PROCESS:
            return _Record(together, job.message.progress.examples)
        try:
            last = _last_checkpoint(self._cluster, job)
        except NotFound:
            if self._plan.asynchronous:
                raise
            return _Record(together, None)
        if last.step != result.steps:
            raise DataLoss(
                f"job {job.id} made {number_of(result.steps, 'step')}, and its last checkpoint is "
                f"of step {last.step}"
            )
        examples = _examples_of(last)
        if not self._plan.asynchronous:
            absences = _read_absences(self._cluster, last) if self._has_backups else None
            return _Record(together, examples, left_out=absences)
        completed = tuple(completed_steps(last.root_state, shards, last.step))
        log = _read_log(self._cluster, job, last) if _keeps_log(self._spec) else None
        return _Record(completed, examples, log)

    def _unknown(self, record: _Record) -> str:
        """Why nobody can compute the parameters again; empty where somebody can."""
        in_process = self._cluster.backend.address == IN_PROCESS
        if self._plan.asynchronous and record.log is None and not in_process:
            return _not_written_down(self._spec)
        if self._has_backups and record.left_out is None and self._result.examples_lost:
            return (
                "the job left out contributions that came too late (backup_shards), and which they "
                "were is not written down"
            )
        return ""

    def _without_model(self, first: JobSpec) -> str:
        """Say so where the model is deleted that the job started from; empty where it is not."""
        name = first.train.start.model
        try:
            if name:
                self._cluster.models.describe(name)
        except NotFound:
            return f"model {name} is deleted, from which it started"
        return ""

    def _excuse(self, *, elsewhere: bool) -> str:
        """Why other bits prove nothing; empty where they do."""
        if self._plan.asynchronous or self._has_backups:
            return ""
        if not self._result.bit_identical:
            return (
                "its workers may have had different numeric fingerprints, as its model says, and "
                "this process computed other bits"
            )
        if not elsewhere:
            return ""
        return (
            "this process has another numeric fingerprint than its workers had (the processor or "
            "the versions of libraries), and computed other bits; verify it where the fingerprint "
            "is theirs, which `phalanx workers --json` shows"
        )

    def _fingerprint(self) -> str:
        """The numeric fingerprint of the workers that computed the job, as its model says.

        Empty where it was bound to none, and where the model is deleted.
        """
        from phalanx.data.model_files import DESCRIPTION_FILE
        from phalanx.v1.model_service_pb2 import GetModelRequest

        backend = self._cluster.backend
        request = GetModelRequest(namespace=self._spec.namespace, name=self._result.model)
        try:
            model = backend.call(GET_MODEL, request).model
        except NotFound:
            return ""
        for file in model.files:
            if file.path == DESCRIPTION_FILE:
                described = json.loads(backend.get_blob(file.digest))
                return str(described.get("fingerprint", ""))
        return ""

    def _trained(self, folder: Path, first: JobSpec, record: _Record) -> TrainedModel:
        """Compute the job again; `first` is the spec of the job that began where it does."""
        from phalanx.training.local import train_in_process

        spec, result, plan = self._spec, self._result, self._plan
        until_step = None
        if spec.train.start.job or spec.train.stop.HasField("wall_time"):
            # Its steps follow from more than its own rules: those of another job, or a clock.
            until_step = result.steps if result.best is None else result.best.step
            plan = _without_stop_rules(plan)
        fetch = _fetcher(self._cluster, folder)
        start_model = None
        if first.train.start.model:
            cached = self._cluster.models.cached(first.train.start.model)
            start_model = cached / "model.safetensors"
        return train_in_process(
            plan,
            self._manifest,
            fetch,
            code_dir=job_code(spec, fetch, folder / "code"),
            start_model=start_model,
            replay=record.log,
            left_out=record.left_out,
            until_step=until_step,
        )

    def _ledger(self, record: _Record, trained: TrainedModel | None) -> Ledger:
        from phalanx.specs import parts
        from phalanx.training.ledger import Books, applied_by, take_stock

        result = self._result
        left_out = frozenset() if trained is None else trained.left_out
        if record.left_out is not None:
            left_out |= record.left_out.contributions
        books = Books(
            completed=record.completed,
            examples=record.examples,
            lost=result.examples_lost,
            doubled=result.examples_doubled,
            applied=None if record.log is None else applied_by(record.log, self._plan.shards),
            left_out=left_out,
            # A reducer may have refused what a faulty worker sent, which nobody computes again.
            all_named=trained is not None
            and trained.steps == result.steps
            and not parts.reduces_leaves(self._spec.train),
        )
        return take_stock(self._plan, _Split(self._manifest, self._spec.data.split), books)


class _Split:
    """The chunks of one split, which nobody has to read to count its rows."""

    def __init__(self, manifest: DatasetManifest, split: str) -> None:
        self.chunks = tuple(manifest.splits[split])
        self.chunk_rows = tuple(chunk.rows for chunk in self.chunks)


def _own_fingerprint() -> str:
    from phalanx import numeric_fingerprint
    from phalanx.blas import one_blas_thread

    with one_blas_thread():
        return numeric_fingerprint.compute()


def _fetcher(cluster: Cluster, folder: Path) -> Callable[[str], Path]:
    """Return what brings a blob into the folder."""

    def fetch(digest: str) -> Path:
        path = folder / digest
        if not path.exists():
            cluster.backend.get_blob_to(digest, path)
        return path

    return fetch


def _dataset_of(cluster: Cluster, job: Job) -> Dataset:
    """Return the data set that a job has read. Raises FailedPrecondition where it is deleted."""
    name = job.message.spec.data.name
    try:
        return cluster.data.get(name)
    except NotFound as error:
        raise FailedPrecondition(
            f"data set {name} is deleted, which job {job.id} has read: what that used can be "
            "neither counted nor computed again",
            reason="DATASET_DELETED",
        ) from error


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


def _without_stop_rules(plan: JobPlan) -> JobPlan:
    """Return the plan of a job that nothing ends but its last step, and that measures nothing."""
    from phalanx.v1.job_spec_pb2 import JobSpec
    from phalanx.v1.training_pb2 import JobPlan

    endless = JobPlan()
    endless.CopyFrom(plan)
    spec = JobSpec.FromString(plan.spec)
    spec.train.stop.Clear()
    endless.spec = spec.SerializeToString(deterministic=True)
    endless.evaluation_shards = 0
    return endless


def _keeps_log(spec: JobSpec) -> bool:
    from phalanx.specs import parts

    return parts.keeps_replay_log(spec.train)


def _not_written_down(spec: JobSpec) -> str:
    mode = spec.train.WhichOneof("consistency")
    return (
        "its contributions were applied in the order in which they came, and it was not written "
        f"down; submit it with train.{mode}.replay_log: true"
    )


def _last_checkpoint(cluster: Cluster, job: Job) -> CheckpointManifest:
    from phalanx.v1.storage_service_pb2 import ListCheckpointsRequest

    answer = cluster.backend.call(LIST_CHECKPOINTS, ListCheckpointsRequest(job_id=job.id))
    for checkpoint in answer.checkpoints:
        if checkpoint.final:
            return checkpoint
    raise NotFound(f"the last checkpoint of job {job.id} is not kept any more")


def _examples_of(checkpoint: CheckpointManifest) -> int:
    """Return how many examples the root has counted."""
    try:
        return int(json.loads(checkpoint.root_state)["examples"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(
            f"the checkpoint at step {checkpoint.step} does not say how many examples entered the "
            f"steps: {error!r}"
        ) from None


def _read_absences(cluster: Cluster, checkpoint: CheckpointManifest) -> LeftOutLog | None:
    """Return what each step left out; None where it was not written down."""
    from phalanx.training.left_out import COUNTS, LeftOutLog

    vectors = _vectors(cluster, checkpoint)
    return LeftOutLog.restored(vectors, checkpoint.step) if COUNTS in vectors else None


def _read_log(cluster: Cluster, job: Job, checkpoint: CheckpointManifest) -> ReplayLog:
    from phalanx.training.replay import ReplayLog

    steps = checkpoint.step * job.message.spec.data.shards
    return ReplayLog.restored(_vectors(cluster, checkpoint), steps)


def _vectors(cluster: Cluster, checkpoint: CheckpointManifest) -> Mapping[str, NDArray[Any]]:
    """What a checkpoint keeps beside the parameters; a log is in one range only."""
    from phalanx.data.checkpoint_parts import parse_part

    return parse_part(cluster.backend.get_blob(checkpoint.parts[0].digest))[1]
