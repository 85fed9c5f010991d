"""Copies of other workers' nodes: computed beside what is owed, marked, and forgotten with time."""

from __future__ import annotations

import itertools
from typing import Any

from phalanx.reduction import Node, nodes_of_mask, shards_mask
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import training_pb2
from worker.core import effects as do
from worker.core.dispatch import Dispatcher, Task
from worker.core.job import JobCore
from worker.core.outbox import FrameOut
from worker.core.rounds import LeafFailure, PartState, Round

GoRecord = training_pb2.GoRecord
WIDTH = 8
ELEMENTS = 10


class Host:
    """A job core that owes the shards [0, 4) of 8, with one aggregator and one slot."""

    def __init__(self) -> None:
        layout = training_pb2.Layout(dtype="float32", element_count=ELEMENTS)
        self.plan = training_pb2.JobPlan(job_id="job-1", layout=layout, shards=WIDTH)
        self.piece = training_pb2.ParameterRange(
            element_count=ELEMENTS, aggregator_id="a", address="127.0.0.1:1"
        )
        self.dispatcher = Dispatcher(1)
        self.dispatcher.slot_idle(0)
        counter = itertools.count(1)
        self.core = JobCore(self.plan, self.dispatcher, lambda: next(counter))
        self.effects: list[do.Effect] = []
        self.running: list[Task] = []
        self.assign([Node(0, 4)], placement=1)
        self.take(self.core.prepare_done())
        self.take(self.core.stream_opened("a"))

    def take(self, effects: list[do.Effect]) -> None:
        self.effects += effects
        self.running += self.dispatcher.start()

    def assign(self, nodes: list[Node], placement: int) -> None:
        message = coordination.AssignJob(
            plan=self.plan,
            term=1,
            ranges=[self.piece],
            placement=placement,
            train_nodes=[training_pb2.TreeNode(first=n.first, span=n.span) for n in nodes],
        )
        self.take(self.core.assign(message))

    def at(self, version: int) -> None:
        """Version and go record arrive: the round opens."""
        frame = exchange.VersionFrame(term=1, version=version, element_count=ELEMENTS)
        place = self.core.frame_place(frame)
        assert place is not None
        self.take(self.core.frame_stored(place))
        self.take(
            self.core.go_record(GoRecord(term=1, version=version, action=GoRecord.ACTION_TRAIN))
        )

    def copy(self, version: int, *nodes: Node, term: int = 1) -> None:
        wanted = exchange.CopyNodes(
            term=term,
            version=version,
            nodes=[training_pb2.TreeNode(first=n.first, span=n.span) for n in nodes],
        )
        self.take(self.core.copy_nodes(wanted))

    def finish(self) -> None:
        """Finish everything that runs, and what follows."""
        while self.running:
            task = self.running.pop(0)
            for part in task.parts:
                if part.state is PartState.RUNNING:
                    stop = min(part.node.first + part.node.span, WIDTH)
                    count = stop - part.node.first
                    self.take(self.core.part_done(task, part, count, 0.0, (1 << count) - 1, ()))
            self.dispatcher.slot_idle(task.slot)
            self.take(self.core.task_ended(task))

    def sent(self) -> list[tuple[Node, bool]]:
        out: list[tuple[Node, bool]] = []
        while isinstance(message := self.core.next_message("a"), FrameOut):
            out.append((message.wire.node, message.wire.copy))
        return out


def test_copies_are_sent_beside_what_is_owed() -> None:
    host = Host()
    host.at(0)
    host.copy(0, Node(4, 2))
    host.finish()
    assert host.sent() == [(Node(0, 4), False), (Node(4, 2), True)]


def test_copies_wait_for_their_round() -> None:
    host = Host()
    host.at(0)
    host.finish()
    host.copy(1, Node(4, 4))
    assert host.sent() == [(Node(0, 4), False)]
    host.at(1)
    host.finish()
    assert set(host.sent()) == {(Node(0, 4), False), (Node(4, 4), True)}
    host.at(2)
    host.finish()
    assert host.sent() == [(Node(0, 4), False)], "asked for one round only"


def test_what_is_owed_anyway_is_no_copy() -> None:
    host = Host()
    host.at(0)
    host.copy(0, Node(0, 8))
    host.finish()
    assert host.sent() == [(Node(0, 4), False), (Node(4, 4), True)]


def test_copies_outlast_a_change_of_placement() -> None:
    host = Host()
    host.at(0)
    host.copy(0, Node(6, 2))
    host.assign([Node(0, 4), Node(4, 1)], placement=2)
    host.finish()
    assert sorted(host.sent()) == [(Node(0, 4), False), (Node(4, 1), False), (Node(6, 2), True)]


def test_copies_of_another_term_or_long_ago_are_nothing() -> None:
    host = Host()
    host.at(5)
    host.copy(5, Node(4, 4), term=2)
    host.copy(6, Node(4, 2))
    host.copy(3, Node(4, 4))
    host.finish()
    assert host.sent() == [(Node(0, 4), False)]


def test_a_range_behind_gets_its_copies_although_another_is_ahead() -> None:
    host = Host()
    host.at(5)
    host.copy(6, Node(4, 2))
    host.copy(5, Node(6, 2))
    host.finish()
    assert host.sent() == [(Node(0, 4), False), (Node(6, 2), True)]


def test_a_failed_part_is_not_tried_again_by_an_order() -> None:
    """Its next try is control's to give: each counts."""
    host = Host()
    host.at(0)
    task = host.running[0]
    failure = LeafFailure(2, coordination.LeafFailed.KIND_RAISED, "boom")
    part = next(part for part in task.parts if part.node.first == 0)
    host.take(host.core.part_failed(task, part, failure))
    host.copy(0, Node(4, 4))
    host.finish()
    assert part.state is PartState.FAILED
    assert host.sent() == [(Node(4, 4), True)]


def test_copies_never_overlap_what_is_owed() -> None:
    for owed in range(1 << WIDTH):
        nodes = nodes_of_mask(owed, WIDTH)
        go = GoRecord(term=1, action=GoRecord.ACTION_TRAIN)
        round: Any = Round(go, WIDTH, 2)
        round.owe(nodes)
        round.owe_copies([Node(2, 2), Node(4, 4), Node(5, 1)])
        own = shards_mask([n for n, wire in round.wires.items() if not wire.copy], WIDTH)
        copied = shards_mask([n for n, wire in round.wires.items() if wire.copy], WIDTH)
        assert own == owed
        assert copied == 0b11111100 & ~owed
        parts = [part.node for part in round.parts.values()]
        assert (
            sum(shards_mask([node], WIDTH).bit_count() for node in parts)
            == (owed | copied).bit_count()
        )
