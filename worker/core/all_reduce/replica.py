"""Parameters and optimizer state as every member of an all-reduce job holds them.

A member goes from version v to v + 1 only when the whole reduced gradient of step v is in, from the
owners of all ranges, and keeps that gradient until the next one is whole. So of the members of a
term none is ever more than one step ahead, and one that is behind needs the kept gradient and
nothing else; one that holds nothing gets everything.

The update is done in slices, so that whoever else waits has his turn in between; one that was begun
is always finished, since the optimizer's state is updated in place.

Where the job keeps its best evaluation every member holds a copy of those parameters, too. Which
version that is, each record says. A member hears of it before the version is written over: the
record comes before the gradient of the next step, and with what a member is sent that is behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import DataLoss, InvalidArgument
from phalanx.frames import encode_response, frame_grid
from phalanx.models.base import buffer_mask, decay_mask, frame_masks
from phalanx.optimizers import build_optimizer, gradient_limit
from phalanx.reducers import Contribution
from phalanx.reduction import all_finite
from phalanx.training.best import BEST_VECTOR, kept_in
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord
from worker.core.versions import VersionAssembly

Array = NDArray[Any]
Memory = Callable[[int], Array]

NONE = -1
"""Stands for no version at all."""

PARAMETERS = "parameters"
GRADIENT = "gradient"
RECORDS_KEPT = 3


class NonFinite(Exception):
    """An update made parameters that are not finite."""


class Gradient:
    """The reduced gradient of one step, as its parts come in."""

    def __init__(self, version: int, values: Array) -> None:
        self.version = version
        self.values = values
        #: No shard was present: the step changes nothing.
        self.empty = False
        self.count = 0
        self.loss = 0.0
        self._seen: set[int] = set()
        self._left = len(values)

    @property
    def whole(self) -> bool:
        """Every element is here."""
        return self._left == 0

    def take(
        self, first: int, count: int, values: Array | None, examples: int, loss: float
    ) -> None:
        """Take elements from `first` on, of a step with these sums; copies change nothing."""
        if first in self._seen:
            return
        self._seen.add(first)
        self._left -= count
        self.count, self.loss = examples, loss
        if values is None:
            self.empty = True
        else:
            self.values[first : first + count] = values


class Replica:
    """What one member holds of one job, over terms.

    `memory` gives the shared buffers; versions are in the first two of them by turns.
    """

    def __init__(self, plan: training_pb2.JobPlan, memory: Memory) -> None:
        spec = JobSpec.FromString(plan.spec)
        self.dtype = np.dtype(plan.layout.dtype).newbyteorder("<")
        self.grid = frame_grid(plan.layout.element_count, self.dtype.itemsize)
        self.version = NONE
        #: Sums of the step that made the version.
        self.count = 0
        self.loss = 0.0
        self._size = plan.layout.element_count
        self._memory = memory
        self._optimizer = build_optimizer(spec.train, plan.total_steps)
        self._clip_norm = gradient_limit(spec.train)
        self._decay = frame_masks(decay_mask(plan.layout), self.grid)
        self._buffers = frame_masks(buffer_mask(plan.layout), self.grid)
        self._state = self._zeros()
        self._open: Gradient | None = None
        self._kept: Gradient | None = None
        self._spare: Array | None = None
        self._done = 0
        self._factor = 1.0
        #: (vector, first element) of a whole state on its way here that are still missing.
        self._missing: set[tuple[str, int]] = set()
        self._coming = NONE
        self._records: dict[int, GoRecord] = {}
        self._keeps_best = spec.output.HasField("best")
        #: The version with the best evaluation, by the newest record; -1: none.
        self._wanted_best = NONE
        #: Its elements, and of which version they are.
        self._best: Array | None = None
        self._best_version = NONE

    def buffer_of(self, version: int) -> int:
        """The shared buffer that a version is in."""
        return version % 2

    @property
    def parameters(self) -> Array:
        """The elements of the version."""
        return self._memory(self.buffer_of(self.version))

    # -- steps

    def reduced(
        self, version: int, first: int, count: int, values: Array | None, examples: int, loss: float
    ) -> bool:
        """Take a part of the reduced gradient of one step; True: `work` is to be called.

        What belongs to a step that is done is ignored.
        """
        if version != self.version:
            return False
        if self._open is None:
            spare = self._spare
            self._spare = None
            self._open = Gradient(
                version, np.empty(self._size, self.dtype) if spare is None else spare
            )
        if self._open.whole:
            return False
        self._open.take(first, count, values, examples, loss)
        return self._open.whole

    @property
    def works(self) -> bool:
        """A whole gradient is here that was not applied to all parameters yet."""
        return self._open is not None and self._open.whole

    def work(self) -> bool:
        """Update a slice of the parameters; True: the next version is whole now.

        Raises `NonFinite`.
        """
        gradient = self._open
        assert gradient is not None
        assert gradient.whole
        with np.errstate(over="ignore", invalid="ignore"):
            if self._done == 0:
                self._factor = self._clip(gradient)
            self._update(gradient, self._done)
        self._done += 1
        if self._done < len(self.grid):
            return False
        kept = self._kept
        self._spare = kept.values if kept is not None else None
        self._kept, self._open, self._done = gradient, None, 0
        self.version += 1
        self.count, self.loss = gradient.count, gradient.loss
        self._hold_best()
        return True

    def finish(self) -> bool:
        """Do all that `work` would; True: that made a version. Forget what is not whole."""
        made = False
        while self.works:
            made |= self.work()
        if self._open is not None:
            self._spare, self._open = self._open.values, None
        self._missing.clear()
        return made

    def forget(self) -> None:
        """Hold nothing any more."""
        self._records.clear()
        self._best, self._best_version, self._wanted_best = None, NONE, NONE
        self._start_at(NONE, 0, 0.0)

    def _clip(self, gradient: Gradient) -> float:
        if self._clip_norm is None or gradient.empty or not gradient.count:
            return 1.0
        pieces = [gradient.values[first : first + count] for first, count in self.grid]
        return Contribution(pieces, gradient.count).factor(self._clip_norm)

    def _update(self, gradient: Gradient, index: int) -> None:
        first, count = self.grid[index]
        piece = slice(first, first + count)
        before = self.parameters[piece]
        out = self._memory(self.buffer_of(self.version + 1))[piece]
        if gradient.empty or not gradient.count:
            out[:] = before
            return
        values = gradient.values[piece]
        if self._factor != 1.0:
            values = values * values.dtype.type(self._factor)
        state = {name: vector[piece] for name, vector in self._state.items()}
        decay = self._decay[index]
        self._optimizer.apply(
            before,
            values,
            gradient.count,
            decay,
            state,
            self.version,
            out,
            buffers=self._buffers[index],
        )
        if not all_finite(out):
            raise NonFinite(
                f"step {self.version + 1} made parameters that are not finite; "
                "lower the learning rate or check the data"
            )

    # -- what starts a version

    def initialise(self, buffer: int) -> None:
        """Begin with what is in a buffer as version 0. Raises `NonFinite`."""
        values = self._memory(buffer)
        if not all_finite(values):
            raise NonFinite("the initial parameters are not finite")
        self._memory(0)[:] = values
        self._state = self._zeros()
        self._start_at(0, 0, 0.0)

    def load(
        self, version: int, parameters: Array, state: Mapping[str, Array], root_state: str
    ) -> None:
        """Begin with a checkpoint. Raises `DataLoss` where a vector does not fit."""
        record = GoRecord(version=version, root_state=root_state)
        into = self._vectors(version)
        best_version = self._best_in(root_state)
        if best_version > NONE:
            record.best_version = best_version
            into |= self._best_to_come(record, version)
        vectors = {PARAMETERS: parameters, **state}
        for name, target in into.items():
            vector = vectors.get(name)
            if vector is None or vector.dtype != self.dtype or len(vector) != self._size:
                raise DataLoss(f"the checkpoint has no vector {name!r} that fits the job")
            target[:] = vector
        self._start_at(version, 0, 0.0)
        self.remember(record)

    def _best_in(self, root_state: str) -> int:
        """The version with the best evaluation as the root of a checkpoint knew it; -1: none."""
        if not self._keeps_best:
            return NONE
        try:
            kept = kept_in(json.loads(root_state))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataLoss(f"the state of range 0 cannot be read: {error!r}") from None
        return NONE if kept is None else kept.step

    def _start_at(self, version: int, count: int, loss: float) -> None:
        self.version, self.count, self.loss = version, count, loss
        self._open = self._kept = None
        self._done = 0
        self._missing.clear()

    # -- from member to member

    def hand_over(self, term: int, held: int) -> Iterator[bytes]:
        """Messages that bring a member from what it holds to this version."""
        kept = self._kept
        if kept is not None and held == kept.version:
            vectors: dict[str, Array | None] = {GRADIENT: None if kept.empty else kept.values}
        else:
            vectors = dict(self._held_vectors())
        record = self.record
        for name, vector in vectors.items():
            for first, count in self.grid:
                frame = pb.StateFrame(
                    term=term,
                    version=self.version,
                    vector=name,
                    first_element=first,
                    element_count=count,
                    example_count=self.count,
                    loss_sum=self.loss,
                    record=record,
                )
                header = pb.ExchangeResponseHeader(state=frame)
                payload = None if vector is None else vector[first : first + count].data
                yield encode_response(header, payload)

    def taken_over(self, frame: pb.StateFrame, payload: memoryview) -> bool:
        """Take one message of `hand_over`; True: the version is here, or `work` makes it now."""
        if frame.version <= self.version:
            return False
        first, count = frame.first_element, frame.element_count
        if (first, count) not in self.grid or len(payload) not in (0, count * self.dtype.itemsize):
            raise InvalidArgument(f"elements {first}+{count} are no frame of a member's state")
        if frame.HasField("record"):
            self.remember(frame.record)
        values = np.frombuffer(payload, self.dtype) if len(payload) else None
        if frame.vector == GRADIENT:
            before = frame.version - 1
            return self.reduced(before, first, count, values, frame.example_count, frame.loss_sum)
        into = self._vectors(frame.version) | self._best_to_come(frame.record, frame.version)
        if frame.vector not in into or values is None:
            raise InvalidArgument(f"a member's state has no vector {frame.vector!r}")
        if self._coming != frame.version or not self._missing:
            # What was held is written over: from here on there is nothing to go back to.
            self._start_at(NONE, 0, 0.0)
            self._coming = frame.version
            self._missing = {(name, start) for name in into for start, _ in self.grid}
        into[frame.vector][first : first + count] = values
        self._missing.discard((frame.vector, first))
        if self._missing:
            return False
        self._start_at(frame.version, frame.example_count, frame.loss_sum)
        self._hold_best()
        return True

    def copy(self) -> dict[str, Array]:
        """A copy of all that is held, for a checkpoint."""
        return {name: vector.copy() for name, vector in self._held_vectors().items()}

    # -- the root's state

    def remember(self, go: GoRecord) -> None:
        """Keep the newest record of each of the last versions."""
        if go.root_state:
            self._records[go.version] = go
            for old in sorted(self._records)[:-RECORDS_KEPT]:
                del self._records[old]
            newest = self._records[max(self._records)]
            self._wanted_best = newest.best_version if newest.HasField("best_version") else NONE
            self._hold_best()

    @property
    def record(self) -> GoRecord | None:
        """The newest known record of the version, or of the one before it."""
        known = self._records
        return known.get(self.version) or known.get(self.version - 1)

    # -- the best evaluation

    def _hold_best(self) -> None:
        """Copy the best version, once it is known which it is and as long as it is here."""
        if self._wanted_best == NONE:
            self._best, self._best_version = None, NONE
        elif self._wanted_best == self.version != self._best_version:
            self._best, self._best_version = self.parameters.copy(), self.version

    def _best_to_come(self, record: GoRecord, version: int) -> dict[str, Array]:
        """Where to put the best version that comes along with another one, if there is one."""
        if not record.HasField("best_version") or record.best_version == version:
            return {}
        if self._best is None or self._best_version != record.best_version:
            self._best = np.empty(self._size, self.dtype)
            self._best_version = record.best_version
        return {BEST_VECTOR: self._best}

    def _held_vectors(self) -> dict[str, Array]:
        vectors = self._vectors(self.version)
        if self._wanted_best not in (NONE, self.version):
            assert self._best is not None
            assert self._best_version == self._wanted_best, "every member has seen the best version"
            vectors[BEST_VECTOR] = self._best
        return vectors

    def _vectors(self, version: int) -> dict[str, Array]:
        return {PARAMETERS: self._memory(self.buffer_of(version)), **self._state}

    def _zeros(self) -> dict[str, Array]:
        return {name: np.zeros(self._size, self.dtype) for name in self._optimizer.state_names}


class HeldVersions(VersionAssembly):
    """The version that a replica holds, as the rest of the job asks for it."""

    def __init__(self, replica: Callable[[], Replica | None]) -> None:
        super().__init__((), 4)
        self._replica = replica

    @property
    def whole_version(self) -> int:
        """The version that leaves read; -1: none."""
        replica = self._replica()
        return replica.version if replica is not None else NONE

    @property
    def held_versions(self) -> list[int]:
        """The same, as a list."""
        return [self.whole_version] if self.whole_version > NONE else []

    def buffer_of(self, version: int) -> int:
        """The buffer that holds a version."""
        replica = self._replica()
        assert replica is not None
        return replica.buffer_of(version)


def elements_of(
    piece: training_pb2.ParameterRange,
    frame: pb.ReducedFrame,
    payload: memoryview,
    dtype: np.dtype[Any],
) -> Array | None:
    """The elements of a reduced frame; None where no shard was present. Raises
    `InvalidArgument`."""
    end = frame.first_element + frame.element_count
    fits = 0 <= frame.first_element < end <= piece.element_count
    if not fits or len(payload) not in (0, frame.element_count * dtype.itemsize):
        raise InvalidArgument(
            f"elements {frame.first_element}+{frame.element_count} in {len(payload)} bytes are "
            f"no frame of range {frame.range}; check that all run the same version of Phalanx"
        )
    return np.frombuffer(payload, dtype) if len(payload) else None
