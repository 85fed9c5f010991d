"""From the end of a job to a registered model: storage composes it, no tensor comes here.

Every part can be repeated after a crash: blobs are named by their content, and the model is created
under a request id made from the job's id.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from coordinator.control.core.facts import JobFacts
from coordinator.control.store import COMPOSE_TIMEOUT_S, Store
from phalanx.data.manifest import DatasetManifest
from phalanx.data.model_files import (
    PARAMETERS_FILE,
    ModelDescription,
    description_files,
    safetensors_header,
)
from phalanx.errors import DataLoss
from phalanx.layouts import model_layout, size_bytes
from phalanx.programs import OUTCOME_BYTES_MAX, Outcome, Piece
from phalanx.specs import spec_sha256
from phalanx.tasks import OUTCOME
from phalanx.training.best import Kept, kept_in
from phalanx.v1 import model_service_pb2
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.job_pb2 import Result
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout
from phalanx.wheels import wheel_path

RESULT_RECORD_BYTES_MAX = 3 * 1024 * 1024
"""Control writes a result into one record of its journal, and tells it in one message."""

LIBRARIES = ("numpy", "phalanx", "scipy")


@dataclass(frozen=True)
class _Made:
    """How a model came about."""

    steps: int
    best: Kept | None
    metrics: dict[str, float]
    bit_identical: bool


class ModelWriter:
    """Writes the model of one finished job after another."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def write(
        self, facts: JobFacts, final: pb.CheckpointManifest, *, bit_identical: bool
    ) -> Result:
        """Compose and register the model. Raises PhalanxError; may be called again."""
        root = _root_state(final.root_state)
        best = kept_in(root)
        layout = model_layout(facts.plan.layout)
        slices = _parameter_slices(final, best, size_bytes(layout))
        metrics = _metrics(root) if best is None else dict(best.metrics)
        made = _Made(final.step, best, metrics, bit_identical)
        created = await self._register(facts, layout, slices, made)
        return Result(
            model=f"{created.name}@{created.version}",
            parameters_sha256=created.parameters_sha256,
            bit_identical=bit_identical,
            metrics=metrics,
            steps=final.step,
            best=None if best is None else best.message(),
            # Reports of the root say so, too, but may be late or lost; the manifest is the end.
            examples_lost=int(root.get("examples_lost", 0)),
            examples_doubled=int(root.get("examples_doubled", 0)),
        )

    async def write_outcome(
        self, facts: JobFacts, final: pb.CheckpointManifest, *, bit_identical: bool
    ) -> Result:
        """Register what a program leaves: its model, if it has one, and its files.

        Raises PhalanxError; may be called again.
        """
        root = _root_state(final.root_state)
        digest = str(root.get(OUTCOME, ""))
        stored = await self._store.get_blob(digest, bytes_max=OUTCOME_BYTES_MAX)
        outcome = await asyncio.to_thread(Outcome.from_json, stored)
        metrics = {**_metrics(root), **outcome.metrics}
        result = Result(steps=final.step, metrics=metrics, bit_identical=bit_identical)
        for name, file in sorted(outcome.files.items()):
            result.files.add(name=name, digest=file.digest, size_bytes=file.size_bytes)
        if result.ByteSize() > RESULT_RECORD_BYTES_MAX:
            text = f"the result of the job takes {result.ByteSize()} bytes in a record, too many"
            raise DataLoss(text, reason="OUTCOME_UNREADABLE")
        if outcome.model is not None:
            pieces = [_blob_piece(each) for each in outcome.model.pieces]
            made = _Made(final.step, None, metrics, bit_identical)
            layout, described = outcome.model.layout, outcome.model.spec_of(facts.spec)
            created = await self._register(facts, layout, pieces, made, described)
            result.model = f"{created.name}@{created.version}"
            result.parameters_sha256 = created.parameters_sha256
        return result

    async def _register(
        self,
        facts: JobFacts,
        layout: Layout,
        pieces: list[pb.BlobPiece],
        made: _Made,
        spec: JobSpec | None = None,
    ) -> model_service_pb2.ModelVersion:
        """Compose a model of the pieces of its flat vector; return it as it is registered.

        `spec` is what it is described with, where that is not the spec of its job.
        """
        plan, best = facts.plan, made.best
        sha256 = plan.spec_sha256 if spec is None else spec_sha256(spec)
        spec = facts.spec if spec is None else spec
        parameters = await self._compose(pieces)
        header = pb.BlobPiece(inline=safetensors_header(layout))
        composed = await self._compose([header, *pieces])
        manifest_json = await self._store.get_blob(plan.manifest_digest)
        description = ModelDescription(
            name=spec.output.model,
            job_id=facts.job_id,
            manifest=DatasetManifest.from_json(manifest_json),
            manifest_digest=plan.manifest_digest,
            spec=spec,
            spec_sha256=sha256,
            layout=layout,
            parameters_sha256=parameters.digest,
            steps=made.steps if best is None else best.step,
            job_steps=made.steps,
            best=best,
            bit_identical=made.bit_identical,
            fingerprint=facts.fingerprint,
            dataset=spec.data.name,
            libraries=_versions(),
            code_digests=dict(plan.code_digests),
            metrics=made.metrics,
            tags=dict(spec.output.tags),
        )
        model = model_service_pb2.ModelVersion(
            namespace=spec.namespace,
            name=spec.output.model,
            job_id=facts.job_id,
            parameters_sha256=parameters.digest,
            bit_identical=made.bit_identical,
            metrics=made.metrics,
            tags=spec.output.tags,
        )
        model.files.add(
            path=PARAMETERS_FILE, digest=composed.digest, size_bytes=composed.size_bytes
        )
        await self._add_files(model, description)
        return await self._create(model)

    async def _add_files(
        self, model: model_service_pb2.ModelVersion, description: ModelDescription
    ) -> None:
        """Add what stands beside the parameters: descriptions, and the code of the user."""
        for path, content in sorted(description_files(description).items()):
            digest, size = await self._store.put_blob(content)
            model.files.add(path=path, digest=digest, size_bytes=size)
        for digest in description.spec.code.wheels:
            # Whoever predicts needs the code; it is stored already, so its bytes do not come here.
            stored = await self._compose([pb.BlobPiece(slice=pb.BlobSlice(digest=digest))])
            model.files.add(
                path=wheel_path(digest), digest=stored.digest, size_bytes=stored.size_bytes
            )

    async def _compose(self, pieces: list[pb.BlobPiece]) -> pb.ComposeBlobResponse:
        request = pb.ComposeBlobRequest(pieces=pieces)
        answer = await self._store.call(
            self._store.storage.ComposeBlob, request, timeout_s=COMPOSE_TIMEOUT_S
        )
        assert isinstance(answer, pb.ComposeBlobResponse)
        return answer

    async def _create(
        self, model: model_service_pb2.ModelVersion
    ) -> model_service_pb2.ModelVersion:
        request = model_service_pb2.CreateModelRequest(
            model=model, request_id=f"model-of-{model.job_id}"
        )
        answer = await self._store.call(self._store.models.CreateModel, request)
        assert isinstance(answer, model_service_pb2.CreateModelResponse)
        return answer.model


