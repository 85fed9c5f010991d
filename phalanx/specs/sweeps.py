"""Configurations of a sweep as the jobs that they mean: the first that is no right job is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phalanx.errors import InvalidArgument, Unimplemented, Violation
from phalanx.layouts import ITEM_BYTES
from phalanx.programs.base import RESULT_BYTES_MAX
from phalanx.specs import catalog
from phalanx.specs.canonical import canonical_json
from phalanx.specs.parts import commits_one_by_one, optimizer_vectors
from phalanx.sweeps.configurations import Configuration, configurations, job_of, seeded
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

_OF_THE_SWEEP = ("name", "namespace", "data.name", "data.split", "data.target")
"""Fields that a configuration takes from its sweep, where they are complained about."""

ROOT_COPIES = 3
"""Of the parameters, in a training in one process: the next version, and sums; measured."""

_UNSCORED = {
    "k_means": "finds clusters, which no held-out row can tell right or wrong",
    "pca": "finds directions, which no held-out row can tell right or wrong",
    "custom": "runs code of its own; a sweep tries built-in models",
    "torch": "runs code of its own; a sweep tries built-in models",
}


def violations(spec: JobSpec) -> Iterator[Violation]:
    """Yield what is wrong with configurations whatever the data, of a sweep that is right in its
    own fields."""
    yield from _first_wrong(spec, None)


def violations_against(spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
    """Yield what is wrong between configurations and the smallest part that one is trained on."""
    rows = dataset.rows.get(spec.data.split, 0)
    part = Dataset()
    part.CopyFrom(dataset)
    part.rows.clear()
    part.rows[spec.data.split] = rows - -(-rows // max(1, spec.sweep.folds))
    yield from _first_wrong(spec, part)


def trial_bytes(spec: JobSpec, dataset: Dataset) -> int:
    """Return about how much memory the largest of the jobs that a resolved sweep tries takes.

    It runs in one process: what its leaves need, and what else a cluster has at aggregators.
    """
    from phalanx.specs.plan import plan
    from phalanx.specs.prepare import prepare

    def elements(job: JobSpec) -> int:
        return catalog.element_count(job.train.model, dataset.features, len(dataset.classes))

    job = prepare(max(_models(spec), key=elements), dataset)
    needed = plan(job, dataset).worker_bytes
    if not job.HasField("train"):
        return needed
    copies = ROOT_COPIES + optimizer_vectors(job.train.optimizer)
    return needed + copies * elements(job) * ITEM_BYTES.get(job.train.dtype, 4)


def _models(spec: JobSpec) -> Iterator[JobSpec]:
    """Yield a job of each model that a sweep tries."""
    paths = [path for path in spec.sweep.grid if path == "train" or path.startswith("train.model")]
    seen: set[str] = set()
    for configuration in configurations(spec):
        key = canonical_json({path: configuration.values[path] for path in paths})
        if key not in seen:
            seen.add(key)
            yield job_of(spec, configuration)


def _first_wrong(spec: JobSpec, dataset: Dataset | None) -> Iterator[Violation]:
    """Yield what is wrong with the first configuration that is no right job."""
    for configuration in configurations(spec):
        found = [
            each
            for each in _job_violations(spec, configuration, dataset)
            if each.field not in _OF_THE_SWEEP
        ]
        if found:
            yield from (_told(each, configuration) for each in found)
            return


def _told(violation: Violation, configuration: Configuration) -> Violation:
    """Return what is wrong with the job of a configuration as what is wrong with the sweep: with
    the value of the grid that it is said of, else with the base where it has these values."""
    field, values = violation.field, dict(configuration.values)
    path = _path_of(field, values)
    if path is None:
        where, message = f"sweep.base.{field}" if field else "sweep.base", violation.message
    else:
        where = f'sweep.grid["{path[:80]}"]'
        below = f"{field[len(path) + 1 :]} " if field.startswith(f"{path}.") else ""
        message = f"{canonical_json(values.pop(path))[:80]}: {below}{violation.message}"
    others = str(Configuration(configuration.number, values))[:200]
    return Violation(where, f"{message} (where {others})" if others else message)


def _path_of(field: str, values: Mapping[str, Any]) -> str | None:
    """Return the path of the grid that sets a field."""
    found = [path for path in values if f"{field}.".startswith(f"{path}.")]
    return max(found, key=len, default=None)


def _unreadable(spec: JobSpec, configuration: Configuration) -> str:
    """Return the first path with which there is no such job."""
    values: dict[str, Any] = {}
    for path, value in configuration.values.items():
        values[path] = value
        try:
            job_of(spec, Configuration(configuration.number, values))
        except InvalidArgument:
            return path
    return ""


def _job_violations(
    spec: JobSpec, configuration: Configuration, dataset: Dataset | None
) -> Iterator[Violation]:
    from phalanx.specs.prepare import check_spec, prepare  # which check sweeps with this

    try:
        job = job_of(spec, configuration)
    except InvalidArgument as error:
        yield Violation(_unreadable(spec, configuration), error.message)
        return
    try:
        if dataset is None:
            check_spec(job)
        else:
            yield from _too_large(prepare(job, dataset), dataset)
    except (InvalidArgument, Unimplemented) as error:
        yield from error.violations or (Violation("", error.message),)
        return
    if dataset is None:
        yield from _not_swept(job, spec.sweep.objective.metric)


def _too_large(job: JobSpec, dataset: Dataset) -> Iterator[Violation]:
    """Yield that the model would not fit into the result of the task that trains the winner; how
    large forests and cascades become is known of trained ones only."""
    model, itemsize = job.train.model, ITEM_BYTES.get(job.train.dtype, 4)
    size = itemsize * catalog.element_count(model, dataset.features, len(dataset.classes))
    if size > RESULT_BYTES_MAX:
        yield Violation(
            f"train.model.{model.WhichOneof('kind')}",
            f"has {size} bytes of parameters; a sweep leaves a model of at most {RESULT_BYTES_MAX}",
        )


def _not_swept(job: JobSpec, metric: str) -> Iterator[Violation]:
    """Yield what a job may say in itself, but not in a sweep."""
    train = job.train
    kind = train.model.WhichOneof("kind") or ""
    if kind in _UNSCORED:
        yield Violation(f"train.model.{kind}", _UNSCORED[kind])
    if train.HasField("privacy"):
        message = "is for one job: each trial would spend as much again; leave it out"
        yield Violation("train.privacy", message)
    if commits_one_by_one(train):
        mode = "asynchronous" if train.HasField("asynchronous") else "stale"
        message = "has another result each time, which cannot be compared; use synchronous"
        yield Violation(f"train.{mode}", message)
    if train.stop.HasField("wall_time"):
        message = "makes equal jobs end at different steps; use steps or epochs"
        yield Violation("train.stop.wall_time", message)
    if train.HasField("start"):
        yield Violation("train.start", "trials start from the seed; leave it out")
    ranks_only = kind == "linear_svm" or job.HasField("cascade")
    if metric == "log_loss" and ranks_only:
        name = kind or "cascade"
        yield Violation(
            f"train.model.{kind}" if kind else "cascade",
            f"log_loss needs probabilities, and {name} has none; use accuracy, f1 or auc",
        )
    if not seeded(job) and job.seed:
        yield Violation("seed", "changes nothing, as nothing is drawn; leave it out")
