"""The ranges of a job whose nodes have a state that goes with them from version to version.

A worker that takes a node over makes its state again (see `phalanx.training.states`): it recalls
the state at the last base and the versions since, and computes the node's leaves at each of them.
What it needs for that the ranges keep, and put into checkpoints; they never compute with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from coordinator.aggregation.core.cursor import AnyCursor
from coordinator.aggregation.core.effects import Effect, StartCheckpoint, Wake
from coordinator.aggregation.core.machine import JobRanges, _Range
from coordinator.aggregation.core.plan import AnyRound
from coordinator.aggregation.core.recalled import NodeStates
from coordinator.aggregation.core.state import AnyRule, Array
from phalanx.training.decisions import RootDecider
from phalanx.training.states import STATE_VECTOR
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.training_pb2 import GoRecord


class StatefulRanges(JobRanges):
    """`JobRanges` of a job whose nodes have a state; see the module's text."""

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        term: int,
        owned: Sequence[training_pb2.ParameterRange],
        optimizer: AnyRule,
        decider: RootDecider | None,
    ) -> None:
        super().__init__(plan, term, owned, optimizer, decider)
        self._states = {
            index: NodeStates(plan, term, each.parameters) for index, each in self._ranges.items()
        }
        #: By stream: what is left to send of what it recalled last.
        self._recalled: dict[object, Iterator[bytes]] = {}

    def begin_restored(
        self,
        version: int,
        vectors: Mapping[int, tuple[Array, Mapping[str, Array]]],
        root_state: str,
    ) -> list[Effect]:
        """See `JobRanges.begin_restored`."""
        for index, states in self._states.items():
            states.load(version, vectors[index][1])
        return super().begin_restored(version, vectors, root_state)

    def cursor(self, stream: object = None, *, joins: bool = False) -> AnyCursor:
        """A new stream's position."""
        return RecallCursor(self, stream, super().cursor(stream, joins=joins))

    def recall(self, stream: object, message: pb.Recall) -> list[Effect]:
        """A worker has to make states of nodes again."""
        self._check_term(message.term)
        each = [self._states[index].messages(message) for index in self.range_indexes]
        self._recalled[stream] = chain.from_iterable(each)
        return [Wake()]

    def next_recalled(self, stream: object) -> bytes | None:
        """The next message of what a stream recalled."""
        return next(self._recalled.get(stream, iter(())), None)

    def stream_closed(self, stream: object) -> None:
        """A stream ended, and with it what it recalled."""
        self._recalled.pop(stream, None)

    def _fill(
        self,
        owned: _Range,
        current: AnyRound,
        frame: pb.ContributionFrame,
        payload: memoryview,
        elapsed_s: float,
    ) -> list[Effect]:
        if current.spec.action == GoRecord.ACTION_TRAIN:
            states = self._states[frame.range]
            if frame.vector == STATE_VECTOR:
                states.take(frame, payload)
                return []
            states.require(frame)
        return super()._fill(owned, current, frame, payload, elapsed_s)

    def _drop_before(self, owned: _Range, version: int) -> None:
        if owned.parameters.versions.oldest < version:
            self._states[owned.parameters.piece.index].keep_before(version)
        super()._drop_before(owned, version)

    def _checkpoint(self, owned: _Range, go: GoRecord) -> list[Effect]:
        effects = super()._checkpoint(owned, go)
        for effect in effects:
            assert isinstance(effect, StartCheckpoint)
            if not effect.final:  # nothing is trained from there
                states = self._states[owned.parameters.piece.index]
                effect.snapshot.extra = {**effect.snapshot.extra, **states.vectors(go.version)}
        return effects


class RecallCursor:
    """Position of one stream of such a job: what it recalled comes after all that is new."""

    def __init__(self, ranges: StatefulRanges, stream: object, new: AnyCursor) -> None:
        self._ranges = ranges
        self._stream = stream
        self._new = new

    def take(self, now_s: float = 0.0) -> bytes | None:
        """See `AnyCursor`."""
        return self._new.take(now_s) or self._ranges.next_recalled(self._stream)
