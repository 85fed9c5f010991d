"""From a caller's spec to a job: checked, resolved, planned; its code stored, its data pinned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from coordinator.control.config import ControlConfig
from coordinator.control.continuing import find_origin, gone
from coordinator.control.core import kinds
from coordinator.control.core.eligibility import misfit
from coordinator.control.core.facts import JobFacts
from coordinator.control.core.state import Core
from coordinator.control.store import Store
from phalanx import specs
from phalanx.data.choice import RawColumns
from phalanx.data.manifest import DatasetManifest
from phalanx.errors import InvalidArgument, NotFound, PermissionDenied, Violation
from phalanx.ids import new_id, split_version_name
from phalanx.keys.caller import current_caller
from phalanx.privacy.secret import new_secret
from phalanx.privacy.settings import is_private
from phalanx.specs.starting import (
    LENGTH_BYTES,
    Shapes,
    check_columns,
    check_shapes,
    description_digest,
    header_bytes,
    known_shapes,
    stored_shapes,
    trained_on,
)
from phalanx.v1 import (
    dataset_service_pb2,
    job_pb2,
    job_spec_pb2,
    model_service_pb2,
)
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.control_journal_pb2 import JobSnapshot, JobSubmitted
from phalanx.wheels import STREAM as WHEELS
from phalanx.wheels import wheel_path

MODEL_FILE = "model.safetensors"

AnswerT = TypeVar("AnswerT")


class Submissions:
    """Prepares submissions against storage."""

    def __init__(self, config: ControlConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self.under_way: set[str] = set()
        """Jobs that may be pinned for and not be taken yet."""

    async def prepare(
        self, spec: job_spec_pb2.JobSpec, core: Core, submitter: str
    ) -> tuple[JobSubmitted, dataset_service_pb2.Dataset | None]:
        """Return what is journalled of a new job, and its data set if it reads one.

        Raises InvalidArgument (every wrong field), Unimplemented, NotFound, PermissionDenied,
        Unavailable.
        """
        self._check_code_allowed(spec)
        dataset = await self._dataset(spec) if specs.reads_dataset(spec) else None
        columns = await self._columns(spec, dataset)
        prepare = partial(specs.prepare, dataset=dataset, columns=columns)
        resolved = await _in_turn(prepare, spec, takes_long=columns is not None)
        model_files, taken = dict[str, str](), specs.Taken()
        if specs.model_name(resolved):
            assert dataset is not None, "what goes through a model is read from a data set"
            model_files, taken = await self._take_model(resolved, dataset)
            columns = await self._columns(resolved, dataset)
        if dataset is not None:
            dataset = specs.as_chosen(dataset, resolved.data, columns)
        await self._check_wheels(list(spec.code.wheels))
        job_id = new_id(resolved.name)
        start_model_digest = ""
        if resolved.train.start.WhichOneof("from") == "model":
            model = await self._start_model(resolved)
            specs.resolve_start_model(resolved, model)
            start_model_digest = _parameters_of(model)
            assert dataset is not None, "a job that trains reads data"
            await self._check_start_model(start_model_digest, known_shapes(resolved, dataset))
            await self._check_start_columns(model, resolved, dataset)
        origin = None
        if resolved.train.start.WhichOneof("from") == "job":
            origin = await find_origin(resolved, core, self._store)
        plan = await _in_turn(partial(specs.job_plan, dataset=dataset, job_id=job_id), resolved)
        plan.spec = b""  # the journal keeps the spec once, beside the plan
        plan.start_model_digest = start_model_digest
        plan.model_files.update(model_files)
        announce = partial(specs.plan, dataset=dataset, model_bytes=taken.size_bytes)
        announced = await _in_turn(announce, resolved)
        submitted = JobSubmitted(
            job_id=job_id,
            spec=resolved,
            plan=plan,
            announced_plan=announced,
            submitter=submitter,
            worker_bytes=announced.worker_bytes,
            model_libraries=taken.libraries,
        )
        if is_private(resolved.train):
            submitted.secret = new_secret()
        if origin is not None:
            origin.take_over(submitted)
        eligible = count_eligible(core, submitted)
        shown = await _in_turn(partial(announce, eligible_workers=eligible), resolved)
        submitted.announced_plan.CopyFrom(shown)
        return submitted, dataset

    async def store(
        self, submitted: JobSubmitted, dataset: dataset_service_pb2.Dataset | None
    ) -> None:
        """Store the job's code and pin everything that it needs. Raises PhalanxError."""
        plan, code = submitted.plan, submitted.spec.code
        for path, source in sorted(code.files.items()):
            digest, _ = await self._store.put_blob(source.encode())
            plan.code_digests[path] = digest
        for digest in code.wheels:
            plan.code_digests[wheel_path(digest)] = digest
        pins = []
        if dataset is not None:
            version = pb.PinnedVersion(
                namespace=dataset.namespace, name=dataset.name, version=dataset.version
            )
            pins.append(pb.Pin(dataset=version))
        pins += [pb.Pin(blob=digest) for digest in sorted(set(plan.code_digests.values()))]
        if named := specs.stored_model(submitted.spec):
            pins.append(pb.Pin(model=_version(submitted.spec.namespace, named)))
        checkpoint = submitted.continued.checkpoint
        taken = {part.digest for part in checkpoint.parts}
        pins += [pb.Pin(blob=digest) for digest in sorted(taken)]
        request = pb.SetPinsRequest(holder=submitted.job_id, pins=pins, fence=self._store.fence)
        try:
            await self._store.call(self._store.storage.SetPins, request)
        except NotFound as error:
            if any(digest in error.message for digest in taken):
                raise gone(checkpoint) from error
            raise

    async def discard(self, job_id: str) -> None:
        """Let go of what was pinned for a job that was not taken."""
        request = pb.SetPinsRequest(holder=job_id, fence=self._store.fence)
        await self._store.call(self._store.storage.SetPins, request)

    def _check_code_allowed(self, spec: job_spec_pb2.JobSpec) -> None:
        if (spec.code.files or spec.code.wheels) and not self._config.code_allowed():
            raise PermissionDenied(
                "this cluster is open to other machines without keys and takes no code with jobs; "
                "give it certificates and tokens, install the code on the workers, or use a "
                "cluster that listens on 127.0.0.1",
                reason="CODE_NOT_ALLOWED",
                violations=[Violation("code", "is not allowed on this cluster")],
            )

    async def _take_model(
        self, spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset
    ) -> tuple[dict[str, str], specs.Taken]:
        """Write the model that a program takes into its spec; return the digests of its files, and
        what it asks of workers.

        Its code runs as that of any job, so it takes the same permission.
        """
        field = specs.model_field(spec)
        model = await self._model(spec, specs.model_name(spec), field)
        description = await self._store.get_blob(description_digest(model))
        stored = await self._store.get_blob(dataset.manifest_digest)
        manifest = await asyncio.to_thread(DatasetManifest.from_json, stored)
        taken = specs.take_model(spec, model, description, manifest)
        self._check_code_allowed(spec)
        if spec.code.files or spec.code.wheels:
            current_caller().check_code(f"spec.{field}")
        return {file.path: file.digest for file in model.files}, taken

    async def _check_wheels(self, digests: list[str]) -> None:
        """Refuse what was never added as a wheel, or is gone. Raises NotFound, naming each."""
        if not digests:
            return
        added = {wheel_of(record.payload) async for record in self._store.read(WHEELS, 0)}
        request = pb.CheckBlobsRequest(digests=digests)
        answer = await self._store.call(self._store.storage.CheckBlobs, request)
        violations = [
            Violation(
                f"code.wheels[{index}]",
                f"there is no wheel {digest[:12]}…; add it with `phalanx code add FILE.whl`, and "
                "`phalanx code list` shows what there is",
            )
            for index, digest in enumerate(digests)
            if digest not in added or digest in answer.missing
        ]
        if violations:
            raise NotFound(violations[0].message, reason="WHEEL_NOT_FOUND", violations=violations)

    async def _dataset(self, spec: job_spec_pb2.JobSpec) -> dataset_service_pb2.Dataset:
        if not await _in_turn(specs.names_dataset, spec):
            await _in_turn(specs.check_spec, spec)
        try:
            return await self._look_up(spec)
        except NotFound as error:
            await _in_turn(partial(specs.check_spec, also=error.violations), spec)
            raise

    async def _look_up(self, spec: job_spec_pb2.JobSpec) -> dataset_service_pb2.Dataset:
        namespace = spec.namespace or "default"
        request = dataset_service_pb2.GetDatasetRequest(namespace=namespace, name=spec.data.name)
        try:
            answer = await self._store.call(self._store.datasets.GetDataset, request)
        except NotFound as error:
            message = (
                f"there is no data set {spec.data.name!r} in the namespace {namespace!r}; "
                "`phalanx data list` shows what there is"
            )
            raise NotFound(
                message, reason="DATASET_NOT_FOUND", violations=[Violation("data.name", message)]
            ) from error
        assert isinstance(answer, dataset_service_pb2.GetDatasetResponse)
        return answer.dataset

    async def _columns(
        self, spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset | None
    ) -> RawColumns | None:
        """The columns of the data set, where the job chooses some: only its manifest has them."""
        if dataset is None or not specs.chooses_columns(spec):
            return None
        return await self._all_columns(dataset)

    async def _all_columns(self, dataset: dataset_service_pb2.Dataset) -> RawColumns:
        stored = await self._store.get_blob(dataset.manifest_digest)
        # Large where there are many features: heartbeats have their turn.
        return RawColumns.of(await asyncio.to_thread(DatasetManifest.from_json, stored))

    async def _start_model(self, spec: job_spec_pb2.JobSpec) -> model_service_pb2.ModelVersion:
        return await self._model(spec, spec.train.start.model, "train.start.model")

    async def _model(
        self, spec: job_spec_pb2.JobSpec, name: str, field: str
    ) -> model_service_pb2.ModelVersion:
        request = model_service_pb2.GetModelRequest(namespace=spec.namespace, name=name)
        try:
            answer = await self._store.call(self._store.models.GetModel, request)
        except NotFound as error:
            message = f"there is no model {name!r} in the namespace {spec.namespace!r}"
            raise NotFound(
                message,
                reason="MODEL_NOT_FOUND",
                violations=[Violation(field, message)],
            ) from error
        assert isinstance(answer, model_service_pb2.GetModelResponse)
        return answer.model

    async def _check_start_model(self, digest: str, wanted: Shapes) -> None:
        """Refuse a model that does not fit. User code is built, and compared, by a worker."""
        if wanted:
            size = header_bytes(await self._part(digest, 0, LENGTH_BYTES))
            header = await self._part(digest, LENGTH_BYTES, size)
            check_shapes(stored_shapes(header), wanted)

    async def _check_start_columns(
        self,
        model: model_service_pb2.ModelVersion,
        spec: job_spec_pb2.JobSpec,
        dataset: dataset_service_pb2.Dataset,
    ) -> None:
        """Refuse a model of other columns than those that the job chose, or does not choose."""
        digest = description_digest(model)
        if not digest:
            return
        seen = await asyncio.to_thread(trained_on, await self._store.get_blob(digest))
        if seen.needs_columns(spec.data):
            check_columns(seen, spec.data, await self._all_columns(dataset))

    async def _part(self, digest: str, offset: int, length: int) -> bytes:
        """Return a part of a blob; nothing where the blob ends before."""
        try:
            return await self._store.get_blob(digest, offset, length)
        except InvalidArgument:
            return b""


