"""The range that one member of an all-reduce job reduces for all, in one term.

Its round fills trees exactly as those of an aggregator do; what is complete goes to every member,
frame by frame, and nobody applies anything here. A go record opens a round, and so does its first
frame, since a correct member sends contributions only under a go record.

What is to be sent is kept encoded, once for all members, for two steps: a contribution at version
v + 1 shows that its sender has all of step v, and every member contributes to every step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from phalanx.copies import Key, OpenRound
from phalanx.errors import Aborted, InvalidArgument
from phalanx.frames import encode_response, frame_grid
from phalanx.rounds import Round, RoundSpec
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.training_pb2 import GoRecord

NONE = -1
STEPS_KEPT = 2


@dataclass(frozen=True)
class Sent:
    """A message to every member; `version` says how long it may be needed."""

    version: int
    message: bytes


class Log:
    """Messages to every member in order; each stream has a position of its own in it."""

    def __init__(self) -> None:
        self._first = 0
        self._messages: deque[Sent] = deque()

    def append(self, version: int, message: bytes) -> None:
        """Add a message; those of steps that every member has go."""
        while self._messages and self._messages[0].version <= version - STEPS_KEPT:
            self._messages.popleft()
            self._first += 1
        self._messages.append(Sent(version, message))

    def after(self, position: int) -> tuple[int, bytes] | None:
        """The first message that is kept from a position on, and the position after it."""
        at = max(position, self._first)
        if at - self._first >= len(self._messages):
            return None
        return at + 1, self._messages[at - self._first].message


@dataclass(frozen=True)
class Evaluated:
    """The sums of an evaluation, from all shards."""

    sums: list[float]
    example_count: int


class RangeOwner:
    """Reduces one range; that of index 0 the sums of evaluations, too."""

    def __init__(
        self, plan: training_pb2.JobPlan, term: int, piece: training_pb2.ParameterRange
    ) -> None:
        self.piece = piece
        self.log = Log()
        self._plan = plan
        self._term = term
        self._dtype = np.dtype(plan.layout.dtype).newbyteorder("<")
        self._grid = frame_grid(piece.element_count, self._dtype.itemsize)
        self._key = (NONE, NONE)
        self._round: Round | None = None

    @property
    def open_round(self) -> OpenRound | None:
        """What is open and not complete, for `LateShards`."""
        round = self._round
        if round is None:
            return None
        spec = round.spec
        return OpenRound(self._key, spec.action, spec.width, lambda: round.missing)

    def expect(self, go: GoRecord) -> None:
        """Open the round of a go record, so that what never comes can be missed."""
        evaluates = go.action == GoRecord.ACTION_EVALUATE
        if (evaluates and self.piece.index == 0) or go.action == GoRecord.ACTION_TRAIN:
            self._open((go.version, go.round), evaluates=evaluates)

    def open(self, frame: pb.ContributionFrame) -> None:
        """Open the round of a frame if it is a new one. Raises `InvalidArgument`."""
        self._check(frame)
        self._open((frame.step, frame.round), evaluates=frame.vector == "evaluation")

    def contribute(
        self, frame: pb.ContributionFrame, payload: memoryview
    ) -> tuple[list[tuple[pb.ReducedFrame, memoryview]], Evaluated | None]:
        """Add one frame. Return what is reduced now, and the sums of an evaluation if that is it.

        Copies and frames of rounds that are over change nothing. Raises `InvalidArgument` for what
        does not fit and `Disagreement` where two copies are not equal.
        """
        self.open(frame)
        round = self._round
        if round is None or (frame.step, frame.round) < self._key:
            return [], None
        with np.errstate(over="ignore", invalid="ignore"):
            done = round.contribute(frame, payload)
        reduced, evaluated = [], None
        for index in done:
            values = round.take(index)
            if frame.vector == "evaluation":
                sums = np.zeros(len(self._plan.evaluation_sums)) if values is None else values
                evaluated = Evaluated(sums.tolist(), round.totals.example_count)
            else:
                reduced.append(self._publish(frame, round, index, values))
        if round.complete:
            self._round = None
        return reduced, evaluated

    def _check(self, frame: pb.ContributionFrame) -> None:
        if frame.term != self._term:
            raise stale_term(self._plan.job_id, frame.term, self._term)
        if frame.range != self.piece.index or frame.step < 0:
            raise InvalidArgument(f"range {frame.range} at step {frame.step} is not owned here")
        if frame.vector == "evaluation" and self.piece.index != 0:
            raise InvalidArgument("evaluations are reduced by the owner of range 0")

    def _open(self, key: Key, *, evaluates: bool) -> None:
        if key <= self._key:
            return
        plan = self._plan
        self._key = key
        self._round = Round(
            RoundSpec(
                version=key[0],
                number=key[1],
                action=GoRecord.ACTION_EVALUATE if evaluates else GoRecord.ACTION_TRAIN,
                vector="evaluation" if evaluates else "gradient",
                dtype=np.dtype("<f8") if evaluates else self._dtype,
                width=plan.evaluation_shards if evaluates else plan.shards,
                grid=[(0, len(plan.evaluation_sums))] if evaluates else self._grid,
                bitwise=plan.bitwise,
            )
        )

    def _publish(
        self,
        frame: pb.ContributionFrame,
        round: Round,
        index: int,
        values: np.typing.NDArray[np.generic] | None,
    ) -> tuple[pb.ReducedFrame, memoryview]:
        first, count = self._grid[index]
        totals = round.totals
        reduced = pb.ReducedFrame(
            term=self._term,
            version=frame.step,
            round=frame.round,
            range=self.piece.index,
            first_element=first,
            element_count=count,
            example_count=totals.example_count,
            loss_sum=totals.loss_sum,
        )
        payload = memoryview(b"") if values is None else values.data.cast("B")
        header = pb.ExchangeResponseHeader(reduced=reduced)
        self.log.append(frame.step, encode_response(header, payload))
        return reduced, payload


def stale_term(job_id: str, term: int, current: int) -> Aborted:
    """The error that another term than the current one gets."""
    return Aborted(
        f"job {job_id} is in term {current}, not {term}",
        reason="STALE_TERM",
        details={"current_term": str(current)},
    )
