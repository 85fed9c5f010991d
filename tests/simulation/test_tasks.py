"""Sets of tasks and programs in whole clusters under faults: each task has one result, the right
one."""

from __future__ import annotations

import pytest

from tests.simulation.cluster import services
from tests.simulation.known import Known
from tests.simulation.runs import simulate

pytestmark = pytest.mark.slow

SEEDS = (3, 4, 6, 10, 12)
PROGRAM_SEEDS = (5, 10, 11, 20)

_AWAY = (
    "broken_connections",
    "isolation",
    "kill_aggregator",
    "kill_control",
    "kill_storage",
    "kill_worker",
    "pause_aggregator",
)
_PROGRAMS = (("shapes", ()), ("programs", 2), ("aggregators", 2))

FOUND_BUGS = (
    # A try that failed counted again where its worker came back and had not heard that it did.
    Known(
        19,
        ("broken_connections", "isolation", "kill_aggregator", "kill_worker", "pause_aggregator"),
        (
            ("shapes", ()),
            ("tasks", 2),
            ("aggregators", 2),
            ("workers", 2),
            ("strike", "tasks_journalled worker reset"),
        ),
    ),
    # A job failed over results that were garbage by the time that an owner could write them down.
    Known(15, _AWAY, (*_PROGRAMS, ("workers", 3), ("garbage_s", 1.0))),
)


def test_each_task_has_one_result_whatever_fails():
    with services() as given:
        done = [simulate(given, seed, tasks=2, shapes=()) for seed in SEEDS]
    assert [each.seed for each in done if each.failure] == []
    assert sum(each.tasks for each in done) > 150
    # What was looked for did come about.
    assert sum(each.calls for each in done) > sum(each.tasks for each in done)
    assert sum(each.tasks_given_up for each in done) > 0
    assert sum(each.tasks_copied for each in done) > 0
    assert sum(each.tasks_taken_over for each in done) > 0


def test_a_task_of_a_program_reads_what_others_have_left_and_nothing_else():
    with services() as given:
        done = [simulate(given, seed, programs=2, shapes=()) for seed in PROGRAM_SEEDS]
    assert [each.failure for each in done if each.failure] == []
    assert sum(each.results_read for each in done) > 100
    assert sum(each.calls for each in done) > sum(each.tasks for each in done)
    assert sum(each.tasks_taken_over for each in done) > 0
    assert sum(each.passed_over for each in done) > 0
    assert sum(each.went_on for each in done) > 10


def test_scenarios_that_once_found_bugs_find_them_no_more():
    with services() as given:
        done = [(scenario, scenario.run(given)) for scenario in FOUND_BUGS]
    assert [(scenario, each.failure) for scenario, each in done if each.failure] == []
    assert sum(each.results_gone for _, each in done) > 0
