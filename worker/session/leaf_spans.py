"""Spans of the leaves that a worker computes, where it traces.

They are made in the session process: leaf processes are forks that know nothing of traces.
"""

from __future__ import annotations

from phalanx.telemetry import traces
from phalanx.training.two_rounds import step_of
from phalanx.v1.training_pb2 import GoRecord, JobPlan
from worker.core.dispatch import Task
from worker.core.rounds import Part


class LeafSpans:
    """Tells of parts of training rounds when they are over."""

    def __init__(self, worker_id: str) -> None:
        self._tracing = traces.active()
        self._worker_id = worker_id

    def ended(
        self, task: Task, part: Part, seconds: float, plan: JobPlan, failed: str = ""
    ) -> None:
        """A part was computed, or `failed`, after so long."""
        if self._tracing is None or task.round.go.action != GoRecord.ACTION_TRAIN:
            return
        told: dict[str, str | int] = {
            "shard": part.node.first,
            "shards": part.node.span,
            "worker_id": self._worker_id,
        }
        # The step that it is for; where contributions commit one by one, the version that it read.
        version = task.round.go.version
        step = version if plan.asynchronous else step_of(plan, version) + 1
        self._tracing.leaf(
            (task.job_id, task.term, step),
            seconds,
            told,
            joins=not plan.asynchronous,
            failed=failed,
        )
