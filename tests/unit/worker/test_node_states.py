"""A job whose nodes have a state: parts wait for it, and it is made again where it is missing."""

from __future__ import annotations

import itertools

import pytest

from phalanx.reduction import Node
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import Compression, JobSpec, Sign, Train
from worker.core import effects as do
from worker.core.buffers import BufferPool
from worker.core.dispatch import Dispatcher, Task
from worker.core.outbox import FrameOut, RecallOut
from worker.core.rounds import LeafFailure
from worker.core.stateful import StatefulJobCore, make_job
from worker.core.states import States

GoRecord = training_pb2.GoRecord
ELEMENTS = 100
FIRST, SECOND = Node(0, 2), Node(2, 2)
EVERY = 4


class Host:
    """A job's core with two ranges of two owners; leaves finish when told."""

    def __init__(self) -> None:
        spec = JobSpec(train=Train(compression=Compression(sign=Sign())))
        self.plan = training_pb2.JobPlan(
            job_id="job-1",
            spec=spec.SerializeToString(),
            layout=training_pb2.Layout(dtype="float32", element_count=2 * ELEMENTS),
            shards=4,
            unit_span=2,
            state_every=EVERY,
        )
        self.dispatcher = Dispatcher(1)
        counter = itertools.count(1)
        core = make_job(self.plan, self.dispatcher, lambda: next(counter))
        assert isinstance(core, StatefulJobCore)
        self.core = core
        self.reports: list[coordination.SessionRequest] = []
        self.running: list[Task] = []
        self.version = -1
        self.dispatcher.slot_idle(0)

    def take(self, effects: list[do.Effect]) -> None:
        self.reports += [each.message for each in effects if isinstance(each, do.Report)]
        self.running += self.dispatcher.start()

    def assign(self, *nodes: Node, term: int = 1, placement: int = 1) -> None:
        message = coordination.AssignJob(plan=self.plan, term=term, placement=placement)
        for index in range(2):
            message.ranges.add(
                index=index, first_element=index * ELEMENTS, element_count=ELEMENTS,
                aggregator_id=f"a{index}",
            )  # fmt: skip
        message.train_nodes.extend(
            training_pb2.TreeNode(first=node.first, span=node.span) for node in nodes
        )
        self.take(self.core.assign(message))
        self.take(self.core.prepare_done())
        for index in range(2):
            self.take(self.core.stream_opened(f"a{index}"))

    def at(self, version: int) -> None:
        """A version is whole, and its step begins."""
        go = GoRecord(term=self.core.term, version=version, action=GoRecord.ACTION_TRAIN)
        self.take(self.core.go_record(go))
        self.send(version)

    def send(self, version: int, *nodes: Node, ranges: tuple[int, ...] = (0, 1)) -> None:
        """Frames of a version come, or of the states of nodes at it."""
        for index in ranges:
            for node in nodes or (None,):
                frame = exchange.VersionFrame(
                    term=self.core.term, version=version, range=index, element_count=ELEMENTS
                )
                if node is not None:
                    frame.node.first, frame.node.span = node
                place = self.core.frame_place(frame)
                if place is not None:
                    self.take(self.core.frame_stored(place))

    def finish(self) -> list[tuple[Node, int]]:
        """Finish everything that runs: nodes and versions that were computed."""
        computed = []
        while self.running:
            task = self.running.pop(0)
            for part in task.parts:
                computed.append((part.node, task.round.go.version))
                assert len(part.next_state) == 1
                self.take(self.core.part_done(task, part, 8, 0.5, 3, ()))
            self.dispatcher.slot_idle(task.slot)
            self.take(self.core.task_ended(task))
        return computed

    def recall(self) -> exchange.Recall | None:
        """What both owners are asked for."""
        asked = []
        for name in ("a0", "a1"):
            out = self.core.next_message(name)
            assert out is None or isinstance(out, RecallOut)
            asked.append(out.recall if out is not None else None)
        assert asked[0] == asked[1]
        return asked[0]

    def sent(self) -> list[tuple[Node, int]]:
        """Nodes and state vectors (-1: the contribution) that go to the first owner, in order."""
        found = []
        while (out := self.core.next_message("a0")) is not None:
            assert isinstance(out, FrameOut)
            found.append((out.wire.node, out.state))
        return found


@pytest.fixture
def host() -> Host:
    return Host()


def hosted(host: Host, version: int, *nodes: Node) -> None:
    """The worker has hosted the nodes from the beginning."""
    host.assign(*nodes)
    for each in range(version):
        host.at(each)
        host.finish()
        host.sent()


def test_a_state_follows_its_node_and_is_handed_in_before_a_base(host: Host) -> None:
    host.assign(FIRST, SECOND)
    buffers = set()
    for version in range(2 * EVERY):
        host.at(version)
        (task,) = host.running
        for part in task.parts:
            assert len(part.read_state) == (1 if version else 0)
            assert not set(part.read_state) & set(part.next_state)
            buffers |= {part.buffer, *part.next_state}
        assert host.finish() == [(FIRST, version), (SECOND, version)]
        due = (version + 1) % EVERY == 0
        wanted = [(FIRST, 0), (SECOND, 0)] if due else []
        assert host.sent() == [*wanted, (FIRST, -1), (SECOND, -1)]
    assert len(buffers) <= 6, "one for each sum, two for each state"


