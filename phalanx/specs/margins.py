"""What optimizers made for the linear SVM ask of the rest of a job, each with a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.specs import catalog, parts
from phalanx.v1 import job_spec_pb2

_NO_OUTER = ("pegasos", "cocoa", "closed_form")


def certificates(spec: job_spec_pb2.JobSpec) -> tuple[str, ...]:
    """Return the metrics that tell how far a job is from its optimum, where it has any."""
    train = spec.train
    own_rows = train.HasField("evaluation") and train.evaluation.split == spec.data.split
    return catalog.CERTIFICATES if train.optimizer.HasField("cocoa") and own_rows else ()


def warnings(spec: job_spec_pb2.JobSpec) -> list[str]:
    """Return what is allowed and seldom meant, of a resolved job."""
    sigma, shards = spec.train.optimizer.cocoa.sigma, spec.data.shards
    if not spec.train.optimizer.HasField("cocoa") or sigma >= shards:
        return []
    found = (
        f"optimizer.cocoa.sigma {sigma:g} is below the number of shards, {shards}: the changes of "
        "all shards together may be too large, and the job diverge"
    )
    return [found]


def violations(train: job_spec_pb2.Train) -> Iterator[Violation]:
    """Yield what does not go together with them; of raw as well as resolved programs."""
    outer = train.local.outer.WhichOneof("kind")
    if outer in _NO_OUTER:
        message = "is for gradients, and the outer optimizer applies differences; use sgd"
        yield Violation(f"train.local.outer.{outer}", message)
    if train.optimizer.HasField("pegasos"):
        yield from _of_the_margin(train, "pegasos")
        yield from _no_rate_of_its_own(train, "1 / (l2 · step)")
        yield from _projection(train)
    if train.optimizer.HasField("cocoa"):
        yield from _of_the_margin(train, "cocoa")
        yield from _no_rate_of_its_own(train, "none: each variable goes to its optimum")
        if train.model.linear_svm.bias:
            message = (
                "must be false: a bias ties the dual variables of all rows together, and cocoa "
                "changes each by itself; leave it out"
            )
            yield Violation("train.model.linear_svm.bias", message)


def _of_the_margin(train: job_spec_pb2.Train, kind: str) -> Iterator[Violation]:
    """Model, loss and penalty that the method is made for."""
    path, model = f"train.optimizer.{kind}", train.model.WhichOneof("kind")
    if model not in (None, "linear_svm"):
        yield Violation(path, f"is for linear_svm, not for {model}; use sgd")
    elif train.model.linear_svm.loss == "squared_hinge":
        why = "its dual variables are bounded" if kind == "cocoa" else "its slope is bounded"
        message = f"is for the hinge loss, since {why}; use hinge, or sgd"
        yield Violation(path, message)
    if train.l2 == 0:
        message = f"is missing: {kind} solves the problem with a penalty; give it, as 1e-4"
        yield Violation("train.l2", message)


def _no_rate_of_its_own(train: job_spec_pb2.Train, rate: str) -> Iterator[Violation]:
    schedule, kind = train.optimizer.schedule, train.optimizer.WhichOneof("kind")
    if schedule.WhichOneof("kind") not in (None, "constant") or schedule.warm_up_steps:
        message = f"would change the learning rate of {kind}, which is {rate}; leave it out"
        yield Violation("train.optimizer.schedule", message)


def _projection(train: job_spec_pb2.Train) -> Iterator[Violation]:
    """It shortens a whole version, so there must be one place where versions are made whole."""
    if not parts.projects(train):
        return
    path, instead = "train.optimizer.pegasos.project", "use synchronous, or leave it out"
    if parts.commits_one_by_one(train) or train.HasField("local"):
        kind = train.WhichOneof("consistency")
        message = (
            "shortens the parameters of a version once all shards have contributed, and with "
            f"{kind} each goes on by itself; {instead}"
        )
        yield Violation(path, message)
    if parts.all_reduces(train):
        message = (
            "needs the whole vector in one place, and with all_reduce each worker makes one range "
            "of it; use parameter_server, or leave it out"
        )
        yield Violation(path, message)
