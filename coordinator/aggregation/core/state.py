"""Parameters and optimizer state of one range, and snapshots of both for checkpoints.

State arrays are kept per frame and updated in place. A snapshot shares them: before the next
update of a frame that a snapshot still needs, the frame's arrays are copied (copy on write), so
that taking a snapshot costs nothing and never stops a step. Parameter frames are immutable and
need no copy at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.core.versions import VersionStore
from phalanx.compressors import Codec
from phalanx.errors import DataLoss, Internal
from phalanx.frames import frame_grid
from phalanx.models.base import buffer_mask, decay_mask, frame_masks
from phalanx.optimizers import ContributionOptimizer, Late, Optimizer
from phalanx.training.best import BEST_VECTOR
from phalanx.updates import Update
from phalanx.v1 import training_pb2

Array = NDArray[np.generic]
AnyRule = Optimizer | ContributionOptimizer | Update
"""What makes a version of the one before."""


@dataclass
class Snapshot:
    """One range at one version; `frames` and `state` are released as they are written."""

    range: training_pb2.ParameterRange
    version: int
    dtype: np.dtype[np.generic]
    grid: list[tuple[int, int]]
    state_names: tuple[str, ...]
    frames: list[Array]
    #: Per frame the shared state arrays; None once they are not needed any more.
    state: list[dict[str, Array] | None] = field(default_factory=list)
    #: Flat vectors beside those of the optimizer, in pieces.
    extra: Mapping[str, Sequence[Array]] = field(default_factory=dict)

    def parameters(self, index: int) -> Array:
        """The elements of parameter frame `index`."""
        return self.frames[index]

    def release(self) -> None:
        """Nothing of the state is needed any more: the steps stop copying it."""
        for index in range(len(self.state)):
            self.state[index] = None


@dataclass(frozen=True)
class Best:
    """The elements of the version with the best evaluation, frame by frame; they never change."""

    version: int
    frames: Sequence[Array]


class RangeParameters:
    """One owned range: its versions, its optimizer state and the snapshots that share it, and the
    elements of the best version, in jobs that keep it."""

    def __init__(
        self,
        term: int,
        piece: training_pb2.ParameterRange,
        layout: training_pb2.Layout,
        optimizer: AnyRule,
        codec: Codec | None = None,
    ) -> None:
        """`codec` is what versions are encoded with on their way to the workers."""
        self.piece = piece
        self.dtype = np.dtype(layout.dtype).newbyteorder("<")
        self.grid = frame_grid(piece.element_count, self.dtype.itemsize)
        self.versions = VersionStore(term, piece.index, self.grid, self.dtype, codec)
        self._optimizer = optimizer
        #: Names of the vectors beside the parameters.
        self.state_names = () if isinstance(optimizer, Update) else optimizer.state_names
        part = piece.first_element, piece.element_count
        self._decay = frame_masks(decay_mask(layout, *part), self.grid)
        self._buffers = frame_masks(buffer_mask(layout, *part), self.grid)
        self._state: list[dict[str, Array]] = [
            {name: np.zeros(count, self.dtype) for name in self.state_names}
            for _, count in self.grid
        ]
        self._snapshots: list[Snapshot] = []
        self._best: Best | None = None
        self._scratch = np.empty(max(count for _, count in self.grid), self.dtype)

    def apply(self, index: int, version: int, gradient_sum: Array, divisor: int) -> Array:
        """New elements of frame `index` at `version + 1`, in scratch memory of this object."""
        assert isinstance(self._optimizer, Optimizer)
        self._keep_snapshots_whole(index)
        out = self._scratch[: self.grid[index][1]]
        self._optimizer.apply(
            self.versions.values(version, index),
            gradient_sum,
            divisor,
            self._decay[index],
            self._state[index],
            version,
            out,
            buffers=self._buffers[index],
        )
        return out

    def apply_late(
        self, index: int, version: int, gradient_sum: Array, count: int, late: Late, read: Array
    ) -> Array:
        """As `apply`, of one contribution, which was computed at elements `read`."""
        assert isinstance(self._optimizer, ContributionOptimizer)
        self._keep_snapshots_whole(index)
        out = self._scratch[: self.grid[index][1]]
        self._optimizer.apply_late(
            self.versions.values(version, index),
            gradient_sum,
            count,
            self._decay[index],
            self._state[index],
            late,
            read,
            out,
            self._buffers[index],
        )
        return out

    @property
    def needs_all_frames(self) -> bool:
        """Whether what makes a version has to see all of the sums."""
        return isinstance(self._optimizer, Update)

    def update(self, version: int, sums: Sequence[Array], count: int) -> Array:
        """All elements at `version + 1`, of the reduced frames, in order."""
        assert isinstance(self._optimizer, Update)
        frames = [self.versions.values(version, index) for index in range(len(self.grid))]
        parameters, total = np.concatenate(frames), np.concatenate(list(sums))
        return self._optimizer.apply(parameters, total, count, version)

    def keep(self, index: int, version: int) -> None:
        """Frame `index` of `version + 1` is that of `version`."""
        self.versions.publish(version + 1, index, self.versions.values(version, index))

    def load(self, version: int, parameters: Array, state: Mapping[str, Array]) -> None:
        """Start at `version` with these flat vectors; the state is copied, frame by frame.

        Raises `DataLoss` where a vector is missing or has another length or type.
        """
        vectors = {"parameters": parameters, **state}
        for name in ("parameters", *self.state_names):
            vector = vectors.get(name)
            if vector is None or vector.dtype != self.dtype or len(vector) != self._length:
                raise DataLoss(f"range {self.piece.index} has no vector {name!r} that fits it")
        for index, (first, count) in enumerate(self.grid):
            self.versions.publish(version, index, parameters[first : first + count])
            for name, array in self._state[index].items():
                array[:] = state[name][first : first + count]

    def keep_best(self, version: int | None) -> None:
        """Keep this version, which is whole here or kept already, as the best; None: there is none.

        Frames are immutable, so it costs nothing but the memory of the one that it is.
        """
        if version is None:
            self._best = None
        elif self._best is None or self._best.version != version:
            held = self.versions.get(version)
            if held is None or not held.whole:
                raise Internal(
                    f"range {self.piece.index} does not have the best version, {version}"
                )
            self._best = Best(version, [values for values in held.values if values is not None])

    def load_best(self, version: int, vector: Array | None) -> None:
        """Take over the best version of a checkpoint: a flat vector, or that which is whole here.

        Raises `DataLoss` where the vector is missing or has another length or type.
        """
        if version == self.versions.newest_whole:
            self.keep_best(version)
            return
        if vector is None or vector.dtype != self.dtype or len(vector) != self._length:
            raise DataLoss(f"range {self.piece.index} has no vector {BEST_VECTOR!r} that fits it")
        # A copy, since the vector is a view that would keep all of the checkpoint in memory.
        pieces = [vector[first : first + count].copy() for first, count in self.grid]
        self._best = Best(version, pieces)

    def snapshot(self, version: int) -> Snapshot:
        """The range at `version`, which must be whole and not yet followed by another frame."""
        held = self.versions.get(version)
        assert held is not None
        assert self.versions.newest_whole == version
        assert self.versions.following(version) is None, "the state has moved on"
        snapshot = Snapshot(
            range=self.piece,
            version=version,
            dtype=self.dtype,
            grid=self.grid,
            state_names=self.state_names,
            frames=[values for values in held.values if values is not None],
            state=list(self._state),
        )
        if self._best is not None and self._best.version != version:
            snapshot.extra = {BEST_VECTOR: self._best.frames}
        self._snapshots = [kept for kept in self._snapshots if any(kept.state)]
        if self.state_names:
            self._snapshots.append(snapshot)
        return snapshot

    @property
    def _length(self) -> int:
        return self.piece.element_count

    def _keep_snapshots_whole(self, index: int) -> None:
        state = self._state[index]
        if any(snapshot.state[index] is state for snapshot in self._snapshots):
            self._state[index] = {name: array.copy() for name, array in state.items()}