def test_a_node_that_was_taken_over_is_computed_from_the_base_on(host: Host) -> None:
    hosted(host, 6, FIRST)
    host.at(6)
    host.assign(FIRST, SECOND, placement=2)
    recall = host.recall()
    assert recall is not None
    assert (recall.version, recall.parameters, len(recall.nodes)) == (4, True, 1)
    assert host.finish() == [(FIRST, 6)], "what is here does not wait"
    host.send(4, SECOND)
    assert not host.running
    host.send(4)
    assert host.finish() == [(SECOND, 4)]
    recall = host.recall()
    assert recall is not None
    assert (recall.version, recall.parameters, len(recall.nodes)) == (5, True, 0)
    host.send(5)
    assert host.finish() == [(SECOND, 5), (SECOND, 6)]
    assert host.sent() == [(FIRST, -1), (SECOND, -1)]


def test_at_a_base_nothing_is_computed_again(host: Host) -> None:
    host.assign(SECOND)
    host.at(4)
    recall = host.recall()
    assert recall is not None
    assert (recall.version, recall.parameters) == (4, False)
    host.send(4, SECOND, ranges=(0,))
    host.take(host.core.stream_opened("a1"))
    again = host.core.next_message("a1")
    assert isinstance(again, RecallOut)
    assert again.recall == recall
    host.send(4, SECOND)
    assert host.finish() == [(SECOND, 4)]


def test_before_the_first_base_a_state_is_zero(host: Host) -> None:
    host.assign(SECOND)
    host.at(1)
    recall = host.recall()
    assert recall is not None
    assert (recall.version, recall.parameters, len(recall.nodes)) == (0, True, 0)
    host.send(0)
    assert host.finish() == [(SECOND, 0), (SECOND, 1)]


def test_versions_go_on_while_states_are_made(host: Host) -> None:
    host.assign(SECOND)
    host.at(2)
    host.send(0)
    host.at(3)
    assert host.finish() == [(SECOND, 0)], "which is needed for the next version too"
    host.send(1)
    host.at(4)
    recall = host.recall()
    assert recall is not None
    assert (recall.version, recall.parameters, len(recall.nodes)) == (4, False, 1)
    host.send(4, SECOND)
    assert host.finish()[-1] == (SECOND, 4)


def test_a_version_that_was_missed_is_made_up_for(host: Host) -> None:
    hosted(host, 5, FIRST)
    host.at(5)
    host.at(6)
    recall = host.recall()
    assert recall is not None
    assert (recall.version, recall.parameters, len(recall.nodes)) == (5, True, 0)
    host.send(5)
    assert host.finish() == [(FIRST, 5), (FIRST, 5), (FIRST, 6)], "one was under way, for nothing"


def test_a_leaf_that_fails_again_is_told_and_tried_again(host: Host) -> None:
    host.assign(SECOND)
    host.at(1)
    host.send(0)
    task = host.running.pop()
    failure = LeafFailure(2, coordination.LeafFailed.KIND_RAISED, "no")
    host.take(host.core.part_failed(task, task.parts[0], failure))
    host.dispatcher.slot_idle(0)
    host.take(host.core.task_ended(task))
    told = host.reports[-1].leaf_failed
    assert (told.shard, told.step) == (2, 0)
    assert [each.message.leaf_failed for each in host.core.open_failures()] == [told]  # type: ignore[union-attr]
    assert not host.running
    host.assign(SECOND, placement=2)
    host.send(0)
    assert host.finish() == [(SECOND, 0), (SECOND, 1)]


def test_another_term_and_leaving_forget_all_states(host: Host) -> None:
    hosted(host, 6, FIRST)
    host.at(6)
    host.finish()
    host.assign(FIRST, term=2)
    host.at(5)
    recall = host.recall()
    assert recall is not None
    assert (recall.term, recall.version, len(recall.nodes)) == (2, 4, 1)
    host.take(host.core.leave())
    assert not host.running
    assert not isinstance(host.core.next_message("a0"), RecallOut)


def test_states_share_buffers_and_give_them_back() -> None:
    pool = BufferPool(0)
    states = States(pool)
    one, two, three = pool.take(), pool.take(), pool.take()
    assert states.put(FIRST, 1, (one,)) == (one,)
    assert states.put(FIRST, 1, (two,)) == (one,)
    assert pool.take() == two
    states.put(FIRST, 2, (three,))
    states.forget_before(1, 0)
    assert states.find(FIRST, 1) == (one,)
    states.forget_before(2, 0)
    assert states.find(FIRST, 1) is None
    assert states.newest(FIRST, 5) == 2
    states.forget_before(8, 8)
    assert states.newest(FIRST, 8) == 0
    assert pool.take() == one
    assert pool.take() == three
