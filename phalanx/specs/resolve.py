"""Defaults, written out once: a resolved spec says everything, and nobody guesses later."""

from __future__ import annotations

import math

from phalanx.data.choice import RawColumns
from phalanx.privacy import settings as privacy
from phalanx.programs import program_of
from phalanx.specs import balance, catalog, features, parts, task_sets, updates
from phalanx.specs import columns as column_groups
from phalanx.tasks import is_program, is_task_set
from phalanx.v1 import dataset_service_pb2, job_spec_pb2, model_service_pb2

ROWS_PER_LEAF = 256
"""Rows of a leaf by default: splitting a batch this way costs 3 to 20 % of one big call."""

FULL_BATCH_SHARDS = 64
RETAIN_S = 30 * 86400
CHECKPOINT_EVERY_S = 60
CHECKPOINTS_KEPT = 3
EPOCHS = 10
PRIORITY = 50
INT8_BUCKET = 512
COMPENSATION = 2.0
REPLICAS = 3
EVALUATION_SPLITS = ("test", "validation")

_LEARNING_RATES = {"sgd": 0.01, "adagrad": 0.01, "adam": 0.001, "adamw": 0.001}


def resolve(
    spec: job_spec_pb2.JobSpec,
    dataset: dataset_service_pb2.Dataset | None,
    columns: RawColumns | None = None,
) -> job_spec_pb2.JobSpec:
    """Return a copy of `spec` with every default and the data set's version written.

    Without a data set only of a job that reads none; `columns` are those of the data set, needed
    where the job chooses some.

    The same spec and data set always give the same result, and resolving it again changes nothing.
    Three things stay empty because that is their meaning: `data.features` (all of them, named or
    not), `resources.max_workers` (no limit) and the bound of `output.best` (none). Wrong values are
    left as they are, for validation to name.
    """
    result = job_spec_pb2.JobSpec()
    result.CopyFrom(spec)
    _general(result)
    if result.WhichOneof("program") == "tasks":
        task_sets.resolve(result)
    elif dataset is not None and is_program(result):
        program_of(result).resolve(result, dataset)
        _data(result, dataset)
        if columns is not None:
            features.resolve(result.data, columns)
    elif dataset is not None and result.WhichOneof("program") == "train":
        _data(result, dataset)
        if columns is not None:
            features.resolve(result.data, columns)
            column_groups.resolve(result.data, columns)
        _model(result.train, dataset)
        updates.resolve(result, dataset)
        if parts.update_kind(result) in ("", parts.COLUMNS):
            _optimizer(result.train.optimizer)
        if result.train.HasField("local"):
            _outer(result.train.local.outer)
        _training(result.train)
        _evaluation(result, dataset)
        _checkpoints(result.train.checkpoints)
    return result


