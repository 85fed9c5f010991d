"""Models as finished jobs leave them."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.data.manifest import DatasetManifest
from phalanx.data.model_files import ModelDescription, description_files, safetensors_header
from phalanx.models.base import Predictor
from phalanx.v1.job_spec_pb2 import JobSpec


def write_finished_model(
    folder: Path,
    manifest: DatasetManifest,
    spec: JobSpec,
    model: Predictor,
    parameters: Any = None,
    **more: Any,
) -> ModelDescription:
    """Write a model, whose parameters are random if none are given; return what is told of it."""
    if parameters is None:
        generator = np.random.Generator(np.random.Philox(5))
        parameters = generator.normal(size=model.layout.element_count)
    parameters = parameters.astype(model.layout.dtype)
    description = ModelDescription(
        name="income",
        job_id="job-1",
        manifest=manifest,
        manifest_digest="d" * 64,
        spec=spec,
        spec_sha256="e" * 64,
        layout=model.layout,
        parameters_sha256=hashlib.sha256(parameters.tobytes()).hexdigest(),
        steps=12,
        job_steps=12,
        bit_identical=True,
        fingerprint="f" * 64,
        **more,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in description_files(description).items():
        (folder / name).write_bytes(data)
    tensors = safetensors_header(model.layout) + parameters.tobytes()
    (folder / "model.safetensors").write_bytes(tensors)
    return description
