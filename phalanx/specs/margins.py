"""What optimizers made for the linear SVM ask of the rest of a job, each with a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.v1 import job_spec_pb2


def violations(train: job_spec_pb2.Train) -> Iterator[Violation]:
    """Yield what does not go together with them; of raw as well as resolved programs."""
    if train.local.outer.HasField("pegasos"):
        message = "is for gradients, and the outer optimizer applies differences; use sgd"
        yield Violation("train.local.outer.pegasos", message)
    if train.optimizer.HasField("pegasos"):
        yield from _of_the_margin(train, "pegasos", "sgd")
        yield from _no_rate_of_its_own(train, "pegasos", "1 / (l2 · step)")


def _of_the_margin(train: job_spec_pb2.Train, kind: str, instead: str) -> Iterator[Violation]:
    """Model, loss and penalty that the method is made for."""
    path, model = f"train.optimizer.{kind}", train.model.WhichOneof("kind")
    if model not in (None, "linear_svm"):
        yield Violation(path, f"is for linear_svm, not for {model}; use {instead}")
    elif train.model.linear_svm.loss == "squared_hinge":
        message = f"is for the hinge loss, whose slope is bounded; use hinge, or {instead}"
        yield Violation(path, message)
    if train.l2 == 0:
        message = f"is missing: {kind} solves the problem with a penalty; give it, as 1e-4"
        yield Violation("train.l2", message)


def _no_rate_of_its_own(train: job_spec_pb2.Train, kind: str, rate: str) -> Iterator[Violation]:
    schedule = train.optimizer.schedule
    if schedule.WhichOneof("kind") not in (None, "constant") or schedule.warm_up_steps:
        message = f"would change the learning rate of {kind}, which is {rate}; leave it out"
        yield Violation("train.optimizer.schedule", message)
