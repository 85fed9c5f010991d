"""The tasks of `evaluate` and `predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from phalanx.data.manifest import label_from_text
from phalanx.data.predict import LoadedModel, Predictions
from phalanx.models.base import Batch
from phalanx.programs import arrays
from phalanx.programs.base import Outcome
from phalanx.programs.data import JobData, Result
from phalanx.programs.evaluate import EVALUATION_FILE
from phalanx.programs.predict import Layers
from phalanx.scoring.measures import (
    class_metrics,
    class_part,
    confusion,
    decided_part,
    number_metrics,
    number_part,
)
from phalanx.scoring.parquet import parquet_bytes
from phalanx.v1.task_service_pb2 import StoredValue


class _Scored:
    """Rows of the job's split through its model."""

    def __init__(self, job: JobData) -> None:
        self._job = job
        self._shards = max(1, job.plan.shards)
        self._split = job.spec.data.split

    @cached_property
    def model(self) -> LoadedModel:
        """The model that the job names."""
        files, gpus = self._job.model_files, self._job.spec.resources.gpus
        return LoadedModel.of_files(files, self._job.code_dir, gpus)

    def _shard(self, number: int) -> tuple[Batch, Predictions]:
        # Numbers to compare with are read as they are stored, whatever the model computes in.
        wide = self.model.document["feature_dtype"] == "float64" or not self._job.classes
        dtype = "float64" if wide else "float32"
        batch = self._job.block(self._split, number, self._shards, dtype)
        return batch, self.model.predict_prepared(batch.features)


class EvaluateTasks(_Scored):
    """Scores shards, merges what is kept of them, and tells the metrics."""

    def run(self, task: int, inputs: Sequence[Result]) -> bytes:
        """Run one task of the graph."""
        if task < self._shards:
            return self._score(task)
        if task == self._shards:
            return self._merge(inputs)
        (merged,) = inputs
        metrics = json.loads(merged.read())["metrics"]
        stored = StoredValue(digest=merged.digest, size_bytes=merged.size_bytes)
        named = {f"{self._split}/{name}": value for name, value in metrics.items()}
        return Outcome(named, files={EVALUATION_FILE: stored}).to_json()

    def _score(self, number: int) -> bytes:
        batch, predictions = self._shard(number)
        scores = "auc" in self._job.spec.evaluate.metrics
        if predictions.decision_values is not None:
            values = predictions.decision_values
            return arrays.pack(decided_part(batch.targets, values, scores=scores))
        if predictions.probabilities is None:
            return arrays.pack(number_part(batch.targets, predictions.labels))
        part = class_part(
            batch.targets, predictions.probabilities, self._job.classes, scores=scores
        )
        if not getattr(self.model.model, "has_probabilities", True):
            del part["log_loss"]
        return arrays.pack(part)

    def _merge(self, inputs: Sequence[Result]) -> bytes:
        spec, classes = self._job.spec, self._job.manifest.classes
        parts = [arrays.unpack(each.read()) for each in inputs]
        names = list(spec.evaluate.metrics)
        document = {
            "model": spec.evaluate.model,
            "data": spec.data.name,
            "split": self._split,
            "rows": self._job.plan.train_rows,
        }
        if classes:
            kind = self._job.manifest.class_kind
            document |= {
                "metrics": class_metrics(parts, names),
                "classes": [label_from_text(text, kind) for text in classes],
                "confusion_matrix": confusion(parts).tolist(),
            }
        else:
            document["metrics"] = number_metrics(parts, names)
        return f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode()


class PredictTasks(_Scored):
    """Predicts shards and writes what was predicted, in the order of the rows."""

    def __init__(self, job: JobData) -> None:
        super().__init__(job)
        self._layers = Layers.of(job.plan)

    def run(self, task: int, inputs: Sequence[Result]) -> bytes:
        """Run one task of the graph."""
        layers = self._layers
        if task < layers.shards:
            return self._predict(task)
        if task < layers.shards + layers.files:
            parts = [arrays.unpack(each.read()) for each in inputs]
            return parquet_bytes(self.model, parts)
        names = layers.file_names(self._job.spec.predict.output)
        stored = [StoredValue(digest=each.digest, size_bytes=each.size_bytes) for each in inputs]
        return Outcome(
            {"rows": float(self._job.plan.train_rows)}, files=dict(zip(names, stored, strict=True))
        ).to_json()

    def _predict(self, number: int) -> bytes:
        _, predictions = self._shard(number)
        if predictions.decision_values is not None:
            return arrays.pack({"decision_values": predictions.decision_values})
        if predictions.probabilities is None:
            return arrays.pack({"values": np.asarray(predictions.labels)})
        return arrays.pack({"probabilities": predictions.probabilities})
