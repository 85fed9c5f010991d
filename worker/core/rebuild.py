"""Makes the states of nodes that the worker has taken over.

From the newest state that is here, or that of the last base, which the owners of the ranges keep,
one version after the other is recalled and the nodes' leaves are computed at it once more; what
they contribute has counted long ago and goes nowhere. That ends at the version of the open round.
While it goes on the job waits for these nodes, unless somebody else has their states; then
versions go on, and the rebuilding with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from phalanx.frames import frame_grid
from phalanx.reduction import Node
from phalanx.training.states import base_of, vectors_of
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import training_pb2
from worker.core.buffers import BufferPool
from worker.core.outbox import RecallOut
from worker.core.rounds import PartState, Round
from worker.core.states import Buffers, States
from worker.core.versions import Place

GoRecord = training_pb2.GoRecord

_Key = tuple[Node | None, int, int, int]
"""Node (None: parameters), state vector, range, first element of the range."""


@dataclass(slots=True)
class RecalledPlace(Place):
    """Where the payload of a recalled frame goes."""

    frame: _Key


@dataclass
class _Step:
    """What is done at one version: what is fetched for it, then the leaves that are run."""

    version: int
    nodes: list[Node]
    fetched: dict[Node, Buffers]
    #: Of the parameters; -1 where nothing is computed here.
    buffer: int
    missing: set[_Key]
    told: set[str] = field(default_factory=set)
    round: Round | None = None


class Rebuild:
    """The states that are to be made; asks for one version after the other."""

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        term: int,
        ranges: Sequence[training_pb2.ParameterRange],
        itemsize: int,
        slots: int,
        states: States,
        pool: BufferPool,
    ) -> None:
        self._plan = plan
        self._term = term
        self._slots = slots
        self._states = states
        self._pool = pool
        self._frames = {
            (piece.index, first): (piece.first_element + first, count)
            for piece in ranges
            for first, count in frame_grid(piece.element_count, itemsize)
        }
        self._nodes: set[Node] = set()
        self._target = 0
        self._step: _Step | None = None

    @property
    def round(self) -> Round | None:
        """The leaves that are run now."""
        return self._step.round if self._step is not None else None

    @property
    def parameters(self) -> int:
        """The buffer of the version that they are run at."""
        assert self._step is not None
        return self._step.buffer

    def want(self, version: int, nodes: Iterable[Node]) -> None:
        """Exactly these nodes' states at `version` are needed from now on."""
        self._target = version
        self._nodes = set(nodes)

    @property
    def target(self) -> int:
        """The version at which states are needed."""
        return self._target

    @property
    def idle(self) -> bool:
        """Nothing is being done."""
        return self._step is None

    @property
    def leads_nowhere(self) -> bool:
        """What is being done is of no use: newer states can be had, or nobody needs any."""
        step = self._step
        stale = step is not None and step.version < base_of(self._plan, self._target)
        return stale or not self._nodes

    @property
    def failed(self) -> bool:
        """A leaf failed."""
        parts = self.round.parts.values() if self.round is not None else ()
        return any(part.state is PartState.FAILED for part in parts)

    def abandon(self) -> Round | None:
        """Give up what is being done; return the round whose leaves are to be ended."""
        step, self._step = self._step, None
        if step is None:
            return None
        for buffers in step.fetched.values():
            for buffer in buffers:
                self._pool.give_back(buffer)
        self._free(step)
        return step.round

    def advance(self) -> bool:
        """Begin what is to be done next, if nothing is being done; True: there is something to
        ask for."""
        if self._step is not None:
            return False
        lacking = [n for n in sorted(self._nodes) if self._states.find(n, self._target) is None]
        if not lacking:
            return False
        base = base_of(self._plan, self._target)
        starts = {node: max(base, self._states.newest(node, self._target)) for node in lacking}
        version = min(starts.values())
        nodes = [node for node in lacking if starts[node] == version]
        fetched = {
            node: tuple(self._pool.take() for _ in range(vectors_of(self._plan, node)))
            for node in nodes
            if self._states.find(node, version) is None
        }
        missing: set[_Key] = {
            (node, index, *frame)
            for node, buffers in fetched.items()
            for index in range(len(buffers))
            for frame in self._frames
        }
        buffer = -1
        if version < self._target:
            buffer = self._pool.take()
            missing |= {(None, 0, *frame) for frame in self._frames}
        self._step = _Step(version, nodes, fetched, buffer, missing)
        return True

    def next_message(self, aggregator_id: str) -> RecallOut | None:
        """What a stream has to ask for; once, unless it is opened again."""
        step = self._step
        if step is None or not step.missing or aggregator_id in step.told:
            return None
        step.told.add(aggregator_id)
        nodes = [training_pb2.TreeNode(first=node.first, span=node.span) for node in step.fetched]
        return RecallOut(
            exchange.Recall(
                term=self._term, version=step.version, parameters=step.buffer >= 0, nodes=nodes
            )
        )

    def stream_opened(self, aggregator_id: str) -> None:
        """What was asked for on the stream before may not have come."""
        if self._step is not None:
            self._step.told.discard(aggregator_id)

    def place(self, frame: exchange.VersionFrame) -> RecalledPlace | None:
        """Where the payload of a frame goes; None: it was not recalled."""
        step = self._step
        if step is None or frame.version != step.version:
            return None
        node = Node(frame.node.first, frame.node.span) if frame.HasField("node") else None
        key = (node, frame.state, frame.range, frame.first_element)
        if key not in step.missing:
            return None
        first, count = self._frames[frame.range, frame.first_element]
        buffer = step.buffer if node is None else step.fetched[node][frame.state]
        return RecalledPlace(step.version, buffer, first, count, -1, key)

    def stored(self, place: RecalledPlace) -> Round | None:
        """The payload is in its buffer; return the round to be run once all is here.

        Where nothing is to be run the step is over.
        """
        step = self._step
        if step is None or place.frame not in step.missing:
            return None
        step.missing.discard(place.frame)
        if step.missing:
            return None
        for node, buffers in step.fetched.items():
            self._states.put(node, step.version, buffers)
        step.fetched = {}
        if step.buffer < 0:
            self._step = None
            return None
        go = GoRecord(term=self._term, version=step.version, action=GoRecord.ACTION_TRAIN)
        step.round = Round(go, self._plan.shards, self._slots, self._plan.unit_span)
        return step.round

    def end_step(self) -> Round | None:
        """All leaves of the step are computed, if they are: return its round, which is over."""
        step = self._step
        if step is None or step.round is None:
            return None
        if not all(wire.ready for wire in step.round.wires.values()):
            return None
        self._step = None
        self._free(step)
        return step.round

    @property
    def nodes(self) -> list[Node]:
        """The nodes whose leaves are run in the present step."""
        return self._step.nodes if self._step is not None else []

    def _free(self, step: _Step) -> None:
        if step.buffer >= 0:
            self._pool.give_back(step.buffer)
