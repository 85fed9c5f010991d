"""Leaves: one shard's work in one step, as pure functions.

Everything that a leaf depends on is in its arguments. Its rows are gathered, standardised with the
statistics of the train split, and handed to the model in one piece: a leaf is never re-batched,
since a matrix product of half the rows has other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from phalanx.data.manifest import ChunkInfo, DatasetManifest
from phalanx.data.statistics import manifest_mean_and_scale, standardise
from phalanx.models.base import Array, Batch, Model, buffer_mask, decay_mask
from phalanx.models.clipping import clipped_gradient
from phalanx.optimizers import build_local_optimizer
from phalanx.privacy.settings import sampling_rate
from phalanx.reducers import Contribution
from phalanx.reduction import all_finite
from phalanx.specs.balance import by_class
from phalanx.training.classes import ClassLayout
from phalanx.training.sampler import (
    RowSelection,
    ShardRows,
    chunks_for_leaf,
    chunks_in_order,
    rows_by_chance,
    rows_for_leaf,
    rows_in_order,
    shard_rows,
)
from phalanx.training.two_rounds import row_shards
from phalanx.v1.job_spec_pb2 import JobSpec, Train
from phalanx.v1.training_pb2 import JobPlan, Layout


class Chunks(Protocol):
    """The chunks of one split: all that the sampler has to know of it."""

    chunks: tuple[ChunkInfo, ...]

    @property
    def chunk_rows(self) -> tuple[int, ...]:
        """Rows of each chunk of the split, in order."""


class RowReader(Chunks, Protocol):
    """What gathers rows of one split; see ``phalanx.data.reader.ChunkReader``."""

    manifest: DatasetManifest
    dtype: np.dtype[np.generic]

    def rows(self, selections: Sequence[RowSelection]) -> Batch:
        """Return copies of the rows, one selection after another."""


@dataclass(frozen=True)
class LeafOutcome:
    """What a leaf yields beside its vector.

    ``count`` 0 says that the shard had no rows left; its vector is not written then. ``finite`` is
    False where the vector or the loss holds a NaN or an infinity: such a leaf enters no sum.
    """

    count: int
    loss_sum: float
    finite: bool


@dataclass(frozen=True)
class _Settings:
    seed: int
    train: Train
    standardise: bool
    by_class: bool
    oversample: bool
    #: Whether the algorithm asks for the numbers of its rows; each leaf has all of its shard's.
    positions: bool
    #: By class label; empty: every row counts 1.
    weights: tuple[tuple[str, float], ...]
    #: The longest gradient of a row in a private job; None: the job is not private.
    clip_norm: float | None


def run_leaf(
    model: Model,
    parameters: Array,
    reader: RowReader,
    plan: JobPlan,
    shard: int,
    step: int,
    out: Array,
) -> LeafOutcome:
    """Run one training leaf.

    Args:
        model: the job's model.
        parameters: (n,) version ``step``, or one of the versions of that step.
        reader: rows of the split that the job trains on, in the columns of the shard.
        plan: what the job is.
        shard: which shard, below ``plan.shards``.
        step: the step whose gradient is taken; it fixes epoch and rows.
        out: (n,) the gradient sum, written whole unless the count is 0.
    """
    batch = leaf_batch(reader, plan, shard, step)
    return run_batch(model, parameters, batch, out, row_clip_norm(plan))


def leaf_batch(reader: RowReader, plan: JobPlan, shard: int, step: int) -> Batch | None:
    """Return the rows of one training leaf as its model takes them; None: the shard has none left.

    They do not depend on the parameters, so they can be had before these are there.
    """
    settings = _settings(plan.spec)
    selections = leaf_rows(plan, reader, shard, step)
    if not selections:
        return None
    batch = _batch(reader, selections, settings)
    batch = replace(batch, shard=shard, key=(settings.seed, shard, step))
    if settings.positions:
        rows = training_rows(plan, reader, shard)
        batch = replace(batch, positions=np.arange(rows.first, rows.stop))
    if not settings.weights:
        return batch
    return replace(batch, weights=_class_weights(reader, settings)[batch.targets])


def leaf_rows(plan: JobPlan, split: Chunks, shard: int, step: int) -> list[RowSelection]:
    """Return which rows of the split one training leaf reads."""
    rows = training_rows(plan, split, shard)
    settings = _settings(plan.spec)
    if settings.clip_norm is not None:
        rate = sampling_rate(settings.train, plan.train_rows)
        return rows_by_chance(rows, plan.sampler_key, step, rate)
    epoch, step_in_epoch = divmod(step, max(1, plan.steps_per_epoch))
    return rows_for_leaf(rows, settings.seed, epoch, step_in_epoch, plan.rows_per_leaf)


def training_rows(plan: JobPlan, reader: Chunks, shard: int) -> ShardRows:
    """Return the rows of a shard that its training leaves read."""
    settings = _settings(plan.spec)
    classes = _class_layout(reader, settings) if settings.by_class else None
    if plan.by_columns:
        shard = 0  # all of them read the rows of one
    return shard_rows(shard, row_shards(plan), reader.chunk_rows, classes)


def row_clip_norm(plan: JobPlan) -> float | None:
    """Return the norm that a private job shortens the gradient of each row to; None: none."""
    return _settings(plan.spec).clip_norm


def run_batch(
    model: Model,
    parameters: Array,
    batch: Batch | None,
    out: Array,
    clip_norm: float | None = None,
) -> LeafOutcome:
    """Run a training leaf on the rows that `leaf_batch` returned; see `run_leaf`.

    With a `clip_norm` the gradient of each row is shortened to it, and the loss is 0: no noise
    would be on it, and it would tell of the rows.
    """
    if batch is None:
        return LeafOutcome(0, 0.0, True)
    with np.errstate(all="ignore"):
        if clip_norm is not None:
            clipped_gradient(model, parameters, batch, clip_norm, out)
            return LeafOutcome(batch.rows, 0.0, all_finite(out))
        sums = model.gradient(parameters, batch, out)
        finite = isfinite(sums.loss_sum) and all_finite(out)
    return LeafOutcome(sums.count, sums.loss_sum, finite)


class LocalSteps:
    """What the leaves of a job with local steps share; for one thread at a time.

    A leaf starts at the parameters of its version, takes ``plan.local_steps`` steps of its own and
    contributes the difference: (start - end) · examples. So the mean over all examples is the
    shards' mean difference, which the outer optimizer takes for a gradient. With one step and an
    outer rate of 1 that is a synchronous step. Of a buffer it contributes what the buffer has
    become, as any leaf does. What the shard's optimizer remembers goes on from
    one leaf of the shard to its next; it counts the shard's steps, also those without rows.

    Attributes:
        state_names: names of the vectors that it remembers.
    """

    def __init__(self, plan: JobPlan, layout: Layout) -> None:
        train = JobSpec.FromString(plan.spec).train
        self.count = plan.local_steps
        self._optimizer = build_local_optimizer(train, plan.total_steps * plan.local_steps)
        self.state_names = self._optimizer.state_names
        self._clip_norm = train.optimizer.clip_norm or None
        self._decay = decay_mask(layout)
        self._marked = buffer_mask(layout)
        self._buffers: Array = np.empty((3, layout.element_count), layout.dtype)

    def steps_of(self, version: int) -> range:
        """The shards' own steps between ``version`` and the next one."""
        return range(version * self.count, (version + 1) * self.count)

    def run(
        self,
        model: Model,
        parameters: Array,
        version: int,
        batch_of: Callable[[int], Batch | None],
        out: Array,
        state: dict[str, Array],
    ) -> LeafOutcome:
        """Run one leaf; ``batch_of`` gives the rows of one of the shard's own steps.

        ``state`` is what the shard's optimizer remembers of the steps before; it is updated in
        place. At version 0 all of it is zero.
        """
        weights, following, gradient = self._buffers
        weights[:] = parameters
        count, loss_sum = 0, 0.0
        with np.errstate(all="ignore"):
            for step in self.steps_of(version):
                batch = batch_of(step)
                if batch is None:
                    continue
                sums = model.gradient(weights, batch, gradient)
                factor = Contribution([gradient], sums.count).factor(self._clip_norm)
                if factor != 1.0:
                    np.multiply(gradient, gradient.dtype.type(factor), out=gradient)
                self._optimizer.apply(
                    weights,
                    gradient,
                    sums.count,
                    self._decay,
                    state,
                    step,
                    following,
                    buffers=self._marked,
                )
                weights, following = following, weights
                count, loss_sum = count + sums.count, loss_sum + sums.loss_sum
            if count == 0:
                return LeafOutcome(0, 0.0, True)
            np.subtract(parameters, weights, out=out)
            if self._marked is not None:
                np.copyto(out, weights, where=self._marked)
            np.multiply(out, out.dtype.type(count), out=out)
        return LeafOutcome(count, loss_sum, isfinite(loss_sum) and all_finite(out))


