"""Training one configuration in this process, and scoring it on rows that it has not seen.

What runs is what a job of its own would run: the leaves of a training in their order
(`phalanx.training.local`), the tasks of a program in theirs. So the bits are those of such a job.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.blas import one_blas_thread
from phalanx.data.described import described
from phalanx.data.statistics import manifest_mean_and_scale, standardise
from phalanx.models import DataSchema, build_model
from phalanx.programs import graph_of
from phalanx.programs.base import Outcome
from phalanx.programs.data import JobData, Result
from phalanx.programs.predicting import predictor_of
from phalanx.scoring.measures import class_metrics, class_part, number_metrics, number_part
from phalanx.specs import job_plan, prepare
from phalanx.sweeps.going_on import Earlier, of_rows, packed, prefix_in
from phalanx.sweeps.results import Results
from phalanx.sweeps.rows import Ints, PartOfData, blocks
from phalanx.tasks import is_program
from phalanx.training.local import run_job
from phalanx.training.schema import job_schema
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout

Array = NDArray[Any]


@dataclass(frozen=True)
class Fitted:
    """A trained model, and the data set that it was trained on."""

    spec: JobSpec
    layout: Layout
    parameters: Array
    metrics: Mapping[str, float]
    data: JobData
    kept: bytes = b""
    """What a training that was ended before its end goes on from; empty where it cannot."""


def fit(
    whole: JobData,
    job: JobSpec,
    positions: Ints | None,
    steps: int = 0,
    earlier: Earlier | None = None,
) -> Fitted:
    """Train a job on some rows of the split, None: on all of them; for so many steps, 0: to its
    end. It goes on from what an `earlier` call for fewer steps has kept, if that is there.
    Raises PhalanxError where it fails."""
    with Results() as results:
        part = PartOfData(whole, positions, results)
        dataset = described(part.manifest, whole.plan.manifest_digest)
        dataset.namespace, dataset.name = job.namespace, job.data.name.partition("@")[0]
        dataset.version = int(whole.spec.data.name.partition("@")[2] or 0)
        spec = prepare(job, dataset)
        part.take(spec, job_plan(spec, dataset, whole.plan.job_id))
        if is_program(spec):
            return _run_tasks(part, results)
        return _train(part, steps, of_rows(part.plan, positions), earlier)


def _train(part: PartOfData, steps: int, name: str, earlier: Earlier | None) -> Fitted:
    spec, plan = part.spec, part.plan
    reader = part.reader(spec.data.split, spec.train.dtype)
    model = build_model(spec, job_schema(plan, spec, part.manifest))
    with one_blas_thread():
        # The only split of the part is the one that trains: what it evaluates are its own rows.
        trained = run_job(
            plan,
            model,
            lambda _shard: reader,
            reader,
            until_step=steps or None,
            prefix=None if earlier is None else prefix_in(earlier, name),
        )
    kept = b"" if trained.prefix is None or not steps else packed(trained.prefix, name)
    return Fitted(spec, trained.layout, trained.parameters, trained.metrics, part, kept)


def _run_tasks(part: PartOfData, kept: Results) -> Fitted:
    from phalanx.programs.work import runner_of

    run = runner_of(part)
    results: list[Result] = []
    for task, needs in enumerate(graph_of(part.plan).needs):
        data = run(task, [results[needed] for needed in needs])
        results.append(part.result(kept.add(data), len(data)))
    outcome = Outcome.from_json(results[-1].read())
    assert outcome.model is not None, "only programs that leave models are tried"
    layout, vector = outcome.model.layout, outcome.model.vector(kept.read)
    parameters = np.frombuffer(vector, np.dtype(layout.dtype).newbyteorder("<"))
    return Fitted(part.spec, layout, parameters, dict(outcome.metrics), part)


def score(whole: JobData, fitted: Fitted, positions: Ints, metric: str) -> float | None:
    """Return the metric of rows by their numbers; None where it is not defined for them."""
    spec, dtype = fitted.spec, fitted.layout.dtype
    classes, manifest = whole.classes, fitted.data.manifest
    schema = DataSchema(manifest.features, classes, dtype)
    predictor: Any = (
        predictor_of(spec, fitted.layout, classes)
        if is_program(spec)
        else build_model(spec, schema)
    )
    scales = None
    if spec.train.model.standardise or spec.cascade.standardise:
        scales = manifest_mean_and_scale(manifest, dtype)
    parts = []
    with one_blas_thread():
        # Numbers to compare with are read as they are stored, whatever the model computes in.
        for batch in blocks(whole.reader(whole.spec.data.split, "float64"), positions):
            features = batch.features.astype(dtype)
            if scales is not None:
                standardise(features, *scales)
            outputs = predictor.predict(fitted.parameters, features)
            parts.append(_part(outputs, batch.targets, classes, metric))
    measure = class_metrics if classes else number_metrics
    value = measure(parts, [metric]).get(metric)
    return None if value is None or not np.isfinite(value) else float(value)


def _part(outputs: Array, targets: Array, classes: int, metric: str) -> dict[str, Array]:
    if not classes:
        return number_part(targets, outputs)
    if outputs.ndim == 1:
        # Decision values of two classes: the second where they are above 0.
        outputs = np.stack([-outputs, outputs], axis=1)
    return class_part(targets, outputs, classes, scores=metric == "auc")


def metrics_text(fitted: Fitted) -> str:
    """Return the metrics of a training as JSON, those that are numbers."""
    known = {name: value for name, value in fitted.metrics.items() if np.isfinite(value)}
    return json.dumps(known, sort_keys=True)
