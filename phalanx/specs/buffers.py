"""Which parts of a job do not go together with buffers of a model.

Whether a model has any, only building it tells, so this is said when the job is described. What a
buffer contributes is no gradient but what it becomes, so whatever measures, shortens or encodes a
contribution as a whole would mix both.
"""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.errors import InvalidArgument, Violation
from phalanx.v1 import job_spec_pb2
from phalanx.v1.training_pb2 import Layout

_INSTEAD = (
    "leave it out, or build the model without buffers (batch normalisation with "
    "track_running_stats=False, or another normalisation such as GroupNorm)"
)


def refuse_with_buffers(spec: job_spec_pb2.JobSpec, layout: Layout) -> None:
    """Raise InvalidArgument if a model has buffers and its job does what buffers do not stand."""
    names = [tensor.name for tensor in layout.tensors if tensor.buffer]
    found = list(_violations(spec.train)) if names else []
    if found:
        raise InvalidArgument(
            f"{found[0].field}: {found[0].message}; the model has the buffer {names[0]!r}: "
            f"{_INSTEAD}",
            reason="NOT_WITH_BUFFERS",
            violations=found,
        )


def _violations(train: job_spec_pb2.Train) -> Iterator[Violation]:
    for path, optimizer in (
        ("train.optimizer", train.optimizer),
        ("train.local.outer", train.local.outer),
    ):
        if optimizer.HasField("clip_norm"):
            message = "measures how long a gradient is, and what a buffer becomes is none"
            yield Violation(f"{path}.clip_norm", message)
    if train.reduction.HasField("clip_norm"):
        message = "measures how long a contribution is, and what a buffer becomes is no gradient"
        yield Violation("train.reduction.clip_norm", message)
    if train.reduction.HasField("krum"):
        message = "compares how far contributions are apart, and buffers are on another scale"
        yield Violation("train.reduction.krum", message)
    up = train.compression.WhichOneof("up")
    if up is not None:
        message = "encodes gradients with a loss, and a buffer would be set to what is left of it"
        yield Violation(f"train.compression.{up}", message)
    if train.HasField("privacy"):
        message = "shortens and blurs gradients of single examples, and buffers would tell of them"
        yield Violation("train.privacy", message)