def run_evaluation_leaf(
    model: Model,
    parameters: Array,
    reader: RowReader,
    plan: JobPlan,
    shard: int,
    sums: NDArray[np.float64],
) -> LeafOutcome:
    """Run one evaluation leaf: write the metric sums over its rows into ``sums``.

    ``shard`` is one of ``plan.evaluation_shards``, ``reader`` reads the split of the evaluation.
    Sums that are not finite are a measurement like any other, so the outcome is always finite.
    """
    rows = shard_rows(shard, plan.evaluation_shards, reader.chunk_rows)
    selections = rows_in_order(rows)
    if not selections:
        return LeafOutcome(0, 0.0, True)
    batch = _batch(reader, selections, _settings(plan.spec))
    with np.errstate(all="ignore"):
        sums[:] = model.evaluate(parameters, batch)
    return LeafOutcome(batch.rows, 0.0, True)


def leaf_chunks(plan: JobPlan, reader: RowReader, shard: int, step: int) -> list[int]:
    """Return the indices of the chunks that a training leaf may read."""
    rows = training_rows(plan, reader, shard)
    settings = _settings(plan.spec)
    if settings.clip_norm is not None:
        return chunks_in_order(rows)
    epoch, step_in_epoch = divmod(step, max(1, plan.steps_per_epoch))
    return chunks_for_leaf(rows, settings.seed, epoch, step_in_epoch, plan.rows_per_leaf)


