"""What control is told of a job that this worker cannot set up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from phalanx.errors import PhalanxError
from phalanx.v1 import coordination_service_pb2 as coordination
from worker.core.calls import TaskSetCore
from worker.core.job import JobCore
from worker.session.places import SetUpFailure

LeafFailed = coordination.LeafFailed

WHOLE_JOB = -1
_SHARDS_MAX = 64
"""Shards told of at once; those that control cannot move away are told again."""


def not_prepared(
    core: JobCore | TaskSetCore, error: Exception
) -> Iterator[coordination.SessionRequest]:
    """A job whose files cannot be had fails at every shard that it has here; a set of tasks, which
    has none, as a whole."""
    if isinstance(core, TaskSetCore):
        yield _failed(core, WHOLE_JOB, LeafFailed.KIND_DATA, text_of(error))
        return
    for nodes, width, evaluation in (
        (core.train_nodes, core.plan.shards, False),
        (core.evaluation_nodes, core.plan.evaluation_shards, True),
    ):
        shards = (n for node in nodes for n in range(node.first, node.first + node.span))
        owned = (shard for shard in shards if shard < width)
        for shard in itertools.islice(owned, _SHARDS_MAX):
            kind = LeafFailed.KIND_DATA
            yield _failed(core, shard, kind, text_of(error), evaluation=evaluation)


def not_set_up(core: TaskSetCore, failed: SetUpFailure) -> coordination.SessionRequest:
    """The code of a set of tasks cannot be loaded here."""
    return _failed(
        core, WHOLE_JOB, LeafFailed.KIND_RAISED, failed.message, traceback=failed.traceback
    )


def text_of(error: Exception) -> str:
    """The text of an error, with its type where it is not one that was foreseen."""
    known = isinstance(error, PhalanxError | OSError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _failed(
    core: JobCore | TaskSetCore,
    shard: int,
    kind: LeafFailed.Kind.ValueType,
    message: str,
    *,
    evaluation: bool = False,
    traceback: str = "",
) -> coordination.SessionRequest:
    failed = LeafFailed(
        job_id=core.job_id,
        term=core.term,
        shard=shard,
        kind=kind,
        message=message,
        evaluation=evaluation,
        traceback=traceback,
    )
    return coordination.SessionRequest(leaf_failed=failed)
