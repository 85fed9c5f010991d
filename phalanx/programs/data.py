"""What a task of a program works on: its job, the data set, and the results of other tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from phalanx.data.choice import choose
from phalanx.data.manifest import DatasetManifest
from phalanx.data.reader import ChunkReader
from phalanx.models.base import Batch
from phalanx.programs.base import Beside
from phalanx.training.leaf import RowReader
from phalanx.training.sampler import rows_in_order, shard_rows
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

Fetch = Callable[[str, int], Path]
"""(digest, size): returns a file with the content of a blob."""


class BlobUnavailable(Exception):
    """A blob could not be had."""


class Run(Protocol):
    """Runs one task of a job; see `phalanx.programs`."""

    def __call__(self, task: int, inputs: Sequence[Result], /) -> bytes:
        """Return the result of a task."""


@dataclass(frozen=True)
class Result:
    """The result of another task, read from the disk when it is asked for."""

    digest: str
    size_bytes: int
    _read: Callable[[str, int], bytes]

    def read(self) -> bytes:
        """Its bytes."""
        return self._read(self.digest, self.size_bytes)


@dataclass(frozen=True)
class JobFiles:
    """What a job needs beside its rows: the manifest of its data set, its code, and the files of
    the stored model that it takes, by their paths in it."""

    manifest: Path
    code: Path | None = None
    model: Mapping[str, Path] = field(default_factory=dict)


class JobData:
    """One job in one process. Whole splits stay in memory until the job is dropped."""

    def __init__(self, plan: JobPlan, files: JobFiles, fetch: Fetch) -> None:
        self.plan = plan
        self.spec = JobSpec.FromString(plan.spec)
        #: Files of the stored model that the job takes; and the folder with the code of it.
        self.model_files = files.model
        self.code_dir = files.code
        #: Of the task that runs.
        self.beside = Beside()
        self._whole = DatasetManifest.from_json(files.manifest.read_bytes())
        self._fetch = fetch
        self._splits: dict[tuple[str, str], Batch] = {}

    @cached_property
    def manifest(self) -> DatasetManifest:
        """The data set with the columns that the job chose."""
        return choose(self._whole, self.spec.data.features).manifest

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a regression."""
        return len(self.manifest.classes)

    def result(self, digest: str, size_bytes: int) -> Result:
        """Return the result of a task that is stored."""
        return Result(digest, size_bytes, lambda *blob: self._fetch(*blob).read_bytes())

    def reader(self, split: str, dtype: str = "float32") -> RowReader:
        """Return a reader of one split with the columns that the job chose."""
        infos = {chunk.digest: chunk for chunk in self._whole.splits.get(split, ())}

        def fetch(digest: str) -> Path:
            return self._fetch(digest, infos[digest].size_bytes)

        return ChunkReader(self._whole, split, fetch, dtype=dtype, columns=self.spec.data.features)

    def whole(self, split: str, dtype: str = "float32") -> Batch:
        """Return all rows of a split in stored order; they stay in memory."""
        key = split, dtype
        if key not in self._splits:
            self._splits[key] = self.block(split, 0, 1, dtype)
        return self._splits[key]

    def block(self, split: str, number: int, count: int, dtype: str = "float32") -> Batch:
        """Return one of `count` blocks of a split: neighbouring rows, in stored order."""
        reader = self.reader(split, dtype)
        selections: list[Any] = rows_in_order(shard_rows(number, count, reader.chunk_rows))
        return reader.rows(selections)
