"""Whose fault the death of the leaf server is."""

from __future__ import annotations

from phalanx.reduction import Node
from phalanx.v1.training_pb2 import GoRecord
from worker.core.dispatch import Dispatcher, Task
from worker.core.rounds import Part, Round
from worker.core.suspects import TASKS_ALONE_MAX, Suspects


def task(number: int, *shards: int, slot: int = 0) -> Task:
    round = Round(GoRecord(version=3, action=GoRecord.ACTION_TRAIN), 8, 1)
    return Task(number, "job-1", 1, round, [Part(Node(shard, 1), slot) for shard in shards], slot)


def test_once_is_nobodys_fault_and_twice_is_that_of_who_ran_alone() -> None:
    suspects = Suspects()
    assert not suspects.server_died(task(1, 2), 2)
    assert not suspects.server_died(task(2, 3), 3)
    assert suspects
    suspects.ended_well(task(3, 3))
    assert suspects
    assert suspects.server_died(task(4, 2), 2)
    assert not suspects


def test_what_passed_is_suspected_no_more() -> None:
    suspects = Suspects()
    suspects.server_died(task(1, 2), 2)
    suspects.ended_well(task(2, 1, 2))
    assert not suspects
    assert not suspects.server_died(task(3, 2), 2)


def test_suspects_that_never_come_back_are_forgotten() -> None:
    suspects = Suspects()
    suspects.server_died(task(1, 2), 2)
    for number in range(TASKS_ALONE_MAX - 1):
        suspects.ended_well(task(number, 5))
    assert suspects
    suspects.ended_well(task(99, 5))
    assert not suspects


def test_meanwhile_one_task_runs_at_a_time() -> None:
    dispatcher = Dispatcher(3)
    dispatcher.one_at_a_time = True
    for number in range(3):
        dispatcher.submit(task(number, number, slot=number))
        dispatcher.slot_idle(number)
    (first,) = dispatcher.start()
    assert dispatcher.start() == []
    dispatcher.slot_lost(first.slot)
    assert len(dispatcher.start()) == 1
    dispatcher.one_at_a_time = False
    assert len(dispatcher.start()) == 1
