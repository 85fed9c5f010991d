"""Leaves that the root starts one by one, driven as the session process drives them."""

from __future__ import annotations

import itertools
from typing import Any

from phalanx.reduction import Node
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import training_pb2
from worker.core import effects as do
from worker.core.dispatch import Dispatcher, Task
from worker.core.job import JobCore
from worker.core.outbox import FrameOut, StartsOut
from worker.core.rounds import LeafFailure

GoRecord = training_pb2.GoRecord
LeafFailed = coordination.LeafFailed

ELEMENTS = 100
OWNER = "a0"


class Driver:
    """A job core of an asynchronous job; leaves finish when told."""

    def __init__(self, shards: int = 4, slots: int = 1) -> None:
        self.plan = training_pb2.JobPlan(
            job_id="job-1",
            layout=training_pb2.Layout(dtype="float32", element_count=ELEMENTS),
            shards=shards,
            evaluation_shards=2,
            asynchronous=True,
            unit_span=1,
        )
        self.plan.evaluation_sums.append("loss")
        self.dispatcher = Dispatcher(slots)
        counter = itertools.count(1)
        self.core = JobCore(self.plan, self.dispatcher, lambda: next(counter))
        self.reports: list[coordination.SessionRequest] = []
        self.cancelled: list[Task] = []
        self.running: list[Task] = []
        for slot in range(slots):
            self.dispatcher.slot_idle(slot)

    def take(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, do.Report):
                self.reports.append(effect.message)
            if isinstance(effect, do.Cancel):
                self.cancelled.append(effect.task)
        self.running += self.dispatcher.start()

    def assign(self, shards: list[int], term: int = 1, placement: int = 1) -> None:
        owner = training_pb2.ParameterRange(element_count=ELEMENTS, aggregator_id=OWNER)
        message = coordination.AssignJob(
            plan=self.plan,
            term=term,
            ranges=[owner],
            placement=placement,
            train_nodes=[training_pb2.TreeNode(first=shard, span=1) for shard in shards],
            evaluation_nodes=[training_pb2.TreeNode(first=0, span=2)],
        )
        self.take(self.core.assign(message))

    def go(self, version: int, action: Any = GoRecord.ACTION_TRAIN, round: int = 0) -> None:
        go = GoRecord(term=self.core.term, version=version, round=round, action=action)
        self.take(self.core.go_record(go))

    def version(self, version: int) -> int:
        """A version arrives whole; the buffer that it is in, -1 where it is not taken."""
        frame = exchange.VersionFrame(term=self.core.term, version=version, element_count=ELEMENTS)
        place = self.core.frame_place(frame)
        if place is None:
            return -1
        self.take(self.core.frame_stored(place))
        return place.buffer

    def start(self, shard: int, step: int, version: int) -> None:
        message = exchange.StartLeaf(
            term=self.core.term, version=version, shard=shard, shard_step=step
        )
        self.take(self.core.start_leaf(message))

    def finish(self, task: Task) -> None:
        (part,) = task.parts
        self.take(self.core.part_done(task, part, 7, 0.5, 1, ()))
        self.end(task)

    def fail(self, task: Task, kind: Any = LeafFailed.KIND_NON_FINITE) -> None:
        (part,) = task.parts
        failure = LeafFailure(part.node.first, kind, "no number")
        self.take(self.core.part_failed(task, part, failure))
        self.end(task)

    def end(self, task: Task, lost: bool = False) -> None:
        self.running.remove(task)
        if lost:
            self.dispatcher.slot_lost(task.slot)
        self.dispatcher.slot_idle(task.slot)
        if self.core.owns(task):
            self.take(self.core.task_ended(task, lost))

    def sent(self) -> list[Any]:
        """What the stream sends now: (shard, its step, version), or what could begin."""
        out: list[Any] = []
        while (message := self.core.next_message(OWNER)) is not None:
            if isinstance(message, StartsOut):
                wish = message.wish
                out.append((list(wish.shards), list(wish.working), wish.received, wish.wanted))
            else:
                assert isinstance(message, FrameOut)
                round = message.round
                out.append((message.wire.node.first, round.step, round.go.version))
        return out


def started(shards: int = 4, slots: int = 1, hosted: list[int] | None = None) -> Driver:
    driver = Driver(shards, slots)
    driver.assign(list(range(shards)) if hosted is None else hosted)
    driver.take(driver.core.prepare_done())
    driver.take(driver.core.stream_opened(OWNER))
    driver.go(0)
    return driver


def test_as_many_leaves_are_wanted_as_slots_are_free() -> None:
    driver = started(slots=2, hosted=[1, 3])
    assert driver.sent() == [([1, 3], [], 0, 2)]
    assert driver.sent() == []
    driver.version(0)
    driver.start(1, 0, 0)
    driver.start(3, 0, 0)
    assert [task.round.step for task in driver.running] == [0, 0]
    assert driver.sent() == [([1, 3], [1, 3], 2, 2)]
    driver.finish(driver.running[0])
    assert driver.sent() == [(1, 0, 0), ([1, 3], [3], 2, 3)]


