"""Some rows of a split as a data set of their own, and folds of the rows.

Nothing of the other rows gets into it: the statistics that features are scaled by are those of
these rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.manifest import ChunkInfo, DatasetManifest
from phalanx.data.statistics import accumulator
from phalanx.models.base import Batch
from phalanx.programs.base import Piece
from phalanx.programs.data import JobData, Result
from phalanx.sweeps.results import Results
from phalanx.training.leaf import RowReader
from phalanx.training.sampler import RowSelection, ShardRows, rows_at, shard_rows
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

Ints = NDArray[np.int64]

BLOCK_ROWS = 4096
"""So many rows are read at a time where all of them are looked at once."""


class PartReader:
    """Reads rows of a part as if they were one chunk."""

    def __init__(self, whole: RowReader, positions: Ints, manifest: DatasetManifest) -> None:
        self.manifest = manifest
        self.dtype = whole.dtype
        (self.chunks,) = manifest.splits.values()
        self.chunk_rows: tuple[int, ...] = tuple(chunk.rows for chunk in self.chunks)
        self._whole = whole
        self._all = all_rows(whole)
        self._positions = positions
        self._of_class: dict[int, Ints] = {}

    def rows(self, selections: Sequence[RowSelection]) -> Batch:
        """Return copies of the rows, one selection after another."""
        wanted: list[RowSelection] = []
        for selection in selections:
            rows = self._positions[self._places(selection)]
            wanted += rows_at(self._all, rows)
        return self._whole.rows(wanted)

    def _places(self, selection: RowSelection) -> Ints:
        if selection.label is None:
            return selection.rows
        if selection.label not in self._of_class:
            targets = targets_of(self._whole)[self._positions]
            self._of_class[selection.label] = np.flatnonzero(targets == selection.label)
        return self._of_class[selection.label][selection.rows]


class PartOfData(JobData):
    """The data of another job on a part of the rows, with the results of its tasks."""

    def __init__(self, whole: JobData, positions: Ints | None, results: Results) -> None:
        self._parent = whole
        self._positions = positions
        self._results = results
        self.model_files = {}
        self.code_dir = None
        self._splits = {}

    def take(self, spec: JobSpec, plan: JobPlan) -> None:
        """Say what the job is, which may depend on how many rows there are."""
        self.spec, self.plan = spec, plan

    @cached_property
    def manifest(self) -> DatasetManifest:
        """The data set as it would be with these rows alone."""
        whole, split = self._parent.manifest, self._parent.spec.data.split
        if self._positions is None:
            return replace(whole, splits={split: whole.splits[split]})
        statistics = accumulator(whole.features, whole.format == "csr")
        reader = self._parent.reader(split, "float64")
        for batch in blocks(reader, self._positions):
            statistics.add(batch.features)
        classes = targets_of(reader)[self._positions] if whole.classes else None
        chunk = ChunkInfo(
            digest="",
            rows=len(self._positions),
            size_bytes=0,
            class_rows=()
            if classes is None
            else tuple(np.bincount(classes, minlength=len(whole.classes)).tolist()),
        )
        return replace(whole, splits={split: (chunk,)}, statistics=statistics.result())

    def reader(self, split: str, dtype: str = "float32") -> RowReader:
        """Return a reader of these rows."""
        whole = self._parent.reader(self._parent.spec.data.split, dtype)
        if self._positions is None:
            return whole
        return PartReader(whole, self._positions, self.manifest)

    def result(self, digest: str, size_bytes: int) -> Result:
        """Return the result of a task of this job."""
        return Result(
            digest, size_bytes, lambda name, size: self._results.read(Piece(name, 0, size))
        )


def all_rows(reader: RowReader) -> ShardRows:
    """Return all rows of a split, in stored order."""
    return shard_rows(0, 1, reader.chunk_rows)


def blocks(reader: RowReader, positions: Ints) -> Iterator[Batch]:
    """Yield rows by their numbers, some at a time."""
    everything = all_rows(reader)
    for first in range(0, len(positions), BLOCK_ROWS):
        yield reader.rows(rows_at(everything, positions[first : first + BLOCK_ROWS]))


def targets_of(reader: RowReader) -> NDArray[Any]:
    """Return the targets of a split, in stored order."""
    everything = np.arange(sum(reader.chunk_rows))
    return np.concatenate([batch.targets for batch in blocks(reader, everything)])


def fold_of(job: JobData, folds: int, number: int) -> tuple[Ints, Ints]:
    """Return which rows train and which are held out, as scikit-learn cuts them: stratified where
    there are classes, shuffled by the seed of the job."""
    from sklearn.model_selection import KFold, StratifiedKFold

    kind = StratifiedKFold if job.classes else KFold
    cut = kind(folds, shuffle=True, random_state=job.spec.seed % 2**32)
    targets = targets_of(job.reader(job.spec.data.split, "float64"))
    with warnings.catch_warnings():
        # A class with fewer rows than folds is in some of them only; it would say so each time.
        warnings.simplefilter("ignore", UserWarning)
        train, held_out = list(cut.split(np.zeros(len(targets)), targets))[number]
    return np.asarray(train, np.int64), np.asarray(held_out, np.int64)
