"""The dispatcher of independent tasks: each task once, whatever happens to whom."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest

from coordinator.aggregation.core.dispatch.dispatcher import PAUSE_S, SILENCE_S, Dispatcher, State
from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Durable,
    Effect,
    Failed,
    Finished,
    Moved,
    PauseAsked,
    Paused,
    Reported,
    Send,
    Tick,
    WorkerClosed,
    WorkerOpened,
)
from coordinator.aggregation.core.dispatch.pace import DEPTH_MAX, Pace
from coordinator.aggregation.core.dispatch.records import QUEUE_BYTES, poisoned
from phalanx.programs import Graph
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.task_service_pb2 import (
    StoredValue,
    TaskAttempt,
    TaskRecord,
    TaskReport,
    TaskResult,
)
from tests.unit.aggregation.dispatch_world import World, value_of

SEEDS = range(60)


LAYERS = ((), (), (), (), (0, 1), (1, 0), (2, 3), (4, 5, 6), (4,), (7, 8, 0))
"""A graph: four tasks, three of two of them each, and two that need these in turn."""


def begun(total: int, term: int = 1, attempts: int = 3, failures: int | None = 0) -> Dispatcher:
    dispatcher = Dispatcher(total, term, attempts, failures)
    dispatcher.begin()
    return dispatcher


def sends(effects: list[Effect]) -> list[Send]:
    return [each for each in effects if isinstance(each, Send)]


def tasks_of(effects: list[Effect]) -> list[int]:
    return [task for each in sends(effects) for task in each.tasks]


def done(task: int, attempt: int, seconds: float = 0.001) -> TaskReport:
    return TaskReport(task=task, attempt=attempt, value_json="1", seconds=seconds)


def failed(task: int, attempt: int) -> TaskReport:
    failure = Failure(code="RAISED", message="ValueError: no", traceback="line 1")
    return TaskReport(task=task, attempt=attempt, failure=failure)


def durable(effects: list[Effect]) -> list[float]:
    return [
        each for effect in effects if isinstance(effect, Durable) for each in effect.round_trips_s
    ]


def append_of(effects: list[Effect]) -> TaskRecord:
    (append,) = (each for each in effects if isinstance(each, Append))
    return append.record


@pytest.mark.parametrize("seed", SEEDS)
def test_every_task_has_one_result_whatever_happens(seed: int) -> None:
    world = World(seed)
    world.run()
    assert isinstance(world.end, Finished)
    assert world.durable_results() == dict.fromkeys(range(world.total), 1)
    assert world.settled_early == []
    values = {result.task: result.value_json for each in world.records() for result in each.results}
    assert values == {task: str(task * 2) for task in range(world.total)}


def test_the_faults_of_these_worlds_happen() -> None:
    faults, moved = Counter[str](), Counter[str]()
    for seed in SEEDS:
        world = World(seed)
        world.run()
        faults += world.faults
        moved += world.moved
    for fault in ("worker dies", "stream breaks", "owner dies", "write refused", "said twice"):
        assert faults[fault] > 10, fault
    assert moved["lost"] > 20
    assert moved["late"] > 0


@pytest.mark.parametrize("seed", range(20))
def test_poison_is_given_up_after_its_own_failures_and_no_others(seed: int) -> None:
    world = World(seed, poison=frozenset({3, 17}))
    world.run()
    assert isinstance(world.end, Finished)
    given_up = {
        result.task: result.failure
        for record in world.records()
        for result in record.results
        if result.HasField("failure")
    }
    assert given_up.keys() == {3, 17}
    assert all(each.attempts == 3 for each in given_up.values())
    assert world.durable_results() == dict.fromkeys(range(world.total), 1)
    tries = Counter(each.task for record in world.records() for each in record.failed_tries)
    assert tries == {3: 3, 17: 3}


@pytest.mark.parametrize("seed", range(10))
def test_poison_fails_the_job_and_a_retry_tries_it_anew(seed: int) -> None:
    world = World(seed, poison=frozenset({5}), failures_max=0)
    world.run()
    assert isinstance(world.end, Failed)
    assert world.end.failure.task == 5
    assert world.end.failure.traceback == "here"
    world.poison = frozenset()
    world.deadly = False
    world.new_owner()
    world.run()
    assert isinstance(world.end, Finished)
    assert world.durable_results() == dict.fromkeys(range(world.total), 1)


def test_a_broken_stream_gives_its_tasks_to_others_at_once() -> None:
    dispatcher = begun(2)
    assert tasks_of(dispatcher.handle(WorkerOpened(1, "worker-1", 2), 0.0)) == [0, 1]
    dispatcher.handle(WorkerOpened(2, "worker-2", 2), 0.0)
    effects = dispatcher.handle(WorkerClosed(1), 0.1)
    assert Moved("lost", (0, 1), "worker-1") in effects
    assert [(each.session, each.tasks) for each in sends(effects)] == [(2, (0, 1))]


def test_a_worker_that_comes_back_goes_on_with_what_it_had() -> None:
    dispatcher = begun(2)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 2), 0.0))
    held = [
        TaskAttempt(task=task, attempt=number)
        for number, task in enumerate(send.tasks, send.first_attempt)
    ]
    dispatcher.handle(WorkerClosed(1), 0.1)
    effects = dispatcher.handle(WorkerOpened(2, "worker-1", 2, held), 0.2)
    assert tasks_of(effects) == []
    record = append_of(dispatcher.handle(Reported(2, [done(0, held[0].attempt)]), 0.3))
    assert [each.attempt for each in record.results] == [held[0].attempt]


def test_who_says_nothing_is_late_until_it_is_heard_of() -> None:
    dispatcher = begun(2)
    dispatcher.handle(Tick(), 0.0)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0))
    assert dispatcher.late_workers() == {}
    for tick in range(1, 60):
        dispatcher.handle(Tick(), tick * 0.1)
        if moved := dispatcher.late_workers():
            break
    assert moved.keys() == {"worker-1"}
    dispatcher.handle(Tick(), tick * 0.1 + 0.5)
    assert dispatcher.late_workers()["worker-1"] == pytest.approx(moved["worker-1"] + 0.5)
    dispatcher.handle(Reported(1, [done(send.tasks[0], send.first_attempt)]), tick * 0.1 + 0.6)
    assert dispatcher.late_workers() == {}


def test_who_takes_long_is_late_until_its_task_is_done() -> None:
    """By whomever: what it still computes then is of no use."""
    dispatcher = begun(12)
    dispatcher.handle(Tick(), 0.0)
    now_s = 0.0
    (long,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), now_s))
    (send,) = sends(dispatcher.handle(WorkerOpened(2, "worker-2", 1), now_s))
    attempts = list(zip(send.tasks, count(send.first_attempt), strict=False))
    copies: list[tuple[int, int]] = []
    while not copies:
        now_s += 0.1
        report = [done(task, attempt) for task, attempt in attempts]
        effects = dispatcher.handle(Reported(2, report), now_s)
        attempts = []
        dispatcher.handle(Reported(1, []), now_s)  # it lives
        effects += dispatcher.handle(Appended(), now_s)
        effects += dispatcher.handle(Tick(), now_s)
        given = [each for each in sends(effects) if each.session == 2 and each.tasks]
        for each in given:
            attempts += zip(each.tasks, count(each.first_attempt), strict=False)
        copies = [each for each in attempts if each[0] in long.tasks]
    assert Moved("late", (copies[0][0],), "worker-1") in effects
    assert dispatcher.late_workers().keys() == {"worker-1"}
    dispatcher.handle(Reported(2, [done(*each) for each in copies]), now_s + 0.1)
    assert dispatcher.late_workers() == {}


def test_a_report_is_settled_only_once_it_is_durable() -> None:
    dispatcher = begun(3)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0))
    first = send.first_attempt
    effects = dispatcher.handle(Reported(1, [done(0, first)]), 0.1)
    assert append_of(effects).results[0].task == 0
    assert all(not each.settled for each in sends(effects))
    assert dispatcher.done == 0
    # Said again on another stream, while it is being written.
    held = [TaskAttempt(task=0, attempt=first)]
    dispatcher.handle(WorkerOpened(2, "worker-1", 1, held), 0.2)
    assert all(not each.settled for each in sends(dispatcher.handle(Tick(), 0.2)))
    effects = dispatcher.handle(Appended(), 0.3)
    assert [each.settled for each in sends(effects) if each.settled] == [(first,)]
    assert dispatcher.done == 1


def test_a_round_trip_ends_when_its_result_is_durable_and_leaves_out_the_call() -> None:
    dispatcher = begun(3, attempts=1, failures=None)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 2), 1.0))
    first = send.first_attempt
    reports = [done(0, first, seconds=0.25), failed(1, first + 1)]
    assert not durable(dispatcher.handle(Reported(1, reports), 1.5))
    assert durable(dispatcher.handle(Appended(), 2.0)) == [pytest.approx(0.75)]


def test_what_comes_in_during_an_append_goes_into_the_next_one() -> None:
    dispatcher = begun(40)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 8), 0.0))
    reports = [done(task, send.first_attempt + task) for task in send.tasks]
    assert len(append_of(dispatcher.handle(Reported(1, reports[:1]), 0.1)).results) == 1
    for report in reports[1:6]:
        effects = dispatcher.handle(Reported(1, [report]), 0.1)
        assert not any(isinstance(each, Append) for each in effects)
    assert len(append_of(dispatcher.handle(Appended(), 0.2)).results) == 5


def test_an_attempt_of_another_worker_reports_nothing() -> None:
    dispatcher = begun(3)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0))
    dispatcher.handle(WorkerOpened(2, "worker-2", 1), 0.0)
    effects = dispatcher.handle(Reported(2, [failed(send.tasks[0], send.first_attempt)]), 0.1)
    assert not any(isinstance(each, Append) for each in effects)
    assert dispatcher.failed_tries == 0
    assert [each.settled for each in sends(effects)] == [(send.first_attempt,)]


def test_a_worker_completes_on_its_stream_only_what_it_was_given_there() -> None:
    """Results for what others have, for another task than that of the attempt, for attempts that
    nobody was given and for no task at all complete nothing."""
    dispatcher = begun(3)
    (theirs,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0))
    (own,) = sends(dispatcher.handle(WorkerOpened(2, "worker-2", 1), 0.0))
    forged = [
        done(theirs.tasks[0], theirs.first_attempt),
        done(theirs.tasks[0], own.first_attempt),
        done(2, own.first_attempt + 7),
        done(-1, own.first_attempt),
        done(3, own.first_attempt),
        done(2**31 - 1, 2**62),
    ]
    effects = dispatcher.handle(Reported(2, forged), 0.1)
    effects += dispatcher.handle(Reported(9, [done(0, theirs.first_attempt)]), 0.1)
    assert not any(isinstance(each, Append) for each in effects)
    assert dispatcher.done == 0
    honest = [done(own.tasks[0], own.first_attempt)]
    assert len(append_of(dispatcher.handle(Reported(2, honest), 0.2)).results) == 1


@pytest.mark.parametrize("by", ["its owner", "the next owner"])
def test_a_failure_counts_once_though_its_worker_never_heard_that_it_did(by: str) -> None:
    dispatcher = begun(1)
    (sent,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0))
    record = append_of(dispatcher.handle(Reported(1, [failed(0, sent.first_attempt)]), 0.1))
    if by == "its owner":
        dispatcher.handle(WorkerClosed(1), 0.2)
        dispatcher.handle(Appended(), 0.3)
    else:
        dispatcher = Dispatcher(1, 2, 3, 0)
        dispatcher.restore(record)
        dispatcher.begin()
    held = [TaskAttempt(task=0, attempt=sent.first_attempt)]
    effects = dispatcher.handle(WorkerOpened(2, "worker-1", 1, held), 0.4)
    (again,) = sends(effects)
    assert again.settled == (sent.first_attempt,)
    assert again.tasks == (0,)
    dispatcher.handle(Reported(2, [failed(0, sent.first_attempt)]), 0.5)
    assert dispatcher.failed_tries == 1


def test_a_failed_task_is_tried_elsewhere_and_then_named() -> None:
    dispatcher = begun(1, attempts=2)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0))
    first = send.first_attempt
    dispatcher.handle(WorkerOpened(2, "worker-2", 1), 0.0)
    # worker-1 is idle, but the task failed there.
    effects = dispatcher.handle(Reported(1, [failed(0, first)]), 0.1)
    (again,) = [each for each in sends(effects) if each.tasks]
    assert (again.session, again.tasks) == (2, (0,))
    assert append_of(effects).failed_tries[0].task == 0
    dispatcher.handle(Appended(), 0.2)
    dispatcher.handle(Reported(2, [failed(0, again.first_attempt)]), 0.3)
    (end,) = [each for each in dispatcher.handle(Appended(), 0.3) if isinstance(each, Failed)]
    assert end.failure.task == 0
    assert end.failure.code == "POISON_TASK"
    assert list(end.failure.worker_ids) == ["worker-1", "worker-2"]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        (("NO_GPU", "NO_GPU"), "NO_GPU"),
        (("RAISED", "NO_GPU"), "POISON_TASK"),
        (("NO_GPU", "CRASHED"), "POISON_TASK"),
        (("RESULTS_NOT_JOURNALLED", "RESULTS_NOT_JOURNALLED"), "POISON_TASK"),
    ],
)
def test_a_task_tells_the_reason_that_every_worker_gave(codes: tuple[str, str], code: str) -> None:
    tries = [
        Failure(code=each, message="no", worker_ids=[f"worker-{number}"])
        for number, each in enumerate(codes)
    ]
    assert poisoned(3, tries).code == code


def test_a_silent_worker_loses_its_tasks_and_its_late_report_still_counts_once() -> None:
    dispatcher = begun(2)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 2), 0.0))
    now_s = 0.0
    while now_s < SILENCE_S + 0.5:
        now_s += 0.5
        effects = dispatcher.handle(Tick(), now_s)
    assert dispatcher.state(0) is State.WAITING
    effects = dispatcher.handle(WorkerOpened(2, "worker-2", 1), now_s)
    assert tasks_of(effects) == [0]
    effects = dispatcher.handle(Reported(1, [done(0, send.first_attempt)]), now_s)
    assert len(append_of(effects).results) == 1
    # The copy is ended, and what it says is nobody's.
    (copy,) = [each.settled for each in sends(effects) if each.session == 2 and each.settled]
    dispatcher.handle(Reported(2, [done(0, copy[0])]), now_s)
    dispatcher.handle(Appended(), now_s)
    assert dispatcher.done == 1


def test_when_the_dispatcher_itself_was_stopped_nobody_else_is_suspected() -> None:
    dispatcher = begun(2)
    dispatcher.handle(WorkerOpened(1, "worker-1", 2), 0.0)
    dispatcher.handle(Tick(), 0.1)
    assert dispatcher.handle(Tick(), 60.0) == []
    assert dispatcher.state(0) is State.LEASED


def test_the_last_stragglers_are_copied_and_the_first_result_counts() -> None:
    dispatcher = begun(9)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0))
    now_s, straggler, copied = 0.0, send, None
    dispatcher.handle(WorkerOpened(2, "worker-2", 1), 0.0)
    for _ in range(40):
        now_s += 0.05
        effects = dispatcher.handle(Tick(), now_s)
        dispatcher.handle(Reported(1), now_s)
        reports = [
            done(attempt.task, attempt.number) for attempt in dispatcher._peers[2].attempts.values()
        ]
        late = [each for each in effects if isinstance(each, Moved) and each.cause == "late"]
        if late:
            copied = late[0]
            break
        dispatcher.handle(Reported(2, reports), now_s)
        dispatcher.handle(
            Reported(
                1,
                [
                    done(each.task, each.number)
                    for each in dispatcher._peers[1].attempts.values()
                    if each.task != straggler.tasks[0]
                ],
            ),
            now_s,
        )
        if dispatcher._unwritten:
            dispatcher.handle(Appended(), now_s)
    assert copied is not None
    assert copied.tasks[0] == straggler.tasks[0]
    (copy,) = dispatcher._peers[2].attempts.values()
    effects = dispatcher.handle(Reported(2, [done(copy.task, copy.number)]), now_s)
    assert (straggler.first_attempt,) in [each.settled for each in sends(effects)]


def test_a_pause_waits_for_what_runs_but_not_for_ever() -> None:
    dispatcher = begun(5)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 2), 0.0))
    assert dispatcher.handle(PauseAsked(), 0.1) == []
    effects = dispatcher.handle(Reported(1, [done(0, send.first_attempt)]), 0.2)
    assert tasks_of(effects) == []
    effects = dispatcher.handle(Appended(), 0.3)
    assert Paused() not in effects
    assert Paused() in dispatcher.handle(Tick(), 0.2 + PAUSE_S)


def test_nothing_is_handed_out_while_the_journal_is_far_behind() -> None:
    dispatcher = begun(2000)
    (send,) = sends(dispatcher.handle(WorkerOpened(1, "worker-1", 500), 0.0))
    text = "x" * (QUEUE_BYTES // len(send.tasks) * 2)
    reports = [
        TaskReport(task=task, attempt=number, value_json=text)
        for number, task in enumerate(send.tasks, send.first_attempt)
    ]
    effects = dispatcher.handle(Reported(1, reports), 0.1)
    assert tasks_of(effects) == []
    while dispatcher._unwritten:
        effects += dispatcher.handle(Appended(), 0.2)
    assert tasks_of(effects)


@pytest.mark.parametrize("thief", ["worker-2", "worker-1"])
def test_a_worker_completes_only_what_it_was_given(thief: str) -> None:
    dispatcher = begun(3)
    opened = dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0)
    (sent,) = sends(opened)
    (mine,) = sent.tasks[:1]
    others = [task for task in range(3) if task != mine]
    number = sent.first_attempt
    claims = [
        TaskAttempt(task=others[0], attempt=number),
        TaskAttempt(task=others[0], attempt=number + 1000),
        TaskAttempt(task=others[1], attempt=1),
        *([TaskAttempt(task=mine, attempt=number)] if thief != "worker-1" else []),
    ]
    for session, claim in enumerate(claims, 2):
        effects = dispatcher.handle(WorkerOpened(session, thief, 1, [claim]), 0.1)
        settled = [each for send in sends(effects) for each in send.settled]
        assert claim.attempt in settled
        effects = dispatcher.handle(Reported(session, [done(claim.task, claim.attempt)]), 0.2)
        assert not [each for each in effects if isinstance(each, Append)]
        dispatcher.handle(WorkerClosed(session), 0.3)


def test_what_an_earlier_owner_gave_is_believed() -> None:
    before = begun(1)
    number = sends(before.handle(WorkerOpened(1, "worker-1", 1), 0.0))[0].first_attempt
    after = begun(1, term=2)
    held = [TaskAttempt(task=0, attempt=number)]
    assert not tasks_of(after.handle(WorkerOpened(1, "worker-1", 1, held), 0.0))
    assert append_of(after.handle(Reported(1, [done(0, number)]), 0.1)).results


def test_attempts_of_an_owner_that_begins_again_have_other_numbers() -> None:
    first, second = Dispatcher(1, 7, 3, 0), Dispatcher(1, 7, 3, 0)
    second.restore(first.begin())
    second.begin()
    numbers = [
        sends(each.handle(WorkerOpened(1, "worker-1", 1), 0.0))[0].first_attempt
        for each in (first, second)
    ]
    assert numbers[0] != numbers[1]
    assert Dispatcher(1, 8, 3, 0)._state is not None


def test_a_worker_gets_no_more_than_it_can_run_before_anything_is_known() -> None:
    dispatcher = begun(2)
    effects = dispatcher.handle(WorkerOpened(1, "worker-1", 1), 0.0)
    for number in range(20):
        effects += dispatcher.handle(Tick(), number * 0.05)
    assert tasks_of(effects) == [0]
    assert tasks_of(dispatcher.handle(WorkerOpened(2, "worker-2", 1), 1.0)) == [1]


def test_short_tasks_come_in_many_and_long_ones_alone() -> None:
    pace = Pace()
    for _ in range(200):
        pace.took(0.00001, 0.01)
    assert pace.depth() == DEPTH_MAX
    assert pace.room(2, 0, 100_000, 4) == 2 * DEPTH_MAX
    assert pace.room(2, 0, 20, 4) == 5
    for _ in range(500):
        pace.took(30.0, 30.0)
    assert pace.depth() == 1
    assert pace.room(2, 2, 100_000, 4) == 0


@pytest.mark.parametrize("seed", range(40))
def test_a_task_gets_the_results_it_needs_whatever_happens(seed: int) -> None:
    world = World(seed, total=len(LAYERS), graph=Graph(LAYERS))
    world.run()
    assert isinstance(world.end, Finished)
    expected: list[str] = []
    for task, needs in enumerate(LAYERS):
        expected.append(value_of(task, [expected[needed] for needed in needs]))
    results = {each.task: each for record in world.records() for each in record.results}
    assert [results[task].stored.digest for task in range(len(LAYERS))] == expected
    assert world.durable_results() == dict.fromkeys(range(len(LAYERS)), 1)
    assert world.dispatcher.outcome == results[len(LAYERS) - 1].stored
    # What a task needs stands in the journal before it.
    order = [each.task for record in world.records() for each in record.results]
    places = {task: place for place, task in enumerate(order)}
    assert all(places[task] > places[need] for task in places for need in LAYERS[task])


PASSING = Graph(
    needs=((), (), (0,), (1,), (2, 3), (4, 3), (4, 2), (5, 6), (7, 0)),
    passing=frozenset((2, 3, 4, 5, 6)),
)
"""Tasks behind two that may be empty, and one that puts together whatever is there."""


@pytest.mark.parametrize("empty", [frozenset(), frozenset((0,)), frozenset((1,)), frozenset((2,))])
@pytest.mark.parametrize("seed", range(8))
def test_nobody_runs_what_is_passed_over(seed: int, empty: frozenset[int]) -> None:
    world = World(seed, total=PASSING.count, graph=PASSING, empty=empty)
    world.run()
    assert isinstance(world.end, Finished)
    values: dict[int, StoredValue] = {}
    run = []
    for task, needs in enumerate(PASSING.needs):
        passed = PASSING.passed(task, values)
        if passed is None:
            run.append(task)
            digest = value_of(task, [values[needed].digest for needed in needs])
            passed = StoredValue(digest=digest, size_bytes=0 if task in empty else 1)
        values[task] = passed
    assert world.durable_results() == dict.fromkeys(run, 1)
    assert world.dispatcher.done == PASSING.count
    assert world.dispatcher.outcome == values[PASSING.count - 1]
    assert set(world.given.values()) == set(run)
    done = {each.task: each.stored for record in world.records() for each in record.results}
    assert {**done, **PASSING.passed_over(done)} == values
    assert (len(run) == PASSING.count) == (not empty)


def test_what_is_ready_is_handed_out_by_its_level() -> None:
    dispatcher = Dispatcher(5, 1, 3, 0, Graph(((), (), (), (), (0,)), levels=(0, 0, 1, 0, 2)))
    dispatcher.begin()
    effects = dispatcher.handle(WorkerOpened(1, "w1", 2), 0.0)
    assert tasks_of(effects) == [2, 0]
    first = sends(effects)[0].first_attempt
    dispatcher.handle(Reported(1, [stored(2, first), stored(0, first + 1)]), 1.0)
    assert [dispatcher.state(each).name for each in (1, 3)] == ["LEASED", "LEASED"]
    effects = dispatcher.handle(Appended(), 1.1)
    assert dispatcher.state(4) is State.WAITING
    assert tasks_of(dispatcher.handle(WorkerOpened(2, "w2", 1), 1.2)) == [4]


def stored(task: int, attempt: int) -> TaskReport:
    return TaskReport(task=task, attempt=attempt, stored=StoredValue(digest=f"of {task}"))


def test_a_task_waits_until_what_it_needs_is_durable() -> None:
    dispatcher = Dispatcher(3, 1, 3, 0, Graph(((), (), (1, 0, 1))))
    dispatcher.begin()
    effects = dispatcher.handle(WorkerOpened(1, "w1", 4), 0.0)
    assert tasks_of(effects) == [0, 1]
    first = sends(effects)[0].first_attempt
    effects = dispatcher.handle(Reported(1, [stored(0, first), stored(1, first + 1)]), 1.0)
    assert tasks_of(effects) == []
    assert dispatcher.state(2) is State.BLOCKED
    (send,) = (each for each in sends(dispatcher.handle(Appended(), 1.1)) if each.tasks)
    assert send.tasks == (2,)
    assert [each.digest for each in send.inputs[0]] == ["of 1", "of 0", "of 1"]


def test_nobody_can_hold_a_task_that_lacks_what_it_needs() -> None:
    dispatcher = Dispatcher(2, 2, 3, 0, Graph(((), (0,))))
    dispatcher.begin()
    lie = TaskAttempt(task=1, attempt=(1 << 40) + 5)
    effects = dispatcher.handle(WorkerOpened(1, "w1", 1, [lie]), 0.0)
    assert [each for send in sends(effects) for each in send.settled] == [lie.attempt]
    assert tasks_of(effects) == [0]


def test_a_program_fails_with_the_first_task_that_is_given_up() -> None:
    dispatcher = Dispatcher(2, 1, 1, 0, Graph(((), (0,))))
    dispatcher.begin()
    effects = dispatcher.handle(WorkerOpened(1, "w1", 1), 0.0)
    effects = dispatcher.handle(Reported(1, [failed(0, sends(effects)[0].first_attempt)]), 1.0)
    effects = dispatcher.handle(Appended(), 1.1)
    assert any(isinstance(each, Failed) for each in effects)
    again = Dispatcher(2, 2, 1, 0, Graph(((), (0,))))
    again.restore(given_up(0))
    again.begin()
    assert tasks_of(again.handle(WorkerOpened(1, "w1", 1), 0.0)) == [0]


def given_up(task: int) -> TaskRecord:
    """A journal in which a task was given up."""
    failure = Failure(code="POISON_TASK", message="no")
    return TaskRecord(term=1, results=[TaskResult(task=task, attempt=1, failure=failure)])
