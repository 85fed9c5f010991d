"""The tasks of a cascade: solving shards, merging what is left of them, putting the model together.

Between tasks go the numbers of rows, never rows: each task reads those that it solves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.blas import one_blas_thread
from phalanx.cascades import model
from phalanx.cascades.machine import Floats, Ints, Machine, dual_objective, solve
from phalanx.data.statistics import manifest_mean_and_scale, standardise
from phalanx.errors import FailedPrecondition
from phalanx.learn import need_scikit_learn
from phalanx.models.base import dense
from phalanx.programs import arrays
from phalanx.programs.base import ModelParts, Outcome, Piece
from phalanx.programs.cascade import MODEL, SHARD, VECTORS, Layers, Step, passes_of
from phalanx.programs.data import JobData, Result
from phalanx.training.leaf import training_rows
from phalanx.training.sampler import ShardRows, rows_at, shard_rows
from phalanx.v1.training_pb2 import Layout, TensorSpec

Arrays = dict[str, NDArray[Any]]

# What a task hands on: the numbers of rows that may be support vectors; nothing once the passes
# have ended. A top has all of the machine as well, and the dual objective after each pass.
_ROWS, _DUAL, _DONE = "rows", "dual", "done"


class CascadeTasks:
    """Runs the tasks of one job. Raises FailedPrecondition without scikit-learn."""

    def __init__(self, job: JobData) -> None:
        need_scikit_learn("a cascade")
        self._job = job
        self._settings = job.spec.cascade
        self._steps = Layers.of(job.plan).steps

    def run(self, task: int, inputs: Sequence[Result]) -> bytes:
        """Run one task of the graph."""
        step = self._steps[task]
        if step.kind == VECTORS:
            return self._read_vectors(step.number, arrays.unpack(inputs[0].read()))
        if step.kind == MODEL:
            return self._put_together(inputs)
        before = inputs if step.kind == SHARD else inputs[2:]
        found = [arrays.unpack(each.read()) for each in inputs[:2]]
        if any(_has_ended(each) for each in found):
            return before[0].read() if step.top else arrays.pack({})
        rows = [each[_ROWS] for each in found]
        if step.kind == SHARD:
            shard = self._shard(step.number)
            rows.append(np.arange(shard.first, shard.stop))
        last = arrays.unpack(before[0].read()) if before else None
        with one_blas_thread():
            return self._solve(step, np.unique(np.concatenate(rows)), last)

    # Passes

    def _solve(self, step: Step, candidates: Ints, last: Arrays | None) -> bytes:
        features, targets = self._read(candidates)
        machine = solve(features, targets, self._settings.c, self._settings.gamma)
        if step.top:
            return self._end_pass(candidates, features, targets, machine, last)
        # Rows of one class have no machine; those of the other are in another shard.
        return arrays.pack({_ROWS: candidates if machine is None else candidates[machine.support]})

    def _end_pass(
        self,
        candidates: Ints,
        features: Any,
        targets: Ints,
        machine: Machine | None,
        last: Arrays | None,
    ) -> bytes:
        if machine is None:
            raise FailedPrecondition(
                "all rows of the split are of one class, so there is nothing to tell apart",
                reason="ONE_CLASS",
            )
        places = np.searchsorted(machine.classes, targets[machine.support])
        vectors = features[machine.support]
        dual = dual_objective(
            vectors, places, machine.coefficients, len(machine.classes), self._settings.gamma
        )
        duals = np.append(last[_DUAL] if last else np.empty(0), dual)
        return arrays.pack(
            {
                _ROWS: candidates[machine.support],
                model.COEFFICIENTS: machine.coefficients,
                model.INTERCEPTS: machine.intercepts,
                model.PLACES: places.astype(np.float64),
                model.CLASSES: machine.classes.astype(np.float64),
                _DUAL: duals,
                _DONE: np.array([self._is_done(duals)]),
            }
        )

    def _is_done(self, duals: Floats) -> bool:
        if len(duals) == passes_of(self._job.plan.shards, self._settings.passes):
            return True
        if len(duals) < 2:
            return False
        change = abs(float(duals[-1] - duals[-2]))
        return change <= self._settings.gap_at_most * abs(float(duals[-1]))

    # The model

    def _read_vectors(self, number: int, top: Arrays) -> bytes:
        """Return the support vectors among the rows of a shard."""
        shard, rows = self._shard(number), top[_ROWS]
        features, _ = self._read(rows[(rows >= shard.first) & (rows < shard.stop)])
        return arrays.pack({model.VECTORS: dense(features)})

    def _put_together(self, inputs: Sequence[Result]) -> bytes:
        top = arrays.unpack(inputs[0].read())
        width, count = self._job.manifest.features, len(top[_ROWS])
        tensors = [TensorSpec(name=model.VECTORS, shape=[count, width])]
        pieces = []
        for result in inputs[1:]:
            place = arrays.places(result.read())[model.VECTORS]
            if place.length:
                pieces.append(Piece(result.digest, place.offset, place.length))
        places = arrays.places(inputs[0].read())
        for name in (model.COEFFICIENTS, model.INTERCEPTS, model.PLACES, model.CLASSES):
            place = places[name]
            tensors.append(TensorSpec(name=name, shape=place.shape))
            pieces.append(Piece(inputs[0].digest, place.offset, place.length))
        elements = count * width + sum(top[each.name].size for each in tensors[1:])
        layout = Layout(tensors=tensors, dtype="float64", element_count=elements)
        metrics = {
            "cascade/dual": float(top[_DUAL][-1]),
            "cascade/passes": float(len(top[_DUAL])),
            "cascade/support_vectors": float(count),
        }
        if len(top[_DUAL]) > 1:
            change = abs(float(top[_DUAL][-1] - top[_DUAL][-2]))
            metrics["cascade/change"] = change / abs(float(top[_DUAL][-1]))
        return Outcome(metrics, ModelParts(layout, tuple(pieces))).to_json()

    # Rows, by their numbers in the order in which shards are cut

    def _shard(self, number: int) -> ShardRows:
        return training_rows(self._job.plan, self._reader, number)

    def _read(self, rows: Ints) -> tuple[Any, Ints]:
        batch = self._reader.rows(rows_at(self._all, rows))
        if self._settings.standardise:
            scales = manifest_mean_and_scale(self._job.manifest, np.float64)
            if scales is not None:
                standardise(batch.features, *scales)
        return batch.features, batch.targets

    @cached_property
    def _reader(self) -> Any:
        return self._job.reader(self._job.spec.data.split, "float64")

    @cached_property
    def _all(self) -> ShardRows:
        classes = self._shard(0).classes
        return shard_rows(0, 1, self._reader.chunk_rows, classes)


def _has_ended(found: Arrays) -> bool:
    return not found or bool(found.get(_DONE, [False])[0])
