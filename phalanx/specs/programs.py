"""Job files of programs of tasks: what all of them may say, their defaults, their plan."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.programs import graph_of, program_of
from phalanx.specs import task_sets
from phalanx.specs.canonical import spec_sha256
from phalanx.specs.fields import is_set
from phalanx.v1 import dataset_service_pb2, job_pb2, training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec

_REFUSED = {
    "code": "is not run by this program; leave it out",
    "output.best": "is for training, which is evaluated as it goes on; leave it out",
    "data.class_weights": "is for training; leave it out",
    "data.oversample": "is for training; leave it out",
}


def violations(spec: JobSpec) -> Iterator[Violation]:
    """Yield what is wrong with a program; of raw as well as resolved specs."""
    program = program_of(spec)
    for path, why in _REFUSED.items():
        if is_set(spec, path) and not (path == "code" and not spec.code.ByteSize()):
            yield Violation(path, why)
    if not program.leaves_model:
        for path in ("output.model", "output.tags"):
            if is_set(spec, path):
                yield Violation(path, "is for models, and this program leaves none; leave it out")
    yield from program.violations(spec)


def job_plan(
    spec: JobSpec, dataset: dataset_service_pb2.Dataset, job_id: str
) -> training_pb2.JobPlan:
    """Return what aggregators and workers need to know of a resolved program."""
    plan = training_pb2.JobPlan(
        job_id=job_id,
        spec=spec.SerializeToString(deterministic=True),
        spec_sha256=spec_sha256(spec),
        shards=spec.data.shards,
        train_rows=dataset.rows.get(spec.data.split, 0),
        range_count=1,
        manifest_digest=dataset.manifest_digest,
        bitwise=spec.reproducibility.WhichOneof("mode") == "bitwise",
    )
    plan.total_steps = graph_of(plan).count
    return plan


def plan(
    spec: JobSpec,
    dataset: dataset_service_pb2.Dataset,
    eligible_workers: int = 0,
    model_bytes: int = 0,
) -> job_pb2.Plan:
    """Return the Plan of a resolved program, for people; see `phalanx.specs.plan.plan`."""
    program = program_of(spec)
    count = job_plan(spec, dataset, "").total_steps
    return job_pb2.Plan(
        steps=count,
        worker_bytes=program.worker_bytes(spec, dataset) + model_bytes,
        eligible_workers=eligible_workers,
        warnings=[*program.warnings(spec, dataset), *task_sets.too_few(count, eligible_workers)],
    )
