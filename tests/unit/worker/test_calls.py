"""Sets of independent tasks on a worker: what runs, what is told, what is told again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import task_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from worker.core import effects as do
from worker.core.calls import (
    BATCH_MAX,
    BATCH_S,
    LOSSES_WITHOUT_BLAME_MAX,
    REPORTS_BYTES,
    REPORTS_PER_MESSAGE,
    TaskSetCore,
)
from worker.core.dispatch import Dispatcher, Task
from worker.core.rounds import LeafFailure, PartState


class Driver:
    """The core with its dispatcher; leaf processes do what they are told to."""

    def __init__(self, slots: int = 1, *, prepared: bool = True) -> None:
        spec = JobSpec()
        spec.tasks.timeout.seconds, spec.tasks.timeout.nanos = 90, 500_000_000
        self.plan = training_pb2.JobPlan(job_id="job-1", spec=spec.SerializeToString())
        self.dispatcher = Dispatcher(slots)
        counter = itertools.count(1)
        self.core = TaskSetCore(self.plan, self.dispatcher, lambda: next(counter))
        self.running: list[Task] = []
        self.ended: list[Task] = []
        self.attempts = itertools.count(100)
        for slot in range(slots):
            self.dispatcher.slot_idle(slot)
        self.first = self.assign()
        if prepared:
            self.opened = self.take(self.core.prepare_done())

    def assign(self, term: int = 1, placement: int = 1) -> list[do.Effect]:
        owner = training_pb2.ParameterRange(aggregator_id=f"a{term}", address=f"host:{term}")
        message = coordination.AssignJob(
            plan=self.plan, term=term, placement=placement, ranges=[owner]
        )
        return self.take(self.core.assign(message))

    def take(self, effects: list[do.Effect]) -> list[do.Effect]:
        self.ended += [each.task for each in effects if isinstance(each, do.Cancel)]
        self.running += self.dispatcher.start()
        return effects

    def give(self, *tasks: int, settled: tuple[int, ...] = ()) -> int:
        """The owner hands tasks out; return the number of the first attempt."""
        first = next(self.attempts)
        for _ in tasks[1:]:
            next(self.attempts)
        message = pb.WorkResponse(tasks=tasks, first_attempt=first, settled=settled)
        self.take(self.core.told(message))
        return first

    def finish(self, task: Task, *, seconds: float = 0.001, only: int | None = None) -> None:
        """The calls of a batch return (or the first `only` of them); with all, the batch ends."""
        for index in range(len(task.parts) if only is None else only):
            number, attempt = self.core.call_done(task, index, seconds)
            self.take(self.core.report(number, attempt, seconds=seconds, value_json="1"))
        if only is None:
            self.end(task)

    def end(self, task: Task, *, lost: bool = False) -> list[do.Effect]:
        """The leaf process of a batch is through with it, or died over it."""
        self.running.remove(task)
        if lost:
            self.dispatcher.slot_lost(task.slot)
        self.dispatcher.slot_idle(task.slot)
        return self.take(self.core.task_ended(task, lost))

    def told(self) -> list[tuple[int, int]]:
        """(task, attempt) of what is told now."""
        message = self.core.next_reports()
        return [(each.task, each.attempt) for each in message.reports] if message else []

    def held(self) -> set[tuple[int, int]]:
        return {(each.task, each.attempt) for each in self.core.held()}


def numbers(task: Task) -> list[int]:
    return [part.node.first for part in task.parts]


def failure(task: int, message: str = "no", reason: str = "") -> LeafFailure:
    kind = coordination.LeafFailed.KIND_RAISED
    return LeafFailure(task, kind, message, "line 1", seconds=0.2, reason=reason)


def test_tasks_are_asked_for_once_they_can_run_here() -> None:
    driver = Driver(prepared=False)
    assert driver.first == []
    effects = driver.take(driver.core.prepare_done())
    assert effects[0] == do.OpenStreams("job-1", 1, (("a1", "host:1"),))
    assert isinstance(effects[1], do.Report)
    assert effects[1].message.worker_job_ready.term == 1
    assert driver.core.timeout_s == 90.5


def test_a_new_term_opens_the_stream_to_its_owner_and_an_old_one_nothing() -> None:
    driver = Driver()
    assert driver.assign(term=1, placement=2) == []
    assert driver.assign(term=2, placement=1)[0] == do.OpenStreams("job-1", 2, (("a2", "host:2"),))
    assert driver.assign(term=1, placement=9) == []
    assert driver.core.term == 2


def test_a_call_is_run_and_reported_and_kept_until_it_is_settled() -> None:
    driver = Driver()
    attempt = driver.give(7)
    (task,) = driver.running
    assert (numbers(task), task.is_call, driver.core.owns(task)) == ([7], True, True)
    assert driver.held() == {(7, attempt)}
    driver.finish(task)
    assert driver.told() == [(7, attempt)]
    assert driver.told() == []
    assert driver.held() == {(7, attempt)}
    driver.give(settled=(attempt,))
    assert driver.held() == set()


def test_a_new_stream_is_told_again_what_is_not_settled() -> None:
    driver = Driver()
    first = driver.give(1, 2)
    for _ in range(2):
        driver.finish(driver.running[0])
    assert driver.told() == [(1, first), (2, first + 1)]
    driver.give(settled=(first,))
    assert isinstance(driver.take(driver.core.stream_opened())[0], do.Wake)
    assert driver.told() == [(2, first + 1)]


def test_what_an_owner_settles_before_it_is_told_is_not_told() -> None:
    driver = Driver()
    first = driver.give(1, 2)
    for _ in range(2):
        driver.finish(driver.running[0])
    driver.give(settled=(first,))
    assert driver.told() == [(2, first + 1)]


@pytest.mark.parametrize(
    ("value", "per_message"),
    [("1", REPORTS_PER_MESSAGE), ("x" * (REPORTS_BYTES // 3 + 1), 3)],
)
def test_a_message_of_reports_has_its_bounds(value: str, per_message: int) -> None:
    driver = Driver()
    count = per_message * 2 + 1
    first = driver.give(*range(count))
    for number in range(count):
        driver.take(driver.core.report(number, first + number, value_json=value))
    assert [len(driver.told()) for _ in range(4)] == [per_message, per_message, 1, 0]


def test_each_slot_has_a_batch_and_no_more_than_its_part() -> None:
    driver = Driver(slots=2)
    driver.give(*range(10))
    # One call each, as nobody knows how long one takes.
    assert [numbers(task) for task in driver.running] == [[0], [1]]
    assert {task.slot for task in driver.running} == {0, 1}
    driver.finish(driver.running[0], seconds=BATCH_S / BATCH_MAX)
    assert [numbers(task) for task in driver.running] == [[1], [2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("seconds", "together"),
    [(BATCH_S / BATCH_MAX / 2, BATCH_MAX), (BATCH_S / 4.5, 4), (BATCH_S * 2, 1), (60.0, 1)],
)
def test_short_calls_come_in_batches_and_long_ones_alone(seconds: float, together: int) -> None:
    driver = Driver()
    driver.give(*range(2 * BATCH_MAX))
    driver.finish(driver.running[0], seconds=seconds)
    assert len(numbers(driver.running[0])) == together


def test_a_call_that_is_settled_while_it_waits_is_not_run() -> None:
    driver = Driver()
    first = driver.give(1, 2, 3)
    driver.give(settled=(first + 1,))
    driver.finish(driver.running[0])
    assert numbers(driver.running[0]) == [3]


def test_a_batch_of_which_nothing_is_wanted_any_more_is_ended_once() -> None:
    driver = Driver()
    driver.give(0)
    driver.finish(driver.running[0], seconds=BATCH_S / 4)
    first = driver.give(1, 2)
    (task,) = driver.running
    assert numbers(task) == [1, 2]
    driver.give(settled=(first,))
    assert driver.ended == []
    driver.give(settled=(first + 1,))
    driver.give(settled=(first + 1,))
    assert driver.ended == [task]
    # What it says after that is nobody's.
    assert driver.take(driver.core.part_failed(task, task.parts[0], failure(1))) == []
    assert driver.core.report(2, first + 1, value_json="1") == []
    assert driver.held() == {(0, first - 1)}


def test_a_batch_that_waits_for_its_slot_is_withdrawn() -> None:
    driver = Driver()
    driver.dispatcher.slot_lost(0)
    first = driver.give(1)
    assert driver.running == []
    driver.give(settled=(first,))
    assert driver.ended == []
    driver.dispatcher.slot_idle(0)
    assert driver.take([]) == []
    assert driver.running == []


def test_a_call_that_fails_is_told_with_its_cause() -> None:
    driver = Driver()
    attempt = driver.give(4)
    (task,) = driver.running
    driver.take(driver.core.part_failed(task, task.parts[0], failure(4, "ValueError: no")))
    message = driver.core.next_reports()
    assert message is not None
    (report,) = message.reports
    assert (report.task, report.attempt, report.seconds) == (4, attempt, 0.2)
    told = report.failure
    assert (told.code, told.message, told.traceback) == ("RAISED", "ValueError: no", "line 1")
    driver.end(task)
    assert driver.running == []


def test_of_a_call_whose_model_failed_the_reason_is_its_code() -> None:
    driver = Driver()
    driver.give(4)
    (task,) = driver.running
    driver.take(driver.core.part_failed(task, task.parts[0], failure(4, "no GPU", "NO_GPU")))
    message = driver.core.next_reports()
    assert message is not None
    assert message.reports[0].failure.code == "NO_GPU"


def test_what_a_dead_process_did_not_get_to_runs_again_first() -> None:
    driver = Driver()
    driver.give(0)
    driver.finish(driver.running[0], seconds=BATCH_S / 4)
    first = driver.give(1, 2, 3, 4, 5)
    (task,) = driver.running
    assert numbers(task) == [1, 2, 3, 4]
    driver.finish(task, only=1, seconds=BATCH_S / 4)
    # It dies of the second; its third and fourth were not begun.
    driver.take(driver.core.part_failed(task, task.parts[1], failure(2, "died")))
    driver.end(task, lost=True)
    assert numbers(driver.running[0]) == [3, 4, 5]
    assert driver.told() == [(0, first - 1), (1, first), (2, first + 1)]


def test_a_process_that_dies_again_and_again_before_the_call_is_its_failure() -> None:
    driver = Driver()
    driver.give(6)
    for _ in range(LOSSES_WITHOUT_BLAME_MAX - 1):
        driver.end(driver.running[0], lost=True)
        assert driver.told() == []
    driver.end(driver.running[0], lost=True)
    message = driver.core.next_reports()
    assert message is not None
    assert (message.reports[0].task, message.reports[0].failure.code) == (6, "CRASHED")
    assert driver.running == []


def test_what_is_with_a_call_that_no_process_gets_to_run_is_not_blamed() -> None:
    driver = Driver()
    driver.give(0)
    driver.finish(driver.running[0], seconds=BATCH_S / 4)
    driver.give(1, 2, 3)
    for _ in range(LOSSES_WITHOUT_BLAME_MAX - 1):
        assert numbers(driver.running[0]) == [1, 2, 3]
        driver.end(driver.running[0], lost=True)
    assert numbers(driver.running[0]) == [1]
    driver.finish(driver.running[0])
    assert numbers(driver.running[0]) == [2]
    driver.end(driver.running[0], lost=True)
    assert numbers(driver.running[0]) == [3]
    driver.finish(driver.running[0])
    message = driver.core.next_reports()
    assert message is not None
    blamed = [each.task for each in message.reports if each.HasField("failure")]
    assert blamed == [2]


def test_who_died_before_it_heard_of_a_call_says_nothing_of_it() -> None:
    driver = Driver()
    driver.give(6)
    for _ in range(LOSSES_WITHOUT_BLAME_MAX + 1):
        driver.running[0].unheard = True
        driver.end(driver.running[0], lost=True)
    assert driver.told() == []
    assert numbers(driver.running[0]) == [6]


def test_such_deaths_are_forgotten_once_the_call_got_through() -> None:
    driver = Driver()
    driver.give(6)
    for _ in range(LOSSES_WITHOUT_BLAME_MAX - 1):
        driver.end(driver.running[0], lost=True)
    driver.finish(driver.running[0])
    driver.give(6)
    for _ in range(LOSSES_WITHOUT_BLAME_MAX - 1):
        driver.end(driver.running[0], lost=True)
    assert numbers(driver.running[0]) == [6]


def test_a_cancelled_batch_that_dies_blames_nobody() -> None:
    driver = Driver()
    for _ in range(LOSSES_WITHOUT_BLAME_MAX + 1):
        first = driver.give(6)
        driver.give(settled=(first,))
        driver.end(driver.running[0], lost=True)
    assert driver.told() == []
    assert driver.held() == set()


def test_after_leaving_nothing_is_held_started_or_told() -> None:
    driver = Driver()
    driver.give(1, 2, 3)
    driver.finish(driver.running[0])
    running = driver.running[0]
    driver.take(driver.core.leave())
    assert driver.told() == []
    assert driver.ended == [running]
    assert driver.held() == set()
    driver.end(running)
    driver.give(4)
    assert driver.running == []


def test_what_is_meant_for_shards_means_nothing_here() -> None:
    driver = Driver()
    absent = coordination.AbsentShards(job_id="job-1", shards=[1])
    assert driver.core.skip(absent) == []
    assert driver.core.open_failures() == []


def test_a_batch_of_another_hosting_is_not_its_own() -> None:
    driver, other = Driver(), Driver()
    driver.give(1)
    other.give(1)
    assert driver.core.owns(driver.running[0])
    assert not driver.core.owns(other.running[0])


def test_a_large_value_waits_for_its_blob_and_its_part_is_done() -> None:
    driver = Driver()
    attempt = driver.give(1)
    (task,) = driver.running
    assert driver.core.call_done(task, 0, 0.1) == (1, attempt)
    assert task.parts[0].state is PartState.DONE
    driver.end(task)
    # The blob is on its way: the call neither runs again nor is it told.
    assert driver.running == []
    assert driver.told() == []
    stored: Any = pb.StoredValue(digest="ab", size_bytes=9)
    assert isinstance(driver.core.report(1, attempt, stored=stored)[0], do.Wake)
    assert driver.told() == [(1, attempt)]


def test_what_others_were_quicker_with_does_not_pile_up_behind_a_call_that_hangs() -> None:
    driver = Driver()
    hanging = driver.give(0)
    kept = driver.give(1)
    for number in range(2, 1000):
        attempt = driver.give(number)
        driver.give(settled=(attempt,))
        assert len(driver.core._waiting) <= 2 * len(driver.core._open) + 1
    assert driver.held() == {(0, hanging), (1, kept)}
    driver.finish(driver.running[0])
    assert numbers(driver.running[0]) == [1]


def test_what_is_kept_for_an_owner_is_no_more_than_it_handed_out() -> None:
    """However often the stream breaks: each attempt is reported once, until it is settled."""
    driver = Driver()
    first = driver.give(*range(20))
    for number in range(20):
        for _ in range(2):
            driver.take(driver.core.report(number, first + number, value_json="1"))
    assert len(driver.core._unsent) == 20
    for _ in range(3):
        driver.take(driver.core.stream_opened())
        assert len(driver.core._unsent) == len(driver.core._reports) == 20
    driver.give(settled=tuple(range(first, first + 20)))
    assert not driver.core._reports
    assert driver.told() == []
    assert not driver.core._unsent


def test_calls_of_a_program_get_the_results_that_they_need_and_keep_them_until_they_run() -> None:
    driver = Driver()
    first = next(driver.attempts)
    message = pb.WorkResponse(tasks=[7, 8], first_attempt=first)
    next(driver.attempts)
    for digests in (["aa", "bb"], ["cc"]):
        message.inputs.add(
            values=[pb.StoredValue(digest=digest, size_bytes=3) for digest in digests]
        )
    driver.take(driver.core.told(message))
    (task,) = driver.running
    assert task.inputs == ((("aa", 3), ("bb", 3)),)
    # Its process dies before it comes to the call: the next one gets the same.
    driver.end(task, lost=True)
    (again,) = driver.running
    assert (numbers(again), again.inputs) == (numbers(task), task.inputs)
    driver.finish(again)
    (other,) = driver.running
    assert other.inputs == ((("cc", 3),),)
    driver.take(driver.core.told(pb.WorkResponse(settled=[first, first + 1])))
    assert driver.core._inputs == {}