def _parameter_slices(
    final: pb.CheckpointManifest, best: Kept | None, wanted_bytes: int
) -> list[pb.BlobPiece]:
    """Where the model's parameters stand in the parts of a checkpoint, in the order of the ranges:
    the first bytes of all, as the workspace of the job comes after them.

    Raises DataLoss where those of the best evaluation are not there.
    """
    earlier = best is not None and best.step != final.step
    if any(bool(part.best_offset) != earlier for part in final.parts):
        raise DataLoss(
            f"the final checkpoint, of step {final.step}, does not hold the parameters of the best "
            "evaluation as its root says"
        )
    slices, left_bytes = [], wanted_bytes
    for part in sorted(final.parts, key=lambda each: each.range):
        taken_bytes = min(part.parameters_length, left_bytes)
        left_bytes -= taken_bytes
        if taken_bytes:
            offset = part.best_offset or part.parameters_offset
            piece = pb.BlobSlice(digest=part.digest, offset=offset, length=taken_bytes)
            slices.append(pb.BlobPiece(slice=piece))
    return slices


def _blob_piece(piece: Piece) -> pb.BlobPiece:
    part = pb.BlobSlice(digest=piece.digest, offset=piece.offset, length=piece.length)
    return pb.BlobPiece(slice=part)


def stop_reason(final: pb.CheckpointManifest) -> str:
    """Why the job of a final checkpoint ended, as its root kept it; "" where it kept nothing."""
    return str(_root_state(final.root_state).get("stop_reason", ""))


def read_metrics(root_state: str) -> dict[str, float]:
    """Return the metrics that the root kept with the final checkpoint."""
    return _metrics(_root_state(root_state))


def _root_state(text: str) -> dict[str, Any]:
    """What the root kept with the checkpoint."""
    try:
        state = json.loads(text)
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _metrics(root: dict[str, Any]) -> dict[str, float]:
    metrics = root.get("metrics", {})
    return {str(name): float(metrics[name]) for name in metrics}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
