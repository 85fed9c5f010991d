"""A cluster without processes: the public services answered inside the calling process.

For debugging, for small data and as the reference that real clusters are compared with. It keeps
blobs in a folder and everything else in memory.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.message import Message

import phalanx
from phalanx import deletions
from phalanx.errors import NotFound, Unimplemented, Violation
from phalanx.files import replace_content
from phalanx.ids import check_blob_id, check_name, split_version_name
from phalanx.sdk import methods
from phalanx.sdk.catalog import Catalog
from phalanx.sdk.in_process_jobs import OVER, InProcessJobs
from phalanx.sdk.in_process_links import LinkedBlobs
from phalanx.sdk.methods import Method, RequestT, ResponseT
from phalanx.sdk.transport import STREAM_TIMEOUT_S
from phalanx.v1 import (
    cluster_service_pb2,
    dataset_service_pb2,
    job_pb2,
    job_service_pb2,
    model_service_pb2,
    storage_service_pb2,
)
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import TaskResult
from phalanx.v1.training_pb2 import JobPlan
from phalanx.wheels import wheel_path, write_code

if TYPE_CHECKING:
    from concurrent.futures import Future

    from phalanx.data.choice import RawColumns
    from phalanx.data.manifest import DatasetManifest
    from phalanx.specs.starting import Shapes
    from phalanx.training.local import Progress, TrainedModel

_NONE: Iterator[Any] = iter(())

IN_PROCESS = "in-process"
"""Stands where other backends have an address."""


class InProcessBackend:
    """Answers the public services; see ``phalanx.sdk.backend.Backend``."""

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._code = folder / "code"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._linked = LinkedBlobs(folder / "linked")
        self._datasets: Catalog[dataset_service_pb2.Dataset] = Catalog("data set")
        self._models: Catalog[model_service_pb2.ModelVersion] = Catalog("model")
        self._journals: dict[str, list[bytes]] = {}
        self._jobs = InProcessJobs(self._train, self._register, self._run_tasks, self._run_program)
        self._calls: dict[str, Callable[[Any], Message]] = {
            methods.SUBMIT_JOB.path: self._submit,
            methods.GET_JOB.path: self._get_job,
            methods.LIST_JOBS.path: self._list_jobs,
            methods.CANCEL_JOB.path: self._cancel,
            methods.PAUSE_JOB.path: self._pause,
            methods.RESUME_JOB.path: self._resume,
            methods.RETRY_JOB.path: self._retry,
            methods.DELETE_JOB.path: self._delete_job,
            methods.LIST_JOB_METRICS.path: self._list_metrics,
            methods.GET_CLUSTER.path: self._get_cluster,
            methods.LIST_WORKERS.path: self._list_workers,
            methods.CREATE_DATASET.path: self._create_dataset,
            methods.GET_DATASET.path: self._get_dataset,
            methods.LIST_DATASETS.path: self._list_datasets,
            methods.DELETE_DATASET.path: self._delete_dataset,
            methods.GET_MODEL.path: self._get_model,
            methods.LIST_MODELS.path: self._list_models,
            methods.DELETE_MODEL.path: self._delete_model,
            methods.APPEND_JOURNAL.path: self._append_journal,
            methods.SET_PINS.path: self._set_pins,
        }
        self._streams: dict[str, Callable[[Any], Iterator[Message]]] = {
            methods.WATCH_JOB.path: self._watch,
            methods.READ_JOB_LOGS.path: self._read_logs,
            methods.READ_TASK_RESULTS.path: self._read_results,
            methods.LIST_EVENTS.path: self._list_events,
            methods.READ_JOURNAL.path: self._read_journal,
        }

    @property
    def address(self) -> str:
        """Not an address: there is nothing to dial."""
        return IN_PROCESS

    def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        more_s: float = 0.0,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> ResponseT:
        """Answer a unary call."""
        answer = self._calls.get(method.path)
        if answer is None:
            raise Unimplemented(f"{method.name} needs a cluster with processes; this one has none")
        return cast(ResponseT, answer(request))

    def stream(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float = STREAM_TIMEOUT_S,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> Iterator[ResponseT]:
        """Answer a call with a stream."""
        answer = self._streams.get(method.path)
        if answer is None:
            raise Unimplemented(f"{method.name} needs a cluster with processes; this one has none")
        return cast("Iterator[ResponseT]", answer(request))

    def put_blob(self, data: bytes) -> str:
        """Keep bytes; return their digest."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._blobs / digest
        if not path.exists():
            replace_content(path, data)
        return digest

    def start_put_blob(self, data: bytes, digest: str) -> Future[str]:
        """Keep bytes, at once."""
        from concurrent.futures import Future

        done: Future[str] = Future()
        done.set_result(self.put_blob(data))
        return done

    def get_blob(self, digest: str) -> bytes:
        """Return kept bytes. Raises NotFound."""
        return self._blob_path(digest).read_bytes()

    def get_blob_to(self, digest: str, path: Path) -> None:
        """Copy kept bytes to a file. Raises NotFound."""
        shutil.copyfile(self._blob_path(digest), path)

    def close(self) -> None:
        """Cancel what runs."""
        self._jobs.close()
        self._linked.close()

    def _blob_path(self, digest: str) -> Path:
        path = self._blobs / check_blob_id(digest)
        if path.exists():
            return path
        linked = self._linked.path(digest)
        if linked is None:
            raise NotFound(f"there is no blob {digest}")
        return linked

    def _submit(
        self, request: job_service_pb2.SubmitJobRequest
    ) -> job_service_pb2.SubmitJobResponse:
        from phalanx.specs import (
            as_chosen,
            check_spec,
            job_plan,
            names_dataset,
            plan,
            prepare,
            reads_dataset,
            resolve_start_model,
            spec_sha256,
        )
        from phalanx.specs.starting import known_shapes

        content = request.spec.SerializeToString(deterministic=True)
        known = None
        if not request.validate_only:
            known = self._jobs.submitted(request.request_id, content)
        if known is not None:
            read = self._dataset_of(known) if reads_dataset(known.spec) else None
            if read is not None:
                read = as_chosen(read, known.spec.data, self._columns(known.spec, read))
            return job_service_pb2.SubmitJobResponse(job=known, plan=plan(known.spec, read))
        dataset = None
        if reads_dataset(request.spec):
            if not names_dataset(request.spec):
                check_spec(request.spec)
            try:
                dataset = self._datasets.find(request.spec.namespace, request.spec.data.name)
            except NotFound as error:
                check_spec(request.spec, also=[Violation("data.name", error.message)])
                raise
        columns = self._columns(request.spec, dataset)
        spec = prepare(request.spec, dataset, columns)
        model_files, model_bytes = self._take_model(spec, dataset)
        columns = self._columns(spec, dataset)
        if dataset is not None:
            dataset = as_chosen(dataset, spec.data, columns)
        self._check_wheels(spec)
        if spec.train.start.WhichOneof("from") == "job":
            message = "with workers=0 no job leaves a checkpoint; submit it to a cluster"
            raise Unimplemented(message, violations=[Violation("train.start.job", message)])
        if spec.train.start.model:
            model = self._models.find(spec.namespace, spec.train.start.model)
            resolve_start_model(spec, model)
            assert dataset is not None, "a job that trains reads data"
            self._check_start_model(model, known_shapes(spec, dataset))
            self._check_start_columns(model, spec, dataset)
        shown = plan(spec, dataset, model_bytes=model_bytes)
        digest = spec_sha256(spec)
        if request.validate_only:
            job = job_pb2.Job(spec=spec, spec_sha256=digest)
        else:
            todo = job_plan(spec, dataset, "")
            todo.model_files.update(model_files)
            job = self._jobs.submit(spec, digest, todo, shown.steps, request.request_id, content)
        return job_service_pb2.SubmitJobResponse(job=job, plan=shown)

    def _columns(
        self, spec: JobSpec, dataset: dataset_service_pb2.Dataset | None
    ) -> RawColumns | None:
        """Return the columns of the data set, where the job chooses some."""
        from phalanx.data.choice import RawColumns
        from phalanx.specs import chooses_columns

        if dataset is None or not chooses_columns(spec):
            return None
        return RawColumns.of(self._manifest(dataset.manifest_digest))

    def _take_model(
        self, spec: JobSpec, dataset: dataset_service_pb2.Dataset | None
    ) -> tuple[dict[str, str], int]:
        """Write the model that a program takes into its spec; return the digests of its files, and
        about how many bytes of memory it takes."""
        from phalanx.specs import model_name, take_model
        from phalanx.specs.starting import description_digest

        if dataset is None or not model_name(spec):
            return {}, 0
        model = self._models.find(spec.namespace, model_name(spec))
        manifest = self._manifest(dataset.manifest_digest)
        taken = take_model(spec, model, self.get_blob(description_digest(model)), manifest)
        return {file.path: file.digest for file in model.files}, taken.size_bytes

    def _check_start_model(self, model: model_service_pb2.ModelVersion, wanted: Shapes) -> None:
        from phalanx.specs.starting import check_shapes, shapes_in_file

        if wanted:
            check_shapes(shapes_in_file(self._parameters_path(model)), wanted)

    def _check_start_columns(
        self,
        model: model_service_pb2.ModelVersion,
        spec: JobSpec,
        dataset: dataset_service_pb2.Dataset,
    ) -> None:
        from phalanx.data.choice import RawColumns
        from phalanx.specs.starting import check_columns, description_digest, trained_on

        digest = description_digest(model)
        if not digest:
            return
        seen = trained_on(self.get_blob(digest))
        if seen.needs_columns(spec.data):
            columns = RawColumns.of(self._manifest(dataset.manifest_digest))
            check_columns(seen, spec.data, columns)

    def _get_job(self, request: job_service_pb2.GetJobRequest) -> Message:
        return job_service_pb2.GetJobResponse(job=self._jobs.get(request.job_id))

    def _list_jobs(self, request: job_service_pb2.ListJobsRequest) -> Message:
        namespace = request.namespace or "default"
        found = [
            job
            for job in self._jobs.all()
            if job.spec.namespace == namespace
            and (not request.states or job.state in request.states)
        ]
        return job_service_pb2.ListJobsResponse(jobs=found)

    def _cancel(self, request: job_service_pb2.CancelJobRequest) -> Message:
        job = self._jobs.cancel(request.job_id, request.reason)
        return job_service_pb2.CancelJobResponse(job=job)

    def _pause(self, request: job_service_pb2.PauseJobRequest) -> Message:
        return job_service_pb2.PauseJobResponse(job=self._jobs.pause(request.job_id))

    def _resume(self, request: job_service_pb2.ResumeJobRequest) -> Message:
        return job_service_pb2.ResumeJobResponse(job=self._jobs.resume(request.job_id))

    def _retry(self, request: job_service_pb2.RetryJobRequest) -> Message:
        return job_service_pb2.RetryJobResponse(job=self._jobs.retry(request.job_id))

    def _delete_job(self, request: job_service_pb2.DeleteJobRequest) -> Message:
        self._jobs.delete(request.job_id)
        return job_service_pb2.DeleteJobResponse()

    def _list_metrics(self, request: job_service_pb2.ListJobMetricsRequest) -> Message:
        points = [
            point
            for point in self._jobs.points(request.job_id)
            if point.step > request.after_step
            and (not request.names or point.name in request.names)
        ]
        return job_service_pb2.ListJobMetricsResponse(points=points[: request.max_points or None])

    def _watch(self, request: job_service_pb2.WatchJobRequest) -> Iterator[Message]:
        return self._jobs.watch(request.job_id, request.after_sequence)

    def _read_logs(self, request: job_service_pb2.ReadJobLogsRequest) -> Iterator[Message]:
        # What the job's code prints goes to the standard output of this very process.
        self._jobs.get(request.job_id)
        return _NONE

    def _read_results(self, request: job_service_pb2.ReadTaskResultsRequest) -> Iterator[Message]:
        for result in self._jobs.results(request.job_id):
            if not request.tasks or result.task in request.tasks:
                yield job_service_pb2.ReadTaskResultsResponse(results=[result])

    def _list_events(self, request: cluster_service_pb2.ListEventsRequest) -> Iterator[Message]:
        if request.follow:
            raise Unimplemented("following all events needs a cluster with processes; watch a job")
        for event in self._jobs.events(request.job_id, request.after_sequence):
            yield cluster_service_pb2.ListEventsResponse(event=event)

    def _get_cluster(self, request: cluster_service_pb2.GetClusterRequest) -> Message:
        answer = cluster_service_pb2.GetClusterResponse(
            version=phalanx.__version__, leader="in-process", storage_available=True
        )
        for job in self._jobs.all():
            answer.jobs[job_pb2.Job.State.Name(job.state).removeprefix("STATE_")] += 1
        return answer

    def _list_workers(self, request: cluster_service_pb2.ListWorkersRequest) -> Message:
        return cluster_service_pb2.ListWorkersResponse()

    def _create_dataset(self, request: dataset_service_pb2.CreateDatasetRequest) -> Message:
        from phalanx.data.described import described

        manifest = self._manifest(request.manifest_digest)
        if manifest.links is not None:
            self._linked.register(request.manifest_digest, manifest)
        dataset = described(manifest, request.manifest_digest)
        dataset.namespace = request.namespace or "default"
        dataset.name = check_name(request.name, "data set")
        registered = self._datasets.register(dataset)
        return dataset_service_pb2.CreateDatasetResponse(dataset=registered)

    def _get_dataset(self, request: dataset_service_pb2.GetDatasetRequest) -> Message:
        dataset = self._datasets.find(request.namespace, request.name)
        return dataset_service_pb2.GetDatasetResponse(dataset=dataset)

    def _list_datasets(self, request: dataset_service_pb2.ListDatasetsRequest) -> Message:
        found = self._datasets.in_namespace(request.namespace)
        return dataset_service_pb2.ListDatasetsResponse(datasets=found)

    def _delete_dataset(self, request: dataset_service_pb2.DeleteDatasetRequest) -> Message:
        unwanted = self._datasets.find(request.namespace, request.name)
        self._check_unused(deletions.DATASET, unwanted, request, lambda spec: spec.data.name)
        before = self._linked_manifests()
        self._datasets.remove(request.namespace, request.name)
        for manifest_digest in before - self._linked_manifests():
            self._linked.forget(manifest_digest)
        return dataset_service_pb2.DeleteDatasetResponse()

    def _check_unused(
        self,
        kind: str,
        unwanted: dataset_service_pb2.Dataset | model_service_pb2.ModelVersion,
        request: dataset_service_pb2.DeleteDatasetRequest | model_service_pb2.DeleteModelRequest,
        name_in: Callable[[JobSpec], str],
    ) -> None:
        """Raise FailedPrecondition where jobs refer to a version that is to be deleted."""
        users = []
        for job in self._jobs.all():
            *used, version = split_version_name(name_in(job.spec), job.spec.namespace)
            if used == [unwanted.namespace, unwanted.name] and (
                "@" not in request.name or version == str(unwanted.version)
            ):
                users.append((job.id, job.state in OVER))
        deletions.check_unused(kind, request.name, users, force=request.force)

    def _linked_manifests(self) -> set[str]:
        versions = (each for found in self._datasets.values() for each in found)
        return {dataset.manifest_digest for dataset in versions if dataset.linked}

    def _dataset_of(self, job: job_pb2.Job) -> dataset_service_pb2.Dataset:
        return self._datasets.find(job.spec.namespace, job.spec.data.name)

    def _get_model(self, request: model_service_pb2.GetModelRequest) -> Message:
        model = self._models.find(request.namespace, request.name)
        return model_service_pb2.GetModelResponse(model=model)

    def _list_models(self, request: model_service_pb2.ListModelsRequest) -> Message:
        found = self._models.in_namespace(request.namespace)
        return model_service_pb2.ListModelsResponse(models=found)

    def _delete_model(self, request: model_service_pb2.DeleteModelRequest) -> Message:
        unwanted = self._models.find(request.namespace, request.name)
        from phalanx.specs import stored_model

        self._check_unused(deletions.MODEL, unwanted, request, stored_model)
        self._models.remove(request.namespace, request.name)
        return model_service_pb2.DeleteModelResponse()

    def _append_journal(self, request: storage_service_pb2.AppendJournalRequest) -> Message:
        journal = self._journals.setdefault(request.stream, [])
        journal.extend(request.records)
        return storage_service_pb2.AppendJournalResponse(next_sequence=len(journal))

    def _read_journal(self, request: storage_service_pb2.ReadJournalRequest) -> Iterator[Message]:
        records = [
            storage_service_pb2.JournalRecord(sequence=sequence, payload=payload)
            for sequence, payload in enumerate(self._journals.get(request.stream, []))
        ]
        yield storage_service_pb2.ReadJournalResponse(records=records, next_sequence=len(records))

    def _set_pins(self, request: storage_service_pb2.SetPinsRequest) -> Message:
        # Nothing is collected here: all of it goes with the process.
        return storage_service_pb2.SetPinsResponse()

    def _check_wheels(self, spec: JobSpec) -> None:
        for index, digest in enumerate(spec.code.wheels):
            if not (self._blobs / digest).exists():
                message = f"there is no wheel {digest[:12]}…; add it with cluster.code.add(path)"
                violation = Violation(f"code.wheels[{index}]", message)
                raise NotFound(message, reason="WHEEL_NOT_FOUND", violations=[violation])

    def _manifest(self, digest: str) -> DatasetManifest:
        from phalanx.data.manifest import DatasetManifest

        return DatasetManifest.from_json(self.get_blob(digest))

    def _train(
        self, plan: JobPlan, on_progress: Callable[[Progress], None], secret: bytes
    ) -> TrainedModel:
        from phalanx.training.local import train_in_process

        spec = JobSpec.FromString(plan.spec)
        start_model = None
        if spec.train.start.model:
            model = self._models.find(spec.namespace, spec.train.start.model)
            start_model = self._parameters_path(model)
        return train_in_process(
            plan,
            self._manifest(plan.manifest_digest),
            self._blob_path,
            code_dir=job_code(spec, self._blob_path, self._code / plan.job_id),
            start_model=start_model,
            on_progress=on_progress,
            secret=secret,
        )

    def _parameters_path(self, model: model_service_pb2.ModelVersion) -> Path:
        digest = next(file.digest for file in model.files if file.path == "model.safetensors")
        return self._blob_path(digest)

    def _run_tasks(
        self, plan: JobPlan, results: dict[int, TaskResult], on_result: Callable[[], None]
    ) -> None:
        from phalanx.sdk.in_process_tasks import run_tasks

        spec = JobSpec.FromString(plan.spec)
        code = job_code(spec, self._blob_path, self._code / plan.job_id)
        run_tasks(plan, code, results, on_result)

    def _run_program(
        self,
        job: job_pb2.Job,
        plan: JobPlan,
        results: dict[int, TaskResult],
        on_result: Callable[[], None],
    ) -> job_pb2.Result:
        from phalanx.sdk.in_process_programs import Blobs, result_of, run_program, trained_of

        blobs = Blobs(self._blob_path, self.put_blob)
        code = job_code(job.spec, self._blob_path, self._code / plan.job_id)
        outcome = run_program(plan, blobs, results, on_result, code)
        result = result_of(plan, outcome, len(results))
        trained = trained_of(outcome, blobs, len(results))
        if trained is not None and outcome.model is not None:
            described = outcome.model.spec_of(job.spec)
            result.model = self._register(job, plan, trained, described)
            result.parameters_sha256 = trained.parameters_sha256
        return result

    def _register(
        self, job: job_pb2.Job, plan: JobPlan, trained: TrainedModel, spec: JobSpec | None = None
    ) -> str:
        """Register a model; `spec` describes it, where that is not the spec of its job."""
        from phalanx.data.model_files import (
            PARAMETERS_FILE,
            ModelDescription,
            description_files,
            safetensors_header,
        )
        from phalanx.specs import spec_sha256

        sha256 = job.spec_sha256 if spec is None else spec_sha256(spec)
        spec = job.spec if spec is None else spec
        flat = trained.parameters.astype(trained.parameters.dtype.newbyteorder("<"), copy=False)
        description = ModelDescription(
            name=spec.output.model,
            job_id=job.id,
            manifest=self._manifest(plan.manifest_digest),
            manifest_digest=plan.manifest_digest,
            spec=spec,
            spec_sha256=sha256,
            layout=trained.layout,
            parameters_sha256=trained.parameters_sha256,
            steps=trained.steps if trained.best is None else trained.best.step,
            job_steps=trained.steps,
            best=trained.best,
            bit_identical=not plan.asynchronous,
            fingerprint="",
            dataset=spec.data.name,
            metrics=trained.metrics,
            tags=dict(spec.output.tags),
        )
        contents = description_files(description)
        contents[PARAMETERS_FILE] = safetensors_header(trained.layout) + flat.tobytes()
        model = self._models.register(
            model_service_pb2.ModelVersion(
                namespace=spec.namespace,
                name=spec.output.model,
                files=self._put_files(contents, spec.code.wheels),
                job_id=job.id,
                parameters_sha256=trained.parameters_sha256,
                bit_identical=not plan.asynchronous,
                metrics=trained.metrics,
                tags=dict(spec.output.tags),
            )
        )
        return f"{model.name}@{model.version}"

    def _put_files(
        self, contents: Mapping[str, bytes], wheels: Iterable[str]
    ) -> list[model_service_pb2.ModelFile]:
        """Keep the files of a model; return how they are listed, wheels last."""
        files = [
            model_service_pb2.ModelFile(path=path, digest=self.put_blob(data), size_bytes=len(data))
            for path, data in sorted(contents.items())
        ]
        return files + [
            model_service_pb2.ModelFile(
                path=wheel_path(digest),
                digest=digest,
                size_bytes=self._blob_path(digest).stat().st_size,
            )
            for digest in wheels
        ]


def job_code(spec: JobSpec, blob: Callable[[str], Path], folder: Path) -> Path | None:
    """Write the job's own code to a folder; return it, or None where the job has none.

    ``blob`` gives the file with a stored wheel. Raises InvalidArgument and NotFound.
    """
    if not spec.code.files and not spec.code.wheels:
        return None
    files = {name: text.encode() for name, text in spec.code.files.items()}
    wheels = {f"wheel {digest[:12]}": blob(digest) for digest in spec.code.wheels}
    write_code(folder, files, wheels)
    return folder