_SCALES: WeakKeyDictionary[RowReader, tuple[Array, Array] | None] = WeakKeyDictionary()
"""Mean and scale of each reader's data set, computed once."""


def _batch(reader: RowReader, selections: list[RowSelection], settings: _Settings) -> Batch:
    batch = reader.rows(selections)
    if settings.standardise:
        if reader not in _SCALES:
            _SCALES[reader] = manifest_mean_and_scale(reader.manifest, reader.dtype)
        scales = _SCALES[reader]
        if scales is not None:
            standardise(batch.features, *scales)
    return batch


@lru_cache(maxsize=16)
def _settings(spec: bytes) -> _Settings:
    message = JobSpec.FromString(spec)
    data, privacy = message.data, message.train.privacy
    return _Settings(
        message.seed,
        message.train,
        message.train.model.standardise,
        by_class=by_class(data),
        oversample=data.HasField("oversample"),
        positions=message.train.optimizer.HasField("cocoa"),
        weights=tuple(sorted(data.class_weights.weights.items())),
        clip_norm=privacy.clip_norm if message.train.HasField("privacy") else None,
    )


_LAYOUTS: WeakKeyDictionary[Chunks, ClassLayout] = WeakKeyDictionary()
_WEIGHTS: WeakKeyDictionary[RowReader, Array] = WeakKeyDictionary()
"""The even order of each reader's rows, and the weights of its classes, computed once."""


def _class_layout(reader: Chunks, settings: _Settings) -> ClassLayout:
    if reader not in _LAYOUTS:
        chunk_classes = [chunk.class_rows for chunk in reader.chunks]
        _LAYOUTS[reader] = ClassLayout(chunk_classes, oversample=settings.oversample)
    return _LAYOUTS[reader]


def _class_weights(reader: RowReader, settings: _Settings) -> Array:
    if reader not in _WEIGHTS:
        by_label = dict(settings.weights)
        weights = [by_label[label] for label in reader.manifest.classes]
        _WEIGHTS[reader] = np.array(weights, reader.dtype)
    return _WEIGHTS[reader]
