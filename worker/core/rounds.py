"""One open round on one worker: which nodes it owes, which pieces compute them, what is done.

The worker owes *wire nodes*: whole nodes whose payload it sends. Each consists of one or more
*parts*, aligned pieces that one slot computes in one go. A wire node is ready when all of its
parts are done; its payload is the canonical sum of theirs, made while frames are built.

When the placement changes within a round, finished and running parts are kept and used wherever
they fit, because a copy of a part is equal to the last bit whoever asked for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from phalanx.reduction import (
    Node,
    children_present,
    full_mask,
    nodes_of_mask,
    shards_mask,
)
from phalanx.v1 import coordination_service_pb2, training_pb2
from worker.core.division import contains, divide, shard_count, units_around

GoRecord = training_pb2.GoRecord


class PartState(Enum):
    """A part is waiting for a slot, in a leaf process, finished, or waiting for control."""

    PENDING = auto()
    RUNNING = auto()
    DONE = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class LeafFailure:
    """What a leaf process (or its death) says about one shard; `seconds` is how long it ran."""

    shard: int
    kind: coordination_service_pb2.LeafFailed.Kind.ValueType
    message: str
    traceback: str = ""
    first_row: int = 0
    row_count: int = 0
    seconds: float = 0.0
    reason: str = ""
    """Why the model failed, see `phalanx.model_failures`; empty: for another reason."""


@dataclass(eq=False, slots=True)
class Part:
    """A piece that one slot computes; `mask` has bit i for shard `node.first + i` present."""

    node: Node
    slot: int
    buffer: int = -1
    state: PartState = PartState.PENDING
    count: int = 0
    loss: float = 0.0
    mask: int = 0
    sums: tuple[float, ...] = ()
    #: Why it is FAILED, for a control that was away when it was told.
    failure: LeafFailure | None = None
    #: The task that it failed in: which of its computations this was.
    failed_task: int = 0
    #: Where nodes have a state: buffers of that at the round's version (none: zero), of the next
    #: one while it is made, and of that once it is kept.
    read_state: tuple[int, ...] = ()
    next_state: tuple[int, ...] = ()
    made_state: tuple[int, ...] = ()


Fold = Part | tuple["Fold", "Fold"]
"""The canonical sum of parts: a part, or left plus right."""


@dataclass(slots=True)
class Totals:
    """Scalars of a wire node, reduced as its vectors are."""

    count: int
    loss: float
    mask: int


@dataclass(slots=True)
class Wire:
    """A node that the worker sends; `ready` once all of its parts are done."""

    node: Node
    ready: bool = False
    copy: bool = False
    """An aggregator asked for it, since its home is late."""
    fold: Fold | None = None
    totals: Totals = field(default_factory=lambda: Totals(0, 0.0, 0))


class Round:
    """The worker's share of the round that `go` opened, over a tree of `width` shards.

    With a `unit` exactly the nodes of so many shards travel, each computed in one part.
    """

    def __init__(
        self, go: GoRecord, width: int, slots: int, unit: int = 0, shard_step: int | None = None
    ) -> None:
        self.go = go
        #: Which of the shard's own steps this is, where shards count their own.
        self.shard_step = shard_step
        self.width = width
        #: The states that are made go along with the contributions.
        self.hands_in = False
        self.absent: set[int] = set()
        self.wires: dict[Node, Wire] = {}
        self.parts: dict[Node, Part] = {}
        self._slots = slots
        self._unit = unit
        self._retries = 0

    @property
    def step(self) -> int:
        """Whose rows the leaves read: those of the version, or of the shard's own step."""
        return self.go.version if self.shard_step is None else self.shard_step

    @property
    def is_evaluation(self) -> bool:
        """Whether the shards are those of the evaluation split."""
        return self.go.action == GoRecord.ACTION_EVALUATE

    def owe(self, nodes: Iterable[Node]) -> list[Part]:
        """Owe exactly `nodes` from now on. Return the new parts, in state PENDING.

        Parts that failed are tried again, on another slot where there is one.
        """
        failed = self._drop(PartState.FAILED)
        self._drop(PartState.PENDING)
        self._retries += 1 if failed else 0
        kept = {node: wire for node, wire in self.wires.items() if wire.ready}
        self.wires = kept
        missing: list[Node] = []
        for node in self._units(nodes):
            if any(contains(sent, node) for sent in kept):
                continue
            around = self._part_around(node)
            wire = Wire(around.node if around is not None else node)
            if wire.node not in self.wires:
                self.wires[wire.node] = wire
                missing += self._missing(wire.node)
        return self._add_parts(missing)

    def owe_copies(self, nodes: Iterable[Node]) -> list[Part]:
        """Owe these nodes too, until the next call of `owe`; return the new parts.

        What is owed already stays as it is: a part that failed still waits for control.
        """
        missing: list[Node] = []
        wanted = shards_mask(self._units(nodes), self.width)
        others = wanted & ~shards_mask(self.wires, self.width)
        for node in self._units(nodes_of_mask(others, self.width)):
            around = self._part_around(node)
            wire = Wire(around.node if around is not None else node, copy=True)
            if wire.node not in self.wires:
                self.wires[wire.node] = wire
                missing += self._missing(wire.node)
        return self._add_parts(missing)

    def _add_parts(self, missing: list[Node]) -> list[Part]:
        grain = max(1, self._unit)
        pieces = divide(missing, self._slots, self.width, self._retries, grain)
        new = [Part(node, slot) for slot, owned in enumerate(pieces) for node in owned]
        self.parts.update((part.node, part) for part in new)
        self._settle()
        return new

    def _units(self, nodes: Iterable[Node]) -> Iterable[Node]:
        """The nodes that travel for `nodes`: whole units, if only these do."""
        return units_around(nodes, self._unit, self.width) if self._unit else nodes

    def skip(self, shards: Iterable[int]) -> bool:
        """Leave these shards out. True: a failed part can be tried again without them."""
        self.absent.update(shards)
        return any(
            part.state is PartState.FAILED and self._has_absent(part.node)
            for part in self.parts.values()
        )

    def done(
        self, part: Part, count: int, loss: float, mask: int, sums: tuple[float, ...]
    ) -> list[Wire]:
        """A part is finished; return the wire nodes that became ready."""
        part.count, part.loss, part.mask, part.sums = count, loss, mask, sums
        part.state = PartState.DONE
        return self._settle()

    def needs(self, part: Part) -> bool:
        """Whether a wire node still waits for this part."""
        return any(contains(wire.node, part.node) for wire in self.wires.values())

    @property
    def has_ready(self) -> bool:
        """Whether there is a node to send."""
        return any(wire.ready for wire in self.wires.values())

    def states_of(self, wire: Wire) -> int:
        """How many state vectors go before the frames of a ready node."""
        return len(self.parts[wire.node].made_state) if self.hands_in else 0

    def _settle(self) -> list[Wire]:
        """Find the wire nodes that became ready."""
        ready = []
        for wire in self.wires.values():
            if not wire.ready and self._whole(wire.node):
                wire.ready = True
                wire.fold = self._fold(wire.node)
                wire.totals = self._totals(wire.node)
                ready.append(wire)
        return ready

    def _drop(self, state: PartState) -> list[Part]:
        dropped = [part for part in self.parts.values() if part.state is state]
        for part in dropped:
            del self.parts[part.node]
        return dropped

    def _part_around(self, node: Node) -> Part | None:
        return next((part for part in self.parts.values() if contains(part.node, node)), None)

    def _missing(self, node: Node) -> list[Node]:
        """The largest nodes below `node` that no part covers."""
        if node in self.parts:
            return []
        if not any(contains(node, part.node) for part in self.parts.values()):
            return [node]
        return [low for child in children_present(node, self.width) for low in self._missing(child)]

    def _whole(self, node: Node) -> bool:
        part = self.parts.get(node)
        if part is not None:
            return part.state is PartState.DONE
        if node.span == 1:
            return False
        return all(self._whole(child) for child in children_present(node, self.width))

    def _fold(self, node: Node) -> Fold | None:
        """The sum of a whole node, without what is absent; None: all of it is."""
        part = self.parts.get(node)
        if part is not None:
            return part if part.mask else None
        folds = [self._fold(child) for child in children_present(node, self.width)]
        present = [fold for fold in folds if fold is not None]
        if len(present) == 2:
            return present[0], present[1]
        return present[0] if present else None

    def _totals(self, node: Node) -> Totals:
        part = self.parts.get(node)
        if part is not None:
            return Totals(part.count, part.loss, part.mask)
        totals = [self._totals(child) for child in children_present(node, self.width)]
        if len(totals) == 1:
            return totals[0]
        left, right = totals
        mask = left.mask | right.mask << node.span // 2
        if not left.mask or not right.mask:
            present = left if left.mask else right
            return Totals(present.count, present.loss, mask)
        return Totals(left.count + right.count, left.loss + right.loss, mask)

    def _has_absent(self, node: Node) -> bool:
        stop = node.first + shard_count(node, self.width)
        return any(node.first <= shard < stop for shard in self.absent)


def shard_mask(node: Node, mask: int, width: int) -> bytes:
    """The mask as a frame carries it: empty where every shard is present."""
    if mask == full_mask(node, width):
        return b""
    return mask.to_bytes(-(-shard_count(node, width) // 8), "little")
