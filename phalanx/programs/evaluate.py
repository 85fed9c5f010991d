"""Metrics of a stored model on a split: shards are scored, one task merges, one tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from phalanx.errors import Violation
from phalanx.programs.base import Graph, Program
from phalanx.programs.scored import block_bytes, default_split, model_violations
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

METRICS = {
    "classification": ("accuracy", "f1", "auc", "log_loss"),
    "regression": ("r2", "rmse", "mae"),
}
BYTES_OF_A_ROW, BYTES_OF_A_SCORE = 100, 24
"""Of rows whose scores are put in order; measured."""

EVALUATION_FILE = "evaluation.json"


class Evaluate(Program):
    """Accuracy, F1, area under the curve, log loss and confusion matrix; R², RMSE and MAE."""

    name: ClassVar[str] = "evaluate"

    def violations(self, spec: JobSpec) -> Iterator[Violation]:
        """See `Program`."""
        yield from model_violations(spec, "evaluate.model", spec.evaluate.model)
        known = sorted({name for names in METRICS.values() for name in names})
        for index, name in enumerate(spec.evaluate.metrics):
            if name not in known:
                message = f"{name[:40]!r} is not known; use {', '.join(known)}"
                yield Violation(f"evaluate.metrics[{index}]", message)
            elif name in spec.evaluate.metrics[:index]:
                yield Violation(f"evaluate.metrics[{index}]", "is given twice")

    def violations_against(self, spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
        """See `Program`."""
        for index, name in enumerate(spec.evaluate.metrics):
            if name not in METRICS[dataset.task]:
                known = ", ".join(METRICS[dataset.task])
                message = f"{name} is none of a {dataset.task}; use {known}"
                yield Violation(f"evaluate.metrics[{index}]", message)

    def resolve(self, spec: JobSpec, dataset: Dataset) -> None:
        """See `Program`: of more than two classes the area under the curve has to be asked for,
        since it takes all scores of all rows to one place."""
        spec.data.split = spec.data.split or default_split(dataset)
        if not spec.evaluate.metrics:
            many = len(dataset.classes) > 2
            spec.evaluate.metrics.extend(
                name for name in METRICS[dataset.task] if name != "auc" or not many
            )

    def worker_bytes(self, spec: JobSpec, dataset: Dataset) -> int:
        """See `Program`: the rows of a shard, or all scores in the one task that puts them in order
        for the area under the curve."""
        columns = len(dataset.classes) if len(dataset.classes) > 2 else 1
        ranked = dataset.rows.get(spec.data.split, 0) if "auc" in spec.evaluate.metrics else 0
        each = BYTES_OF_A_ROW + BYTES_OF_A_SCORE * columns
        return max(block_bytes(spec, dataset), ranked * each)

    def graph(self, plan: JobPlan) -> Graph:
        """See `Program`."""
        shards = max(1, plan.shards)
        return Graph(((),) * shards + (tuple(range(shards)), (shards,)))
