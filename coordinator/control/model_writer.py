"""From a final checkpoint to a registered model: storage composes it, no tensor comes here.

Every part can be repeated after a crash: blobs are named by their content, and the model is created
under a request id made from the job's id.
"""

from __future__ import annotations

import json
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
from phalanx.training.best import Kept, kept_in
from phalanx.v1 import model_service_pb2
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.job_pb2 import Result
from phalanx.wheels import wheel_path

LIBRARIES = ("numpy", "phalanx", "scipy")


class ModelWriter:
    """Writes the model of one finished job after another."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def write(
        self, facts: JobFacts, final: pb.CheckpointManifest, *, bit_identical: bool
    ) -> Result:
        """Compose and register the model. Raises PhalanxError; may be called again."""
        spec, plan = facts.spec, facts.plan
        root = _root_state(final.root_state)
        best = kept_in(root)
        layout = model_layout(plan.layout)
        slices = _parameter_slices(final, best, size_bytes(layout))
        parameters = await self._compose(slices)
        header = pb.BlobPiece(inline=safetensors_header(layout))
        composed = await self._compose([header, *slices])
        manifest_json = await self._store.get_blob(plan.manifest_digest)
        metrics = _metrics(root) if best is None else dict(best.metrics)
        description = ModelDescription(
            name=spec.output.model,
            job_id=facts.job_id,
            manifest=DatasetManifest.from_json(manifest_json),
            manifest_digest=plan.manifest_digest,
            spec=spec,
            spec_sha256=plan.spec_sha256,
            layout=layout,
            parameters_sha256=parameters.digest,
            steps=final.step if best is None else best.step,
            job_steps=final.step,
            best=best,
            bit_identical=bit_identical,
            fingerprint=facts.fingerprint,
            dataset=spec.data.name,
            libraries=_versions(),
            code_digests=dict(plan.code_digests),
            metrics=metrics,
            tags=dict(spec.output.tags),
        )
        model = model_service_pb2.ModelVersion(
            namespace=spec.namespace,
            name=spec.output.model,
            job_id=facts.job_id,
            parameters_sha256=parameters.digest,
            bit_identical=bit_identical,
            metrics=metrics,
            tags=spec.output.tags,
        )
        model.files.add(
            path=PARAMETERS_FILE, digest=composed.digest, size_bytes=composed.size_bytes
        )
        await self._add_files(model, description)
        created = await self._create(model)
        return Result(
            model=f"{created.name}@{created.version}",
            parameters_sha256=parameters.digest,
            bit_identical=bit_identical,
            metrics=metrics,
            steps=final.step,
            best=None if best is None else best.message(),
            # Reports of the root say so, too, but may be late or lost; the manifest is the end.
            examples_lost=int(root.get("examples_lost", 0)),
            examples_doubled=int(root.get("examples_doubled", 0)),
        )

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
