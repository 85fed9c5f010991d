"""What the model of a job has to know of its data."""

from __future__ import annotations

import numpy as np

from phalanx.data.choice import choose
from phalanx.data.manifest import DatasetManifest
from phalanx.data.statistics import manifest_mean_and_scale
from phalanx.models import DataSchema
from phalanx.specs.columns import features_of_shards
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan


def job_schema(plan: JobPlan, spec: JobSpec, manifest: DatasetManifest) -> DataSchema:
    """Return the schema of the columns that a job trains on, with its rows and shards."""
    chosen = choose(manifest, spec.data.features).manifest
    return DataSchema(
        features=chosen.features,
        classes=len(chosen.classes),
        dtype=spec.train.dtype or "float32",
        rows=plan.train_rows,
        shards=plan.shards,
        batch_rows=plan.rows_per_leaf,
        features_of_shards=features_of_shards(spec.data, manifest),
        spread=_spread(spec, chosen) if spec.train.model.HasField("boosting") else (),
    )


def _spread(spec: JobSpec, chosen: DatasetManifest) -> tuple[tuple[float, ...], ...]:
    """What boosting places its bins by; dense rows that are standardised are as they should be."""
    scales = manifest_mean_and_scale(chosen, "float64")
    standardised, sparse = spec.train.model.standardise, chosen.format == "csr"
    if scales is None or (standardised and not sparse):
        return ()
    mean, scale = scales
    if standardised:  # sparse rows are scaled and not centred
        mean, scale = mean * scale, np.ones_like(scale)
    return tuple(mean.tolist()), tuple(scale.tolist())
