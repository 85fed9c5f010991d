"""Leaves that the root starts one by one, in a job whose contributions commit one by one.

The worker says how many leaves it could begin, and the root starts as many, each with the version
that was the newest then. So a leaf is run as soon as it is started, its contribution is sent as
soon as it is done, and no shard here waits for another. What is under way belongs to the stream
that it was started on: when that breaks it is dropped, and the root starts it anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phalanx.frames import frame_grid
from phalanx.reduction import Node
from phalanx.v1 import aggregation_service_pb2, training_pb2
from worker.core.outbox import FrameOut, StartsOut
from worker.core.rounds import Part, PartState, Round, Wire

GoRecord = training_pb2.GoRecord


@dataclass(eq=False, slots=True)
class Start:
    """One started leaf: a round of a single shard, and how much of it was sent."""

    round: Round
    shard: int
    sent: int = 0

    @property
    def part(self) -> Part:
        """What computes it."""
        return next(iter(self.round.parts.values()))

    @property
    def wire(self) -> Wire:
        """What is sent of it."""
        return next(iter(self.round.wires.values()))


class Starts:
    """The started leaves of one job in one term. Returned starts are to be given up by the caller:
    their tasks and buffers are his."""

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        term: int,
        ranges: Iterable[training_pb2.ParameterRange],
        itemsize: int,
    ) -> None:
        self._plan = plan
        self._term = term
        self._frames = [
            (piece.index, first, count, piece.first_element + first)
            for piece in ranges
            for first, count in frame_grid(piece.element_count, itemsize)
        ]
        #: The record under which leaves may be started; None: they may not.
        self._go: GoRecord | None = None
        self._hosted: frozenset[int] = frozenset()
        self._received = 0
        self._due = False
        self._under_way: dict[int, Start] = {}
        self._sent: list[Start] = []

    @property
    def open(self) -> bool:
        """Whether leaves may be started."""
        return self._go is not None

    @property
    def go(self) -> GoRecord | None:
        """The record under which leaves may be started."""
        return self._go

    @property
    def under_way(self) -> list[Start]:
        """Started leaves whose contribution was not sent yet."""
        return list(self._under_way.values())

    def find(self, round: Round) -> Start | None:
        """The start that a round is of, if it is still wanted."""
        return next((each for each in self._under_way.values() if each.round is round), None)

    def turn_to(self, go: GoRecord | None) -> list[Start]:
        """Leaves may be started under this record from now on; None: no more."""
        self._go = go
        self._due = go is not None
        return self._drop(self._under_way.values()) if go is None else []

    def host(self, shards: Iterable[int]) -> list[Start]:
        """These shards are hosted now; leaves that failed are to be started again."""
        self._hosted = frozenset(shards)
        self._due = self.open
        return self._drop(
            start
            for start in self._under_way.values()
            if start.shard not in self._hosted or start.part.state is PartState.FAILED
        )

    def stream_opened(self) -> list[Start]:
        """A new stream: what was started on the one before counts no more."""
        self._received = 0
        self._due = self.open
        return self._drop(self._under_way.values())

    def begin(
        self, message: aggregation_service_pb2.StartLeaf, absent: Iterable[int]
    ) -> tuple[Start | None, list[Start]]:
        """The root starts a leaf: the start, if it is wanted, and what it takes the place of."""
        self._received += 1
        self._due = True
        if self._go is None or message.shard not in self._hosted:
            return None, []
        before = self._under_way.get(message.shard)
        dropped = self._drop([before]) if before is not None else []
        go = GoRecord(
            term=self._term,
            version=message.version,
            round=self._go.round,
            action=GoRecord.ACTION_TRAIN,
        )
        round = Round(go, self._plan.shards, 1, 1, message.shard_step)
        round.absent = set(absent)
        round.owe([Node(message.shard, 1)])
        start = self._under_way[message.shard] = Start(round, message.shard)
        return start, dropped

    def give_up(self, start: Start) -> None:
        """The root is to start it again."""
        self._drop([start])
        self._due = self.open

    def slot_free(self) -> None:
        """Another leaf could begin."""
        self._due = self.open

    def next(self, free: int) -> FrameOut | StartsOut | None:
        """What the stream sends next; `free` more leaves could begin now.

        Contributions go first, so that the next leaf begins with a version that has them in it.
        """
        for start in self._under_way.values():
            if start.wire.ready:
                position = start.sent
                start.sent += 1
                if start.sent == len(self._frames):
                    del self._under_way[start.shard]
                    self._sent.append(start)
                return FrameOut(start.round, start.wire, *self._frames[position])
        if not self._due:
            return None
        self._due = False
        wish = aggregation_service_pb2.StartsWanted(
            term=self._term,
            shards=sorted(self._hosted),
            working=sorted(self._under_way),
            received=self._received,
            wanted=self._received + max(0, free),
        )
        return StartsOut(wish)

    def take_sent(self) -> list[Start]:
        """Starts whose contribution is on its way, since the last call: nothing of them is needed.

        To be called once the last message was encoded.
        """
        sent, self._sent = self._sent, []
        return sent

    def _drop(self, starts: Iterable[Start]) -> list[Start]:
        dropped = list(starts)
        for start in dropped:
            self._under_way.pop(start.shard, None)
        return dropped
