"""A stored model's predictions for a split: shards are predicted, then written in row order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from phalanx.errors import Violation
from phalanx.programs.base import Graph, Program
from phalanx.programs.scored import block_bytes, default_split, model_violations
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

OUTPUT = "predictions.parquet"
ROWS_OF_A_FILE = 500_000
"""More predictions are left as several files: each is the result of one task."""

BYTES_OF_A_ROW, BYTES_OF_A_NUMBER = 60, 50
"""Of predictions, while a file of them is made; measured."""

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,118}\.parquet", re.ASCII)


@dataclass(frozen=True)
class Layers:
    """The first `shards` tasks predict, `files` more write, one ends."""

    shards: int
    files: int

    @staticmethod
    def of(plan: JobPlan) -> Layers:
        """Return those of a job."""
        shards = max(1, plan.shards)
        return Layers(shards, max(1, min(shards, -(-plan.train_rows // ROWS_OF_A_FILE))))

    def shards_of(self, file: int) -> range:
        """Return the shards whose predictions a file has."""
        return range(file * self.shards // self.files, (file + 1) * self.shards // self.files)

    def file_names(self, output: str) -> list[str]:
        """Return what the files are called."""
        if self.files == 1:
            return [output]
        stem = output.removesuffix(".parquet")
        return [f"{stem}-{file + 1:05}-of-{self.files:05}.parquet" for file in range(self.files)]


class Predict(Program):
    """Predictions as Parquet, a row for each of the split, in their order."""

    name: ClassVar[str] = "predict"

    def violations(self, spec: JobSpec) -> Iterator[Violation]:
        """See `Program`."""
        yield from model_violations(spec, "predict.model", spec.predict.model)
        output = spec.predict.output
        if output and not _FILE.fullmatch(output):
            rule = "write the name of a file that ends in .parquet, without a folder"
            yield Violation("predict.output", f"{output[:80]!r} is not allowed; {rule}")

    def violations_against(self, spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
        """See `Program`: nothing more."""
        return iter(())

    def resolve(self, spec: JobSpec, dataset: Dataset) -> None:
        """See `Program`."""
        spec.data.split = spec.data.split or default_split(dataset)
        spec.predict.output = spec.predict.output or OUTPUT

    def worker_bytes(self, spec: JobSpec, dataset: Dataset) -> int:
        """See `Program`: the rows of a shard, or what is written into a file, by itself and beside
        its columns as they are told apart and packed."""
        rows, shards = dataset.rows.get(spec.data.split, 0), max(1, spec.data.shards)
        written = -(-rows // Layers.of(JobPlan(shards=shards, train_rows=rows)).files)
        each = BYTES_OF_A_ROW + BYTES_OF_A_NUMBER * max(1, len(dataset.classes))
        return max(block_bytes(spec, dataset), written * each)

    def graph(self, plan: JobPlan) -> Graph:
        """See `Program`."""
        layers = Layers.of(plan)
        written = tuple(tuple(layers.shards_of(file)) for file in range(layers.files))
        last = tuple(range(layers.shards, layers.shards + layers.files))
        return Graph(((),) * layers.shards + (*written, last))