def _version(namespace: str, named: str) -> pb.PinnedVersion:
    """Return which model a resolved spec of a namespace names."""
    namespace, name, version = split_version_name(named, namespace)
    return pb.PinnedVersion(namespace=namespace, name=name, version=int(version))


def _parameters_of(model: model_service_pb2.ModelVersion) -> str:
    """Return the digest of a model's parameters. Raises InvalidArgument where it has none."""
    for file in model.files:
        if file.path == MODEL_FILE:
            return file.digest
    raise InvalidArgument(
        f"model {model.name!r} has no {MODEL_FILE}",
        violations=[Violation("train.start.model", "holds no parameters")],
    )


async def _in_turn(
    work: Callable[[job_spec_pb2.JobSpec], AnswerT],
    spec: job_spec_pb2.JobSpec,
    *,
    takes_long: bool = False,
) -> AnswerT:
    """Return what is made of a spec. Where it takes long, as of thousands of tasks, or of the jobs
    that a sweep tries, heartbeats have their turn."""
    if takes_long or spec.HasField("sweep") or spec.HasField("tasks"):
        return await asyncio.to_thread(work, spec)
    return work(spec)


def wheel_of(record: bytes) -> str:
    """Return the SHA-256 in a record of the stream of wheels; empty where there is none."""
    try:
        return str(json.loads(record)["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def count_eligible(core: Core, submitted: JobSubmitted) -> int:
    """Return how many of the workers that are there could run a job."""
    facts = JobFacts(JobSnapshot(submitted=submitted))
    fitting = [
        worker.hello
        for worker in core.workers.values()
        if worker.state == WorkerView.STATE_READY and not misfit(facts, worker)
    ]
    kind = kinds.best(facts, fitting) if submitted.plan.bitwise else None
    return sum(not kinds.difference(kind, hello) for hello in fitting)


def announced(submitted: JobSubmitted) -> job_pb2.Plan:
    """Return the plan that the caller is told."""
    return submitted.announced_plan
