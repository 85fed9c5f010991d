"""What a private job may be composed of, each refusal with a sentence that says why.

The guarantee covers the parameters, whoever sees them all: each step tells of a row no more than
its noise allows, and nothing else of the rows may get into them.
"""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.privacy.settings import accountant, is_private, steps_allowed
from phalanx.specs import parts
from phalanx.texts import number_of
from phalanx.v1 import dataset_service_pb2, job_spec_pb2

_PATH = "train.privacy"
_REQUIRED = {
    "clip_norm": "the longest gradient of an example, as 1",
    "noise_multiplier": "the deviation of the noise in units of clip_norm, as 1",
    "delta": "the probability with which ε may fail, well below 1 / rows, as 1e-5",
}
_ONE_SUM = "the guarantee is that of one noisy sum of all shards in each step"
_OPTIMIZERS = ("cocoa", "closed_form", "pegasos")


def violations(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """Yield what does not go together in a private job, raw or resolved."""
    privacy = spec.train.privacy
    for name, what in _REQUIRED.items():
        if getattr(privacy, name) == 0:
            yield Violation(f"{_PATH}.{name}", f"is missing; give {what}")
    yield from _consistency(spec.train)
    yield from _sum(spec.train)
    yield from _method(spec.train)
    yield from _data(spec)
    yield from _repeated(spec)


def violations_against(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset
) -> Iterator[Violation]:
    """Yield what is wrong between a resolved private job and its rows."""
    train, rows = spec.train, dataset.rows.get(spec.data.split, 0)
    if not is_private(train):
        return
    if train.HasField("evaluation") and train.evaluation.split == spec.data.split:
        message = f"{spec.data.split!r} has the rows that are protected, and metrics have no noise"
        yield Violation("train.evaluation.split", f"{message}; evaluate on another split")
    given = (train.privacy.clip_norm, train.privacy.noise_multiplier)
    if not rows or not all(each > 0 for each in given) or not 0 < train.privacy.delta < 1:
        return
    if steps_allowed(train, rows) == 0:
        least = accountant(train, rows).epsilon(1)
        message = (
            f"one step alone spends {least:.4g}; raise it or noise_multiplier, or lower batch_size"
        )
        yield Violation(f"{_PATH}.max_epsilon", message)


def epsilon_at(train: job_spec_pb2.Train, rows: int, steps: int) -> float:
    """Return what a job has spent after so many steps; 0 for one that is not private, and for 0."""
    return accountant(train, rows).epsilon(steps) if is_private(train) and steps else 0.0


def warnings(spec: job_spec_pb2.JobSpec, rows: int, steps: int) -> list[str]:
    """Return what is allowed and probably not meant."""
    privacy = spec.train.privacy
    if not is_private(spec.train):
        return []
    found = []
    if privacy.delta * rows >= 1:
        found.append(
            f"privacy.delta is {privacy.delta:g}, not below 1 / {number_of(rows, 'row')}: "
            "so much allows to publish a row"
        )
    if privacy.HasField("max_epsilon") and steps and steps < (steps_allowed(spec.train, rows) or 0):
        spent = epsilon_at(spec.train, rows, steps)
        found.append(f"privacy.max_epsilon never fires: all steps together spend {spent:.4g}")
    if not steps and not privacy.HasField("max_epsilon"):
        found.append(
            "nothing bounds what the job spends; give privacy.max_epsilon, stop.steps or "
            "stop.epochs"
        )
    return found


def _consistency(train: job_spec_pb2.Train) -> Iterator[Violation]:
    kind = train.WhichOneof("consistency")
    if kind in ("asynchronous", "stale", "local"):
        why = f"lets shards go ahead by themselves, and {_ONE_SUM}"
        yield Violation(f"train.{kind}", f"{why}; use synchronous")
    if train.synchronous.backup_shards:
        why = "leaves out shards, so that rows enter with another probability than is accounted for"
        yield Violation("train.synchronous.backup_shards", f"{why}; leave it out")
    if train.HasField("all_reduce"):
        why = (
            "lets workers apply the noise, which then is no secret to them; aggregators alone get "
            "what it is made of"
        )
        yield Violation("train.all_reduce", f"{why}; use parameter_server")
    if train.on_nonfinite.HasField("skip"):
        why = (
            "is never asked for: a row whose gradient is not finite counts as 0 in a private job, "
            "so that nobody sees that it is there"
        )
        yield Violation("train.on_nonfinite.skip", f"{why}; leave it out")


def _sum(train: job_spec_pb2.Train) -> Iterator[Violation]:
    reduction, compression = train.reduction, train.compression
    kind = reduction.WhichOneof("kind")
    if kind not in (None, "weighted_mean"):
        why = f"chooses among contributions, on which there is no noise yet, and {_ONE_SUM}"
        yield Violation(f"train.reduction.{kind}", f"{why}; leave it out")
    if reduction.HasField("clip_norm"):
        why = "shortens whole contributions; privacy.clip_norm shortens each example's gradient"
        yield Violation("train.reduction.clip_norm", f"{why}; leave it out")
    if train.optimizer.HasField("clip_norm"):
        why = "shortens the mean by a norm that has no noise; privacy.clip_norm is the bound here"
        yield Violation("train.optimizer.clip_norm", f"{why}; leave it out")
    up = compression.WhichOneof("up")
    if up is not None:
        why = "changes contributions before the noise, and with them what one row can change"
        instead = "leave it out; down_cast_to is allowed"
        yield Violation(f"train.compression.{up}", f"{why}; {instead}")


def _method(train: job_spec_pb2.Train) -> Iterator[Violation]:
    model, optimizer = train.model.WhichOneof("kind"), train.optimizer.WhichOneof("kind")
    why = "makes its steps of other sums than gradients of single rows, which nothing bounds"
    if model in parts.UPDATED_MODELS:
        yield Violation(f"train.model.{model}", f"{why}; use another model, or leave privacy out")
    if optimizer in _OPTIMIZERS:
        instead = "use sgd, adagrad, adam or adamw"
        yield Violation(f"train.optimizer.{optimizer}", f"{why}; {instead}")
    if train.model.HasField("standardise") and train.model.standardise:
        why = (
            "puts the mean and deviation of the rows into the model, and no noise is on them; "
            "scale the data before it is added"
        )
        yield Violation("train.model.standardise", why)


def _data(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    data = spec.data
    if data.HasField("oversample"):
        why = "draws rows of small classes more often than the accountant counts"
        yield Violation("data.oversample", f"{why}; give data.class_weights.weights instead")
    if data.HasField("class_weights") and not data.class_weights.weights:
        why = "are computed from the numbers of rows, which no noise hides"
        yield Violation("data.class_weights", f"{why}; give the weight of each class")
    if data.HasField("columns"):
        why = "computes a row's gradient in pieces, none of which knows its norm"
        yield Violation("data.columns", f"{why}; use rows")


def _repeated(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """What would give one step two results that differ, under one noise."""
    if spec.train.start.WhichOneof("from") == "job":
        why = (
            "goes on from what another job has spent, which this one does not count; raise the "
            "steps of the first, or start from its model"
        )
        yield Violation("train.start.job", why)
    why = (
        "lets a step that is computed again after a loss have other last bits under the same noise"
    )
    if spec.reproducibility.HasField("tolerant"):
        yield Violation("reproducibility.tolerant", f"{why}; use bitwise")
    if spec.reproducibility.bitwise.HasField("fall_back_after"):
        yield Violation("reproducibility.bitwise.fall_back_after", f"{why}; leave it out")
