"""One job's decisions, driven as the session process drives them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.reduction import Node, cover
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import training_pb2
from worker.core import effects as do
from worker.core.dispatch import Dispatcher, Task
from worker.core.job import JobCore
from worker.core.outbox import FrameOut, GoOut
from worker.core.rounds import LeafFailure

GoRecord = training_pb2.GoRecord
LeafFailed = coordination.LeafFailed

ELEMENTS = 100


class Driver:
    """A job core with its dispatcher; leaves finish when told."""

    def __init__(self, shards: int = 4, slots: int = 1, ranges: int = 1) -> None:
        self.shards = shards
        layout = training_pb2.Layout(dtype="float32", element_count=ELEMENTS * ranges)
        self.plan = training_pb2.JobPlan(
            job_id="job-1", layout=layout, shards=shards, evaluation_shards=2
        )
        self.plan.evaluation_sums.extend(["loss", "correct"])
        self.ranges = [
            training_pb2.ParameterRange(
                index=index,
                first_element=index * ELEMENTS,
                element_count=ELEMENTS,
                aggregator_id=f"a{index}",
                address=f"127.0.0.1:{index + 1}",
            )
            for index in range(ranges)
        ]
        self.dispatcher = Dispatcher(slots)
        counter = itertools.count(1)
        self.core = JobCore(self.plan, self.dispatcher, lambda: next(counter))
        self.reports: list[coordination.SessionRequest] = []
        self.cancelled: list[Task] = []
        self.running: list[Task] = []
        for slot in range(slots):
            self.dispatcher.slot_idle(slot)

    def take(self, effects: list[do.Effect]) -> list[do.Effect]:
        for effect in effects:
            if isinstance(effect, do.Report):
                self.reports.append(effect.message)
            if isinstance(effect, do.Cancel):
                self.cancelled.append(effect.task)
        self.running += self.dispatcher.start()
        return effects

    def assign(
        self, nodes: list[Node], term: int = 1, placement: int = 1, leaf_sha256: str = ""
    ) -> list[do.Effect]:
        messages = [training_pb2.TreeNode(first=n.first, span=n.span) for n in nodes]
        return self.take(
            self.core.assign(
                coordination.AssignJob(
                    plan=self.plan,
                    term=term,
                    ranges=self.ranges,
                    placement=placement,
                    train_nodes=messages,
                    evaluation_nodes=[training_pb2.TreeNode(first=0, span=2)],
                    leaf_sha256=leaf_sha256,
                )
            )
        )

    def prepared(self, leaf_sha256: str = "") -> None:
        self.take(self.core.prepare_done(leaf_sha256))

    def go(self, version: int, action: Any = GoRecord.ACTION_TRAIN, round: int = 0) -> GoRecord:
        term = self.core.term
        go = GoRecord(term=term, version=version, round=round, action=action)
        self.take(self.core.go_record(go))
        return go

    def frame(self, version: int, range_index: int = 0, term: int | None = None) -> None:
        frame = exchange.VersionFrame(
            term=self.core.term if term is None else term,
            version=version,
            range=range_index,
            element_count=ELEMENTS,
        )
        place = self.core.frame_place(frame)
        if place is not None:
            self.take(self.core.frame_stored(place))

    def finish(self, task: Task | None = None) -> Task:
        """Finish all parts of a running task."""
        task = task or self.running[0]
        self.running.remove(task)
        for part in task.parts:
            stop = min(part.node.first + part.node.span, task.round.width)
            count = stop - part.node.first
            mask = (1 << count) - 1
            self.take(self.core.part_done(task, part, count, 0.0, mask, ()))
        self.end(task)
        return task

    def end(self, task: Task, lost: bool = False) -> None:
        if task in self.running:
            self.running.remove(task)
        if lost:
            self.dispatcher.slot_lost(task.slot)
        else:
            self.dispatcher.slot_idle(task.slot)
        if self.core.owns(task):
            self.take(self.core.task_ended(task, lost))
        if lost:
            self.dispatcher.slot_idle(task.slot)
            self.take([])

    def sent(self, aggregator: str = "a0") -> list[Any]:
        """Everything that the stream would send now."""
        out: list[Any] = []
        while (message := self.core.next_message(aggregator)) is not None:
            if isinstance(message, GoOut):
                out.append((message.go.version, message.go.round))
            else:
                assert isinstance(message, FrameOut)
                out.append(message.wire.node)
        return out


def _started(**settings: Any) -> Driver:
    driver = Driver(**settings)
    driver.assign([Node(0, 4)])
    driver.prepared()
    for piece in driver.ranges:
        driver.take(driver.core.stream_opened(piece.aggregator_id))
    return driver


def test_nothing_runs_before_the_job_is_prepared() -> None:
    driver = Driver()
    driver.assign([Node(0, 4)])
    driver.frame(0)
    driver.go(0)
    assert not driver.running
    driver.prepared()
    assert [part.node for part in driver.running[0].parts] == [Node(0, 4)]
    assert driver.reports[0].worker_job_ready.term == 1


def test_rule_16_a_worker_with_another_leaf_says_so_and_computes_nothing() -> None:
    driver = Driver()
    driver.plan.bitwise = True
    driver.assign([Node(0, 4)], leaf_sha256="right")
    driver.prepared("wrong")
    driver.frame(0)
    driver.go(0)
    assert not driver.running
    ready = driver.reports[-1].worker_job_ready
    assert (ready.leaf_sha256, ready.leaf_failed) == ("wrong", False)
    driver.assign([Node(0, 4)], term=2, leaf_sha256="right")
    assert driver.reports[-1].worker_job_ready.term == 2, "control may have missed the first"
    driver.frame(0)
    driver.go(0)
    assert not driver.running
    driver.assign([Node(0, 4)], term=3)
    driver.frame(0)
    driver.go(0)
    assert driver.running, "the job gave its bits up"


@pytest.mark.parametrize("leaf_sha256", ["right", ""])
def test_a_worker_with_the_right_leaf_or_one_that_fails_computes(leaf_sha256: str) -> None:
    driver = Driver()
    driver.plan.bitwise = True
    driver.assign([Node(0, 4)], leaf_sha256="right")
    driver.prepared(leaf_sha256)
    driver.frame(0)
    driver.go(0)
    assert driver.running
    assert driver.reports[0].worker_job_ready.leaf_failed is not bool(leaf_sha256)


@pytest.mark.parametrize("go_first", [True, False])
def test_a_round_needs_its_whole_version_and_its_go_record(go_first: bool) -> None:
    driver = _started(ranges=2)
    driver.frame(0, 0)
    if go_first:
        driver.go(0)
        assert not driver.running
        driver.frame(0, 1)
    else:
        driver.frame(0, 1)
        assert not driver.running
        driver.go(0)
    assert driver.running[0].parameters == driver.core.versions.buffer_of(0)
    driver.finish()
    assert driver.sent() == [Node(0, 4)]
    assert driver.sent() == []


def test_go_records_go_first_to_every_range_but_the_roots() -> None:
    driver = _started(ranges=2)
    for index in (0, 1):
        driver.frame(0, index)
    driver.go(0, GoRecord.ACTION_EVALUATE, round=1)
    driver.go(0, round=2)
    driver.finish(driver.running[-1])
    assert driver.sent("a1")[:2] == [(0, 1), (0, 2)]
    assert not any(isinstance(each, tuple) for each in driver.sent("a0"))
    # A new stream hears the go records of the versions that may still be open, once more.
    driver.core.stream_closed("a1")
    driver.take(driver.core.stream_opened("a1"))
    assert [each for each in driver.sent("a1") if isinstance(each, tuple)] == [(0, 1), (0, 2)]


def test_initialise_is_done_by_the_host_of_shard_0_only() -> None:
    driver = _started()
    driver.go(0, GoRecord.ACTION_INITIALISE)
    task = driver.finish()
    assert [part.node for part in task.parts] == [Node(0, 1)]
    assert task.parameters == -1
    assert driver.sent() == [Node(0, 1)]
    driver.frame(0)
    driver.go(0, round=1)
    assert driver.running[0].round.width == 4
    other = Driver()
    other.assign([Node(2, 2)])
    other.prepared()
    other.go(0, GoRecord.ACTION_INITIALISE)
    assert not other.running


def test_a_whole_next_version_ends_the_round_and_frees_its_buffers() -> None:
    driver = _started()
    driver.frame(0)
    driver.go(0)
    first = driver.finish()
    buffer = first.parts[0].buffer
    driver.frame(1)
    assert driver.sent() == []
    assert first.parts[0].buffer == -1
    driver.go(1)
    assert driver.running[0].parts[0].buffer == buffer


def test_a_buffer_that_a_stale_task_still_writes_is_not_given_out() -> None:
    driver = _started(slots=2)
    driver.frame(0)
    driver.go(0)
    stale = driver.running[0]
    driver.frame(1)
    driver.go(1)
    assert stale in driver.cancelled
    used = {part.buffer for task in driver.running for part in task.parts}
    assert len(used) == sum(len(task.parts) for task in driver.running)


def test_results_and_failures_of_a_stale_round_are_silent() -> None:
    driver = _started()
    driver.frame(0)
    driver.go(0)
    stale = driver.running[0]
    driver.frame(1)
    driver.go(1)
    reports = len(driver.reports)
    failure = LeafFailure(1, LeafFailed.KIND_NON_FINITE, "torn")
    driver.take(driver.core.part_failed(stale, stale.parts[0], failure))
    driver.finish(stale)
    assert driver.sent() == []
    assert len(driver.reports) == reports
    assert driver.running[0].round.go.version == 1


def test_a_laggard_still_works_on_its_newest_whole_version() -> None:
    driver = _started(ranges=2)
    for index in (0, 1):
        driver.frame(4, index)
    driver.go(4)
    # The root is ahead; range 1 may lack exactly what this worker owes at version 4.
    driver.frame(5, 0)
    driver.go(5)
    assert driver.running[0].round.go.version == 4
    driver.finish()
    assert driver.sent("a0") == [Node(0, 4)]


def test_two_versions_ahead_ends_the_round_at_once() -> None:
    driver = _started(ranges=2)
    for index in (0, 1):
        driver.frame(4, index)
    driver.go(4)
    running = driver.running[0]
    driver.frame(5, 0)
    driver.frame(6, 0)
    assert driver.core.round is None
    assert running in driver.cancelled


def test_a_new_term_forgets_versions_rounds_and_streams() -> None:
    driver = _started()
    driver.frame(5)
    driver.go(5)
    old = driver.running[0]
    effects = driver.assign([Node(0, 4)], term=2, placement=1)
    assert any(isinstance(effect, do.OpenStreams) and effect.term == 2 for effect in effects)
    assert old in driver.cancelled
    driver.frame(9, term=1)
    assert driver.core.versions.held_versions == []
    driver.end(old)
    driver.frame(3)
    stale = GoRecord(term=1, version=3, round=9, action=GoRecord.ACTION_TRAIN)
    assert driver.take(driver.core.go_record(stale)) == []
    assert not driver.running
    driver.go(3)
    assert driver.running[0].term == 2
    assert driver.assign([Node(0, 1)], term=1, placement=99) == []
    assert (driver.core.term, driver.core.train_nodes) == (2, [Node(0, 4)])
    assert [m.worker_job_ready.term for m in driver.reports if m.HasField("worker_job_ready")] == [
        1,
        2,
    ]


def test_a_lost_process_is_no_reason_to_lose_work() -> None:
    driver = _started(slots=2)
    driver.frame(0)
    driver.go(0)
    lost = driver.running[0]
    driver.end(lost, lost=True)
    assert {part.node for task in driver.running for part in task.parts} == {
        Node(0, 2),
        Node(2, 2),
    }
    while driver.running:
        driver.finish()
    assert driver.sent() == [Node(0, 4)]
    assert not any(message.HasField("leaf_failed") for message in driver.reports)


def test_deaths_outside_of_leaves_are_blamed_in_the_end() -> None:
    driver = _started()
    driver.frame(0)
    driver.go(0)
    for _ in range(3):
        driver.end(driver.running[0], lost=True)
    assert not driver.running
    failed = driver.reports[-1].leaf_failed
    assert (failed.kind, failed.shard) == (LeafFailed.KIND_CRASHED, 0)


def test_who_died_before_it_heard_of_a_task_says_nothing_of_its_shards() -> None:
    """All processes die with their server, one after the other: each may be given the task that the
    one before it lost, as long as its own end is not known."""
    driver = _started()
    driver.frame(0)
    driver.go(0)
    for _ in range(6):
        driver.running[0].unheard = True
        driver.end(driver.running[0], lost=True)
    assert not any(message.HasField("leaf_failed") for message in driver.reports)
    while driver.running:
        driver.finish()
    assert driver.sent()


def test_a_failed_shard_waits_for_control_and_the_rest_goes_on() -> None:
    driver = Driver(slots=1)
    driver.assign([Node(0, 2), Node(2, 1)])
    driver.prepared()
    driver.take(driver.core.stream_opened("a0"))
    driver.frame(0)
    driver.go(0)
    task = driver.running[0]
    bad, good = task.parts
    driver.take(
        driver.core.part_failed(task, bad, LeafFailure(1, LeafFailed.KIND_RAISED, "no", "trace"))
    )
    driver.take(driver.core.part_done(task, good, 1, 0.0, 1, ()))
    driver.end(task)
    assert driver.sent() == [Node(2, 1)]
    failed = driver.reports[-1].leaf_failed
    assert (failed.shard, failed.step, failed.traceback) == (1, 0, "trace")
    assert not driver.running
    driver.assign([Node(0, 2), Node(2, 1)], placement=2)
    assert [part.node for part in driver.running[0].parts] == [Node(0, 2)]


def test_skipped_shards_are_left_out_when_the_part_runs_again() -> None:
    driver = _started()
    driver.frame(0)
    driver.go(0)
    task = driver.running[0]
    failure = LeafFailure(2, LeafFailed.KIND_NON_FINITE, "inf")
    driver.take(driver.core.part_failed(task, task.parts[0], failure))
    driver.end(task)
    skip = coordination.AbsentShards(job_id="job-1", term=1, step=0, shards=[2])
    driver.take(driver.core.skip(skip))
    assert driver.running[0].absent == {2}
    # A host that hears it before its round opens leaves the shard out at once.
    later = coordination.AbsentShards(job_id="job-1", term=1, step=1, shards=[0])
    driver.take(driver.core.skip(later))
    driver.finish()
    driver.frame(1)
    driver.go(1)
    assert driver.running[0].absent == {0}


def test_shards_of_another_term_are_not_left_out() -> None:
    driver = _started()
    driver.frame(0)
    driver.go(0)
    task = driver.running[0]
    failure = LeafFailure(2, LeafFailed.KIND_NON_FINITE, "inf")
    driver.take(driver.core.part_failed(task, task.parts[0], failure))
    driver.end(task)
    assert driver.core.skip(coordination.AbsentShards(job_id="job-1", term=2, shards=[2])) == []
    assert not driver.running
    (report,) = driver.core.open_failures()
    assert isinstance(report, do.Report)
    assert report.message.leaf_failed.shard == 2
    # Told again it is the same computation, which control counts once.
    assert report.message.leaf_failed == driver.reports[-1].leaf_failed
    assert report.message.leaf_failed.task == task.id > 0


def test_a_leaf_that_is_computed_again_and_fails_again_is_another_failure() -> None:
    driver = _started()
    driver.frame(0)
    driver.go(0)
    for placement in (2, 3):
        task = driver.running[0]
        failure = LeafFailure(2, LeafFailed.KIND_NON_FINITE, "inf")
        driver.take(driver.core.part_failed(task, task.parts[0], failure))
        driver.end(task)
        driver.assign([Node(0, 4)], placement=placement)
    first, second = [each.leaf_failed.task for each in driver.reports[-2:]]
    assert 0 < first < second


def test_sums_of_an_evaluation_go_to_range_0_only() -> None:
    driver = _started(ranges=2)
    for index in (0, 1):
        driver.frame(0, index)
    driver.go(0, GoRecord.ACTION_EVALUATE, round=1)
    driver.finish()
    assert driver.sent("a0") == [Node(0, 2)]
    assert driver.sent("a1") == [(0, 1)]


def test_what_nobody_wants_any_more_is_stopped_and_its_failures_are_no_news() -> None:
    driver = _started(slots=2)
    driver.frame(0)
    driver.go(0)
    wanted, unwanted = driver.running
    driver.assign([Node(0, 2)], placement=2)
    assert driver.cancelled == [unwanted]
    reports = len(driver.reports)
    failure = LeafFailure(3, LeafFailed.KIND_RAISED, "no")
    driver.take(driver.core.part_failed(unwanted, unwanted.parts[0], failure))
    driver.end(unwanted)
    assert len(driver.reports) == reports
    driver.finish(wanted)
    assert driver.sent() == [Node(0, 2)]
    # It may come back in the same round.
    driver.assign([Node(0, 4)], placement=3)
    while driver.running:
        driver.finish()
    assert driver.sent() == [Node(0, 4)]


def test_a_new_placement_with_the_same_nodes_starts_nothing_twice() -> None:
    driver = _started(slots=2)
    driver.frame(0)
    driver.go(0)
    running = list(driver.running)
    driver.assign([Node(0, 4)], placement=2)
    assert driver.cancelled == []
    for task in running:
        driver.finish(task)
    assert driver.running == []
    assert driver.sent() == [Node(0, 4)]


def test_a_shard_that_is_to_be_left_out_is_tried_again_without_it_at_once() -> None:
    driver = _started()
    driver.frame(0)
    driver.go(0)
    task = driver.running[0]
    driver.take(
        driver.core.skip(coordination.AbsentShards(job_id="job-1", term=1, step=0, shards=[2]))
    )
    reports = len(driver.reports)
    failure = LeafFailure(2, LeafFailed.KIND_NON_FINITE, "inf")
    driver.take(driver.core.part_failed(task, task.parts[0], failure))
    driver.end(task)
    assert len(driver.reports) == reports
    assert driver.running[0].absent == {2}


def test_a_job_that_was_left_takes_nothing_on() -> None:
    driver = _started()
    driver.take(driver.core.leave())
    driver.frame(0)
    driver.go(0)
    assert not driver.running


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_in_any_order_of_events_the_newest_round_is_delivered(data: st.DataObject) -> None:
    """Random frames, go records, placements, deaths and reconnects, then quiet: all is sent."""
    width = data.draw(st.integers(1, 9))
    ranges = data.draw(st.integers(1, 2))
    driver = Driver(shards=width, slots=data.draw(st.integers(1, 3)), ranges=ranges)
    placement = itertools.count(1)
    nodes = cover(0, width, width)

    def place() -> None:
        nonlocal nodes
        first, stop = sorted((data.draw(st.integers(0, width)), data.draw(st.integers(0, width))))
        nodes = cover(first, stop, width)
        driver.assign(nodes, placement=next(placement))

    version = newest = 0
    driver.assign(nodes, placement=next(placement))
    driver.prepared()
    for _ in range(data.draw(st.integers(0, 25))):
        event = data.draw(
            st.sampled_from(["frame", "go", "place", "finish", "lose", "open", "close", "send"])
        )
        index = data.draw(st.integers(0, ranges - 1))
        if event == "frame":
            version = data.draw(st.integers(max(0, version - 1), version + 1))
            newest = max(newest, version)
            driver.frame(version, index)
        elif event == "go":
            driver.go(data.draw(st.integers(max(0, version - 1), version)))
        elif event == "place":
            place()
        elif event == "finish" and driver.running:
            driver.finish(data.draw(st.sampled_from(driver.running)))
        elif event == "lose" and driver.running:
            task = data.draw(st.sampled_from(driver.running))
            driver.core._losses.clear()
            driver.end(task, lost=True)
        elif event == "open":
            driver.take(driver.core.stream_opened(f"a{index}"))
        elif event == "close":
            driver.core.stream_closed(f"a{index}")
        elif event == "send":
            driver.core.next_message(f"a{index}")
        in_use = [
            part.buffer
            for task in driver.core._tasks.values()
            for part in task.parts
            if part.buffer >= 0
        ]
        assert len(in_use) == len(set(in_use)), "two parts share a buffer"
    # Within a term the root never goes back behind what was whole once.
    final = newest + 2
    for index in range(ranges):
        driver.frame(final, index)
    driver.go(final)
    for _ in range(100):
        if not driver.running:
            break
        driver.finish()
    assert not driver.running
    for index in range(ranges):
        driver.take(driver.core.stream_opened(f"a{index}"))
        delivered = [each for each in driver.sent(f"a{index}") if isinstance(each, Node)]
        shards = {s for node in delivered for s in range(node.first, node.first + node.span)}
        assert {s for s in shards if s < width} >= {
            s for node in nodes for s in range(node.first, node.first + node.span) if s < width
        }
