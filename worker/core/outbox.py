"""What each exchange stream has to send next, decided when the stream asks.

Nothing is queued: a stream that can take another message asks for one, and gets what is current
then. A stopped aggregator therefore costs no memory and delays nobody, and nothing stale is sent.
After a reconnect everything of the open round is due again; a range ignores what it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from phalanx.frames import frame_grid
from phalanx.reduction import Node
from phalanx.v1 import aggregation_service_pb2, training_pb2
from worker.core.rounds import Round, Wire

GoRecord = training_pb2.GoRecord


@dataclass(slots=True)
class FrameOut:
    """Send elements of a wire node's vector; `first_element` counts from the start of the range."""

    round: Round
    wire: Wire
    range_index: int
    first_element: int
    element_count: int
    first_vector_element: int
    #: Which vector of the node's state this is; -1: its contribution.
    state: int = -1


@dataclass(slots=True)
class GoOut:
    """Carry a go record to a range that did not issue it."""

    go: GoRecord


@dataclass(slots=True)
class StartsOut:
    """Say which leaves could begin."""

    wish: aggregation_service_pb2.StartsWanted


@dataclass(slots=True)
class RecallOut:
    """Ask for what it takes to make the states of nodes again."""

    recall: aggregation_service_pb2.Recall


@dataclass(slots=True)
class _Stream:
    frames: list[tuple[int, int, int, int]]
    has_root: bool
    open: bool = False
    go_due: list[GoRecord] = field(default_factory=list)
    sent: dict[Node, int] = field(default_factory=dict)


class Outbox:
    """Streams of one job in one term, by the id of the aggregator."""

    def __init__(
        self,
        ranges: Iterable[training_pb2.ParameterRange],
        itemsize: int,
        sums: int,
        *,
        carries: bool = True,
    ) -> None:
        """Without `carries` owners of ranges need no go records from here."""
        self._carries = carries
        self._evaluation = [(0, 0, sums, 0)]
        self._streams: dict[str, _Stream] = {}
        self._round: Round | None = None
        for piece in ranges:
            stream = self._streams.setdefault(piece.aggregator_id, _Stream([], False))
            stream.has_root |= piece.index == 0
            stream.frames += [
                (piece.index, first, count, piece.first_element + first)
                for first, count in frame_grid(piece.element_count, itemsize)
            ]

    @property
    def open_streams(self) -> list[str]:
        """Aggregators that accepted a stream."""
        return [name for name, stream in self._streams.items() if stream.open]

    def is_open(self, aggregator_id: str) -> bool:
        """Whether this aggregator accepted a stream."""
        return self._streams[aggregator_id].open

    def opened(self, aggregator_id: str, go_records: Iterable[GoRecord]) -> None:
        """A stream was accepted: these go records and the whole open round are due on it."""
        stream = self._streams[aggregator_id]
        stream.open = True
        stream.sent.clear()
        go_records = go_records if self._carries else ()
        stream.go_due = [] if stream.has_root else list(go_records)

    def closed(self, aggregator_id: str) -> None:
        """A stream broke."""
        self._streams[aggregator_id].open = False

    def carry(self, go: GoRecord) -> list[str]:
        """A new go record is due on every open stream but the root's; return those."""
        if not self._carries:
            return []
        due = []
        for name, stream in self._streams.items():
            if stream.open and not stream.has_root:
                stream.go_due.append(go)
                due.append(name)
        return due

    def turn_to(self, round: Round | None) -> None:
        """From now on this is the open round."""
        self._round = round
        for stream in self._streams.values():
            stream.sent.clear()

    def next(self, aggregator_id: str) -> FrameOut | GoOut | None:
        """Take what the stream sends next; None: nothing now.

        Of several ready nodes the frames that come first in the vector go first, so that the
        ranges can finish those while others are still on their way.
        """
        stream = self._streams[aggregator_id]
        if stream.go_due:
            return GoOut(stream.go_due.pop(0))
        round = self._round
        if round is None or not stream.open:
            return None
        frames = stream.frames
        if round.is_evaluation:
            if not stream.has_root:
                return None
            frames = self._evaluation
        best: tuple[int, Wire] | None = None
        for node, wire in round.wires.items():
            sent = stream.sent.get(node, 0)
            if not wire.ready or (best is not None and sent >= best[0]):
                continue
            if sent < len(frames) * (1 + round.states_of(wire)):
                best = sent, wire
        if best is None:
            return None
        position, wire = best
        stream.sent[wire.node] = position + 1
        # A range takes the contribution only with the state that goes with it.
        vector, place = divmod(position, len(frames))
        state = vector if vector < round.states_of(wire) else -1
        return FrameOut(round, wire, *frames[place], state)