def test_a_contribution_is_sent_at_once_with_the_step_of_its_shard() -> None:
    driver = started(hosted=[0, 2])
    driver.version(5)
    driver.start(2, 9, 5)
    task = driver.running[0]
    assert (task.round.step, task.round.go.version, task.parts[0].node) == (9, 5, Node(2, 1))
    driver.sent()
    driver.finish(task)
    assert driver.sent()[0] == (2, 9, 5)


def test_a_version_that_a_leaf_reads_stays() -> None:
    driver = started(slots=2)
    buffer = driver.version(0)
    driver.start(0, 0, 0)
    others = [driver.version(version) for version in range(1, 8)]
    assert buffer not in others
    driver.start(1, 0, 7)
    assert {task.parameters for task in driver.running} == {buffer, others[-1]}
    driver.finish(driver.running[0])
    assert buffer in [driver.version(version) for version in range(8, 12)]


def test_a_new_stream_drops_what_was_started_on_the_one_before() -> None:
    driver = started()
    driver.sent()
    driver.version(0)
    driver.start(0, 0, 0)
    driver.core.stream_closed(OWNER)
    assert driver.sent() == []
    driver.take(driver.core.stream_opened(OWNER))
    (task,) = driver.cancelled
    assert driver.sent() == [([0, 1, 2, 3], [], 0, 0)], "its slot is not free yet"
    driver.finish(task)
    assert driver.sent() == [([0, 1, 2, 3], [], 0, 1)]


def test_a_shard_that_moves_away_is_given_up() -> None:
    driver = started(hosted=[0, 1])
    driver.version(0)
    driver.start(0, 0, 0)
    driver.sent()
    driver.assign([1], placement=2)
    assert driver.cancelled == driver.running
    assert driver.sent() == [([1], [], 1, 1)]
    driver.start(0, 0, 0)
    assert len(driver.running) == 1, "it is not hosted here any more"


def test_a_start_takes_the_place_of_an_older_one_of_its_shard() -> None:
    driver = started()
    driver.version(0)
    driver.start(0, 0, 0)
    driver.version(4)
    driver.start(0, 1, 4)
    assert [task.round.step for task in driver.cancelled] == [0]
    driver.end(driver.running[0])
    assert [task.round.step for task in driver.running] == [1]
    driver.finish(driver.running[0])
    assert driver.sent()[0] == (0, 1, 4)


def test_nothing_is_started_during_an_evaluation() -> None:
    driver = started()
    driver.version(0)
    driver.start(0, 0, 0)
    driver.go(8, GoRecord.ACTION_EVALUATE)
    assert driver.cancelled == driver.running
    driver.end(driver.running[0])
    assert driver.running == [], "the version that is evaluated is not here yet"
    driver.version(8)
    (task,) = driver.running
    assert task.round.is_evaluation
    driver.end(task)
    driver.start(1, 0, 0)
    assert [each for each in driver.running if not each.round.is_evaluation] == []
    driver.go(8, GoRecord.ACTION_TRAIN, round=1)
    wishes = [each for each in driver.sent() if len(each) == 4]
    assert len(wishes) == 1


def test_a_leaf_that_failed_waits_for_control_and_others_go_on() -> None:
    driver = started(hosted=[0, 1])
    driver.version(0)
    driver.start(0, 3, 0)
    driver.fail(driver.running[0])
    (report,) = [each.leaf_failed for each in driver.reports if each.HasField("leaf_failed")]
    assert (report.shard, report.step, report.evaluation) == (0, 3, False)
    assert driver.sent() == [([0, 1], [0], 1, 2)]
    assert driver.core.open_failures() != []
    driver.assign([0, 1], placement=2)
    assert driver.sent() == [([0, 1], [], 1, 2)], "it is to be started again"


def test_a_shard_that_is_left_out_of_its_step_is_started_without_its_leaf() -> None:
    driver = started(hosted=[0, 1])
    driver.version(0)
    driver.start(0, 3, 0)
    driver.fail(driver.running[0])
    message = coordination.AbsentShards(job_id="job-1", term=1, step=3, shards=[0])
    driver.take(driver.core.skip(message))
    assert driver.sent() == [([0, 1], [], 1, 2)]
    driver.start(0, 3, 0)
    assert driver.running[0].absent == frozenset({0})


def test_a_leaf_process_that_dies_runs_the_leaf_again() -> None:
    driver = started()
    driver.version(0)
    driver.start(0, 0, 0)
    driver.end(driver.running[0], lost=True)
    driver.take([])
    (task,) = driver.running
    assert (task.parts[0].node.first, task.parameters) == (0, 0)


def test_another_term_begins_with_nothing_under_way() -> None:
    driver = started()
    driver.version(6)
    driver.start(0, 2, 6)
    driver.assign([0, 1, 2, 3], term=2)
    assert driver.cancelled == driver.running
    driver.take(driver.core.stream_opened(OWNER))
    driver.go(4)
    driver.end(driver.running[0])
    assert driver.sent() == [([0, 1, 2, 3], [], 0, 1)]
    driver.version(4)
    driver.start(0, 1, 4)
    assert [task.round.step for task in driver.running] == [1]


def test_buffers_of_contributions_are_used_again() -> None:
    driver = started(slots=1)
    used = set()
    for step in range(20):
        driver.version(step)
        driver.start(step % 4, step // 4, step)
        used.add(driver.running[0].parts[0].buffer)
        driver.finish(driver.running[0])
        driver.sent()
    assert len(used) <= 2