def train_rows(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> int:
    """Return the rows of an epoch of a resolved spec."""
    return balance.train_rows(spec.data, dataset)


def rows_per_leaf(spec: job_spec_pb2.JobSpec, rows: int) -> int:
    """Return the rows that each shard gives to a step; all of its rows for the full batch.

    In a private job that is what it gives on average.
    """
    shards = max(1, parts.row_shards(spec.data))
    largest = -(-rows // shards)
    if spec.train.batch_size == 0:
        return max(1, largest)
    return max(1, min(spec.train.batch_size // shards, largest))


def steps_per_epoch(spec: job_spec_pb2.JobSpec, rows: int) -> int:
    """Return the steps in which every row is used once: by the largest shard.

    With local steps these are the shards' own, several of which make a step of the job.
    """
    if privacy.is_private(spec.train):
        return privacy.steps_per_epoch(spec.train, rows)
    largest = -(-rows // max(1, parts.row_shards(spec.data)))
    return max(1, -(-largest // rows_per_leaf(spec, rows)))


def total_steps(spec: job_spec_pb2.JobSpec, rows: int) -> int:
    """Return the steps after which the job ends at the latest; 0 where no rule counts steps."""
    stop = spec.train.stop
    bounds = []
    if stop.HasField("steps"):
        bounds.append(stop.steps)
    if stop.HasField("epochs"):
        each = max(1, parts.local_steps(spec.train))
        bounds.append(max(1, math.ceil(stop.epochs * steps_per_epoch(spec, rows) / each)))
    allowed = privacy.steps_allowed(spec.train, rows)
    if allowed is not None:
        bounds.append(max(1, allowed))  # that not one is allowed is said by validation
    return min(bounds, default=0)


def _general(spec: job_spec_pb2.JobSpec) -> None:
    spec.namespace = spec.namespace or "default"
    if not spec.HasField("seed"):
        spec.seed = 0
    if not spec.HasField("priority"):
        spec.priority = PRIORITY
    if not spec.HasField("retain"):
        spec.retain.seconds = RETAIN_S
    if not spec.resources.HasField("min_workers"):
        spec.resources.min_workers = 1
    if spec.reproducibility.WhichOneof("mode") is None:
        if is_task_set(spec) or parts.commits_one_by_one(spec.train):
            spec.reproducibility.tolerant.SetInParent()
        else:
            spec.reproducibility.bitwise.SetInParent()
    if not is_task_set(spec) and (not is_program(spec) or program_of(spec).leaves_model):
        spec.output.model = spec.output.model or spec.name


def resolve_start_model(spec: job_spec_pb2.JobSpec, model: model_service_pb2.ModelVersion) -> None:
    """Write down which version of its model a job starts from."""
    start = spec.train.start
    start.model = f"{start.model.partition('@')[0]}@{model.version}"


def _data(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> None:
    data = spec.data
    data.name = f"{data.name.partition('@')[0]}@{dataset.version}"
    data.split = data.split or "train"
    data.target = data.target or dataset.target
    if data.WhichOneof("partition") is None:
        data.rows.SetInParent()
    balance.resolve(data, dataset)
    if parts.by_columns(data):
        if data.columns.groups and not data.HasField("shards"):
            data.shards = len(data.columns.groups)
    elif not data.HasField("shards"):
        rows = balance.train_rows(data, dataset)
        if spec.train.batch_size > 0:
            wanted = spec.train.batch_size // ROWS_PER_LEAF
        else:
            wanted = min(FULL_BATCH_SHARDS, rows // ROWS_PER_LEAF)
        data.shards = max(1, min(wanted, rows))


def _model(train: job_spec_pb2.Train, dataset: dataset_service_pb2.Dataset) -> None:
    model = train.model
    if not model.HasField("standardise"):
        model.standardise = dataset.format != "csr" and not privacy.is_private(train)
    kind = model.WhichOneof("kind")
    if kind in ("linear_regression", "logistic_regression", "softmax_regression", "linear_svm"):
        linear = getattr(model, kind)
        if not linear.HasField("bias"):
            linear.bias = not train.optimizer.HasField("cocoa")
    if kind == "linear_svm":
        model.linear_svm.loss = model.linear_svm.loss or catalog.SVM_LOSSES[0]
    elif kind == "mlp":
        regression = dataset.task == catalog.REGRESSION
        model.mlp.activation = model.mlp.activation or "relu"
        model.mlp.loss = model.mlp.loss or ("squared_error" if regression else "cross_entropy")
    elif kind == "torch":
        regression = dataset.task == catalog.REGRESSION
        model.torch.loss = model.torch.loss or ("mse_loss" if regression else "cross_entropy")


def _optimizer(optimizer: job_spec_pb2.Optimizer) -> None:
    if optimizer.WhichOneof("kind") is None:
        optimizer.sgd.SetInParent()
    kind = optimizer.WhichOneof("kind") or "sgd"
    chosen = getattr(optimizer, kind)
    if kind in _LEARNING_RATES and not chosen.HasField("learning_rate"):
        chosen.learning_rate = _LEARNING_RATES[kind]
    if kind == "adagrad" and not chosen.HasField("epsilon"):
        chosen.epsilon = 1e-10
    if kind in ("adam", "adamw"):
        for name, value in (("beta1", 0.9), ("beta2", 0.999), ("epsilon", 1e-8)):
            if not chosen.HasField(name):
                setattr(chosen, name, value)
    if kind == "adamw" and not chosen.HasField("weight_decay"):
        chosen.weight_decay = 0.01
    if optimizer.schedule.WhichOneof("kind") is None:
        optimizer.schedule.constant.SetInParent()


def _outer(outer: job_spec_pb2.Optimizer) -> None:
    """The mean difference is taken as it is, unless something else is said."""
    if outer.WhichOneof("kind") is None:
        outer.sgd.SetInParent()
    if outer.HasField("sgd") and not outer.sgd.HasField("learning_rate"):
        outer.sgd.learning_rate = 1.0
    _optimizer(outer)


def _asynchronous(asynchronous: job_spec_pb2.Asynchronous) -> None:
    if asynchronous.WhichOneof("staleness") is None:
        asynchronous.scaled.SetInParent()
    compensated = asynchronous.delay_compensated
    if asynchronous.HasField("delay_compensated") and not compensated.HasField("strength"):
        compensated.strength = COMPENSATION


def _training(train: job_spec_pb2.Train) -> None:
    if train.WhichOneof("consistency") is None:
        train.synchronous.SetInParent()
    if train.HasField("asynchronous"):
        _asynchronous(train.asynchronous)
    if train.WhichOneof("topology") is None:
        train.parameter_server.SetInParent()
    if train.reduction.WhichOneof("kind") is None:
        train.reduction.weighted_mean.SetInParent()
    if train.reduction.HasField("krum") and not train.reduction.krum.HasField("keep"):
        train.reduction.krum.keep = 1
    if train.compression.HasField("int8") and not train.compression.int8.HasField("bucket"):
        train.compression.int8.bucket = INT8_BUCKET
    if train.HasField("verification") and train.verification.WhichOneof("kind") is None:
        train.verification.replicas = REPLICAS
    if train.on_nonfinite.WhichOneof("action") is None:
        train.on_nonfinite.fail.SetInParent()
    train.dtype = train.dtype or "float32"
    stop = train.stop
    limited = any(stop.HasField(name) for name in ("steps", "epochs", "wall_time", "plateau"))
    limited = limited or train.privacy.HasField("max_epsilon")
    if not limited and not stop.thresholds:
        stop.epochs = EPOCHS


def _evaluation(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> None:
    train = spec.train
    split = train.evaluation.split or _evaluation_split(spec, dataset)
    if not train.HasField("evaluation") and not split:
        return  # no held-out rows and nobody asked for any
    train.evaluation.split = split or EVALUATION_SPLITS[0]
    every = train.evaluation.every_steps
    if every == 0:
        per_epoch = steps_per_epoch(spec, train_rows(spec, dataset))
        every = max(1, per_epoch // max(1, parts.local_steps(train)))
    if every > 0:
        # Within a round trees of some classes have grown, and those of others not.
        train.evaluation.every_steps = updates.rounds_of(spec, dataset).whole(every)
    if train.stop.HasField("plateau") and not train.stop.plateau.metric:
        train.stop.plateau.metric = f"{train.evaluation.split}/loss"


def _evaluation_split(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> str:
    """The split that a stop rule watches or the best is looked for in, else test, else validation;
    without any that of the training for cocoa, whose certificate it has, and empty for others."""
    watched = [threshold.metric for threshold in spec.train.stop.thresholds]
    watched += [spec.train.stop.plateau.metric, spec.output.best.metric]
    certifies = spec.train.optimizer.HasField("cocoa")
    for metric in watched:
        split, _, name = metric.partition("/")
        if split in EVALUATION_SPLITS or (certifies and name in catalog.CERTIFICATES):
            return split
    held_out = [split for split in EVALUATION_SPLITS if dataset.rows.get(split, 0)]
    return held_out[0] if held_out else spec.data.split if certifies else ""


def _checkpoints(checkpoints: job_spec_pb2.Checkpoints) -> None:
    if not checkpoints.HasField("keep"):
        checkpoints.keep = CHECKPOINTS_KEPT
    if checkpoints.every_steps == 0 and not checkpoints.HasField("every"):
        checkpoints.every.seconds = CHECKPOINT_EVERY_S
