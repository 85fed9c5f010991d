"""What a job may say: every wrong field at once, in the order of the spec.

`validate` needs the spec alone and takes raw as well as resolved specs; `validate_against` needs
the resolved spec and its data set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from google.protobuf.descriptor import FieldDescriptor

from phalanx.data.choice import RawColumns
from phalanx.errors import InvalidArgument, Violation
from phalanx.files import LENGTH_RULE, is_too_long
from phalanx.ids import (
    SHORT_NAME_RULE,
    is_blob_id,
    is_name,
    is_short_name,
    reference_complaint,
)
from phalanx.layouts import ITEM_BYTES
from phalanx.needs import gpus_complaint, kind_of
from phalanx.privacy.settings import is_private
from phalanx.programs import program_of
from phalanx.specs import (
    balance,
    catalog,
    composition,
    continuing,
    features,
    margins,
    parts,
    private,
    programs,
    sweeps,
    task_sets,
    updates,
)
from phalanx.specs import columns as column_groups
from phalanx.specs.fields import walk
from phalanx.specs.scalars import DURATION_LIMIT_S
from phalanx.tasks import is_program, is_task_set
from phalanx.texts import number_of
from phalanx.training.best import better
from phalanx.v1 import dataset_service_pb2, job_spec_pb2

CODE_LIMIT_BYTES = 256 * 1024
SHARDS_LIMIT = 65_536
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?", re.ASCII)
_ENTRYPOINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_CODE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,7}", re.ASCII)
_METRIC = re.compile(r"(train|validation|test)/[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}", re.ASCII)


@dataclass(frozen=True)
class _Range:
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def complaint(self, value: float) -> str:
        """Return what is wrong with the value, nothing if it is inside."""
        below = value <= self.low if self.open_low else value < self.low
        above = value >= self.high if self.open_high else value > self.high
        if not below and not above:
            return ""
        lower = "" if self.low == -math.inf else f"{'above' if self.open_low else 'at least'} "
        upper = "" if self.high == math.inf else f"{'below' if self.open_high else 'at most'} "
        bounds = [
            f"{word}{bound:.16g}" for word, bound in ((lower, self.low), (upper, self.high)) if word
        ]
        return f"must be {' and '.join(bounds)}, not {value:.16g}"


_EXACT = 2**53 - 1
_ABOVE_ZERO = _Range(0, open_low=True)
_NOT_NEGATIVE = _Range(0)
_BELOW_ONE = _Range(0, 1, open_high=True)
_WHOLE = _Range(1, _EXACT)

_RANGES: dict[str, _Range] = {
    "seed": _Range(0, _EXACT),
    "priority": _Range(0, 100),
    "data.shards": _Range(1, SHARDS_LIMIT),
    "resources.min_workers": _Range(1, 100_000),
    "resources.max_workers": _Range(1, 100_000),
    "resources.memory_bytes": _WHOLE,
    "resources.gpus": _Range(0, 1024),
    "train.batch_size": _NOT_NEGATIVE,
    "train.l2": _NOT_NEGATIVE,
    "train.model.mlp.hidden": _Range(1, 2**20),
    "train.model.boosting.trees": _Range(1, 10_000),
    "train.model.boosting.learning_rate": _Range(0, 1, open_low=True),
    "train.model.boosting.depth": _Range(1, 12),
    "train.model.boosting.bins": _Range(2, 255),
    "train.model.boosting.l2": _NOT_NEGATIVE,
    "train.model.boosting.min_leaf_rows": _Range(1, 2**31 - 1),
    "train.optimizer.sgd.learning_rate": _ABOVE_ZERO,
    "train.optimizer.sgd.momentum": _BELOW_ONE,
    "train.optimizer.adagrad.learning_rate": _ABOVE_ZERO,
    "train.optimizer.adagrad.epsilon": _ABOVE_ZERO,
    "train.optimizer.adam.learning_rate": _ABOVE_ZERO,
    "train.optimizer.adam.beta1": _BELOW_ONE,
    "train.optimizer.adam.beta2": _BELOW_ONE,
    "train.optimizer.adam.epsilon": _ABOVE_ZERO,
    "train.optimizer.adamw.learning_rate": _ABOVE_ZERO,
    "train.optimizer.adamw.beta1": _BELOW_ONE,
    "train.optimizer.adamw.beta2": _BELOW_ONE,
    "train.optimizer.adamw.epsilon": _ABOVE_ZERO,
    "train.optimizer.adamw.weight_decay": _NOT_NEGATIVE,
    "train.optimizer.clip_norm": _ABOVE_ZERO,
    "train.optimizer.cocoa.local_passes": _Range(1, 10_000),
    "train.optimizer.cocoa.sigma": _ABOVE_ZERO,
    "train.optimizer.schedule.warm_up_steps": _Range(0, _EXACT),
    "train.optimizer.schedule.cosine.final_fraction": _Range(0, 1),
    "train.optimizer.schedule.inverse_time.decay": _NOT_NEGATIVE,
    "train.optimizer.schedule.step.factor": _NOT_NEGATIVE,
    "train.stop.steps": _WHOLE,
    "train.stop.epochs": _Range(0, 1e9, open_low=True),
    "train.stop.plateau.min_change": _NOT_NEGATIVE,
    "train.compression.int8.bucket": _Range(16, 65_536),
    "train.reduction.clip_norm": _ABOVE_ZERO,
    "train.reduction.krum.faulty": _Range(0, SHARDS_LIMIT),
    "train.reduction.krum.keep": _Range(1, SHARDS_LIMIT),
    "train.evaluation.every_steps": _Range(0, _EXACT),
    "train.checkpoints.every_steps": _Range(0, _EXACT),
    "train.checkpoints.keep": _Range(1, 1000),
    "train.on_nonfinite.skip.max_steps": _NOT_NEGATIVE,
    # Noise is drawn in float64 and enters sums of float32, with room for as many rows as there are.
    "train.privacy.clip_norm": _Range(1e-9, 1e9),
    "train.privacy.noise_multiplier": _Range(1e-9, 1e6),
    "train.privacy.delta": _Range(1e-50, 1, open_high=True),
    "train.privacy.max_epsilon": _Range(0, 1e6, open_low=True),
}

# The outer optimizer of local steps is one like any other.
_RANGES |= {
    path.replace("train.optimizer", "train.local.outer"): each
    for path, each in _RANGES.items()
    if path.startswith("train.optimizer")
}

_LOWEST_DURATION: dict[str, tuple[float, str]] = {
    "retain": (0, "must not be negative"),
    "reproducibility.bitwise.fall_back_after": (0, "must not be negative"),
    "train.stop.wall_time": (1e-9, "must be longer than nothing"),
    "train.checkpoints.every": (1e-9, "must be longer than nothing"),
    "tasks.timeout": (1e-9, "must be longer than nothing"),
}


def validate(spec: job_spec_pb2.JobSpec) -> list[Violation]:
    """Return everything that is wrong with a spec whatever its data set. Empty: nothing."""
    return [
        *_names(spec),
        *features.repeated(spec.data),
        *column_groups.violations(spec),
        *_numbers(spec),
        *_resources(spec),
        *_code(spec),
        *_program(spec),
    ]


def validate_against(
    spec: job_spec_pb2.JobSpec,
    dataset: dataset_service_pb2.Dataset | None,
    columns: RawColumns | None = None,
) -> list[Violation]:
    """Return what is wrong between a resolved spec and its data set, if it reads one.

    `columns` are those of the data set, needed where the job chooses some.
    """
    if dataset is not None and is_program(spec):
        found = [
            *_data(spec, dataset),
            *(features.violations(spec.data, dataset, columns) if columns is not None else ()),
            *program_of(spec).violations_against(spec, dataset),
        ]
        if spec.HasField("sweep") and not found and not validate(spec):
            found += sweeps.violations_against(spec, dataset)
        return found
    if dataset is None or spec.WhichOneof("program") != "train":
        return []
    train_rows = balance.train_rows(spec.data, dataset)
    return [
        *_data(spec, dataset),
        *(_columns(spec.data, dataset, columns) if columns is not None else ()),
        *balance.violations(spec, dataset),
        *_model_fits(spec, dataset),
        *updates.violations_against(spec, dataset.features, train_rows),
        *_metrics(spec, dataset),
        *private.violations_against(spec, dataset),
    ]


def refuse(violations: list[Violation]) -> None:
    """Raise InvalidArgument (reason SPEC_INVALID) if there are violations."""
    if not violations:
        return
    first = violations[0]
    more = "" if len(violations) == 1 else f" (and {len(violations) - 1} more)"
    raise InvalidArgument(
        f"{first.field}: {first.message}{more}", reason="SPEC_INVALID", violations=violations
    )


def _names(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    if not spec.name:
        yield Violation("name", f"is missing; give the job a name of {SHORT_NAME_RULE}")
    elif not is_short_name(spec.name):
        yield Violation("name", f"{spec.name[:60]!r} is not allowed; use {SHORT_NAME_RULE}")
    if spec.namespace and not is_short_name(spec.namespace):
        yield Violation(
            "namespace", f"{spec.namespace[:60]!r} is not allowed; use {SHORT_NAME_RULE}"
        )
    if is_task_set(spec):
        pass  # it reads no data set
    elif not spec.data.name:
        yield Violation(
            "data.name", "is missing; name a data set, as `phalanx data list` shows them"
        )
    elif complaint := reference_complaint(spec.data.name, "phalanx data list"):
        yield Violation("data.name", complaint)
    for path, name, what in (
        ("data.split", spec.data.split, "a split"),
        ("train.evaluation.split", spec.train.evaluation.split, "a split"),
        ("output.model", spec.output.model, "a model"),
    ):
        if name and not is_name(name):
            rule = "use a-z, 0-9 and . _ -, at most 128, the first a letter or digit"
            yield Violation(path, f"{name[:60]!r} is no name of {what}; {rule}")
    for path, pairs in (
        ("labels", spec.labels),
        ("resources.worker_labels", spec.resources.worker_labels),
        ("output.tags", spec.output.tags),
    ):
        if len(pairs) > 64:
            yield Violation(path, f"{len(pairs)} are given; at most 64 are allowed")
        for key, value in pairs.items():
            if not _LABEL.fullmatch(key) or len(value) > 256:
                rule = "keys are letters, digits, . _ / -, at most 63; values at most 256 long"
                yield Violation(f"{path}.{key[:63]}", f"is not allowed; {rule}")


def _numbers(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    for path, field, value in walk(spec):
        plain = path.partition("[")[0] if path.endswith("]") else path
        if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE and not math.isfinite(value):
            yield Violation(path, f"must be a finite number, not {value}")
        elif plain in _RANGES and field.message_type is None:
            complaint = _RANGES[plain].complaint(value)
            if complaint:
                yield Violation(path, complaint)
        elif plain in _LOWEST_DURATION:
            seconds = value.seconds + value.nanos * 1e-9
            lowest, message = _LOWEST_DURATION[plain]
            mixed = value.seconds * value.nanos < 0 or abs(value.nanos) >= 10**9
            if mixed or abs(value.seconds) > DURATION_LIMIT_S:
                yield Violation(path, "is not a valid duration")
            elif seconds < lowest:
                yield Violation(path, f"{message}, and is {seconds:g}s")


def _resources(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    resources = spec.resources
    if resources.HasField("max_workers") and resources.min_workers > resources.max_workers:
        message = f"{resources.min_workers} is above max_workers, {resources.max_workers}"
        yield Violation("resources.min_workers", message)
    kind = kind_of(spec)
    # A function of tasks may do anything, and a stored model is not read yet (`take_model`).
    unknown = kind in ("tasks", "evaluate", "predict")
    complaint = "" if unknown else gpus_complaint(kind, resources.gpus)
    if complaint:
        yield Violation("resources.gpus", complaint)


def _code(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    size = sum(len(text.encode()) for text in spec.code.files.values())
    if size > CODE_LIMIT_BYTES:
        message = f"{size} bytes of source are above {CODE_LIMIT_BYTES}; add a wheel instead"
        yield Violation("code.files", message)
    for path in spec.code.files:
        if not _CODE_PATH.fullmatch(path) or ".." in path:
            rule = "write a relative path such as net.py or net/layers.py"
            yield Violation(f'code.files["{path[:160]}"]', f"is not allowed; {rule}")
        elif is_too_long(path):
            yield Violation(f'code.files["{path[:160]}"]', f"is too long; {LENGTH_RULE}")
    for index, digest in enumerate(spec.code.wheels):
        if not is_blob_id(digest):
            rule = "write the SHA-256 that `phalanx code add` printed"
            yield Violation(f"code.wheels[{index}]", f"{digest[:80]!r} is no digest; {rule}")
        elif digest in spec.code.wheels[:index]:
            yield Violation(f"code.wheels[{index}]", "is given twice")


def _program(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    program = spec.WhichOneof("program")
    if program is None:
        yield Violation(
            "train", "is missing; say what to do, as train: {model: {mlp: {hidden: [64]}}}"
        )
    elif program == "tasks":
        yield from _entrypoint(spec.tasks.entrypoint, "tasks.entrypoint", "work:run")
        yield from task_sets.violations(spec)
    elif is_program(spec):
        found = list(programs.violations(spec))
        yield from found
        if program == "sweep" and not found:
            yield from sweeps.violations(spec)
    elif program == "train":
        yield from _train(spec)


def _train(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    train = spec.train
    yield from _model(train.model)
    yield from _optimizer(train.optimizer, train.stop, "train.optimizer")
    if train.HasField("local"):
        yield from _optimizer(train.local.outer, train.stop, "train.local.outer")
    yield from composition.violations(spec)
    yield from updates.violations(spec)
    yield from _stop(train.stop)
    yield from _best(spec.output)
    if train.dtype and train.dtype not in ITEM_BYTES:
        known = " or ".join(ITEM_BYTES)
        yield Violation("train.dtype", f"{train.dtype[:40]!r} is not known; use {known}")
    start = train.start.WhichOneof("from")
    if start == "model":
        complaint = reference_complaint(train.start.model, "phalanx models list")
        if complaint:
            yield Violation("train.start.model", complaint)
    elif start == "job":
        yield from continuing.reference_violations(train.start.job)


def _entrypoint(entrypoint: str, path: str, example: str) -> Iterator[Violation]:
    if not _ENTRYPOINT.fullmatch(entrypoint):
        message = f"is missing; write module:function, as {example}"
        if entrypoint:
            message = f"{entrypoint[:80]!r} is not module:function, as {example}"
        yield Violation(path, message)


def _model(model: job_spec_pb2.Model) -> Iterator[Violation]:
    kind = model.WhichOneof("kind")
    if kind is None:
        choices = (
            "linear_regression, logistic_regression, softmax_regression, linear_svm, mlp, torch, "
            "boosting, k_means, pca or custom"
        )
        yield Violation("train.model", f"is missing; choose {choices}")
    elif kind == "mlp":
        mlp = model.mlp
        if not mlp.hidden:
            message = "is missing; give the width of each hidden layer, as [128, 64]"
            yield Violation("train.model.mlp.hidden", message)
        if mlp.activation and mlp.activation not in catalog.ACTIVATIONS:
            known = ", ".join(catalog.ACTIVATIONS)
            message = f"{mlp.activation[:40]!r} is not known; use one of {known}"
            yield Violation("train.model.mlp.activation", message)
        if mlp.loss and mlp.loss not in catalog.MLP_LOSSES:
            known = ", ".join(catalog.MLP_LOSSES)
            message = f"{mlp.loss[:40]!r} is not known; use one of {known}"
            yield Violation("train.model.mlp.loss", message)
    elif kind == "linear_svm" and model.linear_svm.loss not in ("", *catalog.SVM_LOSSES):
        message = f"{model.linear_svm.loss[:40]!r} is not known"
        known = " or ".join(catalog.SVM_LOSSES)
        yield Violation("train.model.linear_svm.loss", f"{message}; use {known}")
    elif kind == "custom":
        path = "train.model.custom.entrypoint"
        yield from _entrypoint(model.custom.entrypoint, path, "net:build")
    elif kind == "torch":
        yield from _torch(model.torch)


def _torch(torch: job_spec_pb2.Torch) -> Iterator[Violation]:
    yield from _entrypoint(torch.module, "train.model.torch.module", "net:build")
    known = torch.loss in catalog.TORCH_LOSSES or _ENTRYPOINT.fullmatch(torch.loss)
    if torch.loss and not known:
        choices = ", ".join(catalog.TORCH_LOSSES)
        message = f"{torch.loss[:60]!r} is not known; use one of {choices}, or MODULE:FUNCTION"
        yield Violation("train.model.torch.loss", f"{message} for one of your own")


def _optimizer(
    optimizer: job_spec_pb2.Optimizer, stop: job_spec_pb2.Stop, path: str
) -> Iterator[Violation]:
    sgd = optimizer.sgd
    if sgd.nesterov and not sgd.momentum:
        message = "needs a momentum above 0, as momentum: 0.9"
        yield Violation(f"{path}.sgd.nesterov", message)
    schedule = optimizer.schedule
    kind = schedule.WhichOneof("kind")
    if kind == "step" and schedule.step.every_steps < 1:
        message = f"must be at least 1, not {schedule.step.every_steps}"
        yield Violation(f"{path}.schedule.step.every_steps", message)
    if kind == "step" and schedule.step.factor == 0:
        yield Violation(f"{path}.schedule.step.factor", "must be above 0")
    open_end = stop.HasField("wall_time") or stop.thresholds or stop.HasField("plateau")
    if kind == "cosine" and open_end and not stop.HasField("steps") and not stop.HasField("epochs"):
        message = "needs to know the last step; give stop.steps or stop.epochs"
        yield Violation(f"{path}.schedule.cosine", message)


def _stop(stop: job_spec_pb2.Stop) -> Iterator[Violation]:
    for index, threshold in enumerate(stop.thresholds):
        path = f"train.stop.thresholds[{index}]"
        yield from _metric(f"{path}.metric", threshold.metric)
        if threshold.WhichOneof("bound") is None:
            yield Violation(path, "needs a bound: at_least or at_most")
    if stop.HasField("plateau"):
        if stop.plateau.metric:
            yield from _metric("train.stop.plateau.metric", stop.plateau.metric)
        if stop.plateau.evaluations < 1:
            message = f"must be at least 1, not {stop.plateau.evaluations}"
            yield Violation("train.stop.plateau.evaluations", message)


def _best(output: job_spec_pb2.Output) -> Iterator[Violation]:
    if not output.HasField("best"):
        return
    wrong = list(_metric("output.best.metric", output.best.metric))
    yield from wrong
    if not wrong and not better(output.best):
        message = (
            f"needs at_least or at_most: the name of {output.best.metric} does not tell whether "
            "more of it is better or less"
        )
        yield Violation("output.best", message)


def _metric(path: str, metric: str) -> Iterator[Violation]:
    if not _METRIC.fullmatch(metric):
        example = "write SPLIT/NAME, as test/accuracy or train/loss"
        yield Violation(path, f"{metric[:60]!r} is no metric; {example}")


def _columns(
    data: job_spec_pb2.Data, dataset: dataset_service_pb2.Dataset, columns: RawColumns
) -> Iterator[Violation]:
    chosen = list(features.violations(data, dataset, columns))
    yield from chosen or column_groups.violations_against(data, dataset, columns)


def _data(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> Iterator[Violation]:
    known = ", ".join(sorted(dataset.rows)) or "none"
    rows = balance.train_rows(spec.data, dataset)
    if rows == 0:
        message = f"{spec.data.name} has no rows in the split {spec.data.split!r}; it has: {known}"
        yield Violation("data.split", message)
    elif parts.row_shards(spec.data) > rows:
        yield Violation(
            "data.shards",
            f"{number_of(spec.data.shards, 'shard')}: more than the {number_of(rows, 'row')}",
        )
    least = parts.row_shards(spec.data)
    if 0 < spec.train.batch_size < least and not is_private(spec.train):
        message = f"{number_of(spec.train.batch_size, 'row')} cannot be spread over "
        message += number_of(spec.data.shards, "shard")
        yield Violation("train.batch_size", f"{message}; each needs at least one")
    if spec.data.target != dataset.target:
        message = f"{spec.data.name} was added with the target {dataset.target!r}"
        yield Violation("data.target", f"{message}; leave it out or add the data set again")
    split = spec.train.evaluation.split
    if spec.train.HasField("evaluation") and dataset.rows.get(split, 0) == 0:
        message = f"{spec.data.name} has no rows in the split {split!r}; it has: {known}"
        yield Violation("train.evaluation.split", message)


def _model_fits(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset
) -> Iterator[Violation]:
    model = spec.train.model
    kind = model.WhichOneof("kind") or ""
    path = f"train.model.{kind}"
    task = catalog.model_task(model, dataset.task)
    if task and dataset.task and task != dataset.task:
        message = f"is for {task}, and {spec.data.name} is a {dataset.task} data set"
        yield Violation(f"{path}.loss" if kind in ("mlp", "torch") else path, message)
    elif kind in catalog.TWO_CLASSES and len(dataset.classes) != 2:
        message = f"needs 2 classes, and {spec.data.name} has {len(dataset.classes)}"
        yield Violation(path, f"{message}; use softmax_regression")
    elif task == catalog.CLASSIFICATION and len(dataset.classes) < 2:
        yield Violation(path, f"needs at least 2 classes, and {spec.data.name} has fewer")


def _metrics(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset
) -> Iterator[Violation]:
    stop = spec.train.stop
    named = [
        (f"train.stop.thresholds[{index}].metric", each.metric)
        for index, each in enumerate(stop.thresholds)
    ]
    if stop.HasField("plateau"):
        named.append(("train.stop.plateau.metric", stop.plateau.metric))
    names = catalog.metric_names(spec.train.model, dataset.task)
    names += margins.certificates(spec)
    split = spec.train.evaluation.split if spec.train.HasField("evaluation") else ""
    # The loss of a step of a private job would have no noise.
    losses = [] if is_private(spec.train) else ["train/loss"]
    known = [*losses, *(f"{split}/{name}" for name in names if split)]
    for path, metric in named:
        where, _, name = metric.partition("/")
        fits = metric in losses or (where == split and (not names or name in names))
        if not fits:
            has = ", ".join(known) or "no metrics that a rule may watch"
            yield Violation(path, f"{metric!r} is never computed; this job has {has}")
    if spec.output.HasField("best"):
        yield from _evaluated(spec, dataset, names)
    for index, name in enumerate(spec.train.evaluation.metrics):
        if names and name not in names:
            message = f"{name[:40]!r} is not known; this model has {', '.join(names)}"
            yield Violation(f"train.evaluation.metrics[{index}]", message)


def _evaluated(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset, names: Collection[str]
) -> Iterator[Violation]:
    """What is compared must come of an evaluation: of some parameters, and on the same rows."""
    metric, path = spec.output.best.metric, "output.best.metric"
    where, _, name = metric.partition("/")
    split = spec.train.evaluation.split if spec.train.HasField("evaluation") else ""
    if not split or not dataset.rows.get(split, 0):
        message = (
            f"{metric!r} is never computed: no rows of {spec.data.name} are held out for an "
            "evaluation; add it again with --test, or leave output.best out to keep the last step"
        )
        yield Violation(path, message)
    elif where != split or (names and name not in names):
        of_steps = where == "train" and name == "loss"
        why = (
            "is of the rows of one step, not of an evaluation" if of_steps else "is never computed"
        )
        known = ", ".join(f"{split}/{each}" for each in names) or f"the metrics of {split}"
        yield Violation(path, f"{metric!r} {why}; evaluations of this job give {known}")
