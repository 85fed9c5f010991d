"""Several jobs on the slots of one worker: shares by weight, nobody starves, no slot idles."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.reduction import Node
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.core.dispatch import Dispatcher, Task
from worker.core.effects import WaitForJob
from worker.core.rounds import Part, Round
from worker.core.session import WorkerCore
from worker.core.shares import CREDIT_S, Shares

ROUND = Round(training_pb2.GoRecord(action=training_pb2.GoRecord.ACTION_TRAIN), 1, 1)
WAIT_S = 0.05
THINKS_S = 0.01


@dataclass(frozen=True)
class Job:
    """One that computes a task on each slot and then has nothing to do for a moment."""

    priority: int
    task_s: float
    thinks_s: float = THINKS_S
    begins_s: float = 0.0
    ends_s: float = 1e9
    prepares_s: float = 0.0


@dataclass
class Machine:
    """A dispatcher in virtual time under jobs that are closed loops."""

    jobs: dict[str, Job]
    slots: int = 1
    used: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    waited: int = 0

    def run(self, until_s: float, since_s: float = 0.0) -> None:
        self.dispatcher = Dispatcher(self.slots)
        self.ids = itertools.count(1)
        self.agenda: list[tuple[float, int, str, object]] = []
        for slot in range(self.slots):
            self.dispatcher.slot_idle(slot)
        for name, job in self.jobs.items():
            self.at(job.begins_s, "enrol", name)
        while self.agenda and self.agenda[0][0] <= until_s:
            self.now_s, _, kind, what = heapq.heappop(self.agenda)
            getattr(self, kind)(what)
            waits = self.dispatcher.waits
            for task in self.dispatcher.start():
                self.at(self.now_s + self.jobs[task.job_id].task_s, "end", task)
            if self.dispatcher.waits > waits:
                self.waited += 1
                self.at(self.now_s + WAIT_S, "wait_over", self.dispatcher.waits)
            if self.now_s < since_s:
                self.used.clear()

    def at(self, time_s: float, kind: str, what: object) -> None:
        heapq.heappush(self.agenda, (time_s, next(self.ids), kind, what))

    def enrol(self, name: str) -> None:
        self.dispatcher.shares.enrol(name, self.jobs[name].priority)
        self.at(self.now_s + self.jobs[name].prepares_s, "step", name)

    def step(self, name: str) -> None:
        if self.now_s >= self.jobs[name].ends_s:
            self.dispatcher.shares.dismiss(name)
            return
        for slot in range(self.slots):
            parts = [Part(Node(0, 1), slot)]
            task = Task(next(self.ids), name, 1, ROUND, parts, slot)
            self.dispatcher.submit(task)

    def end(self, task: Task) -> None:
        self.dispatcher.slot_idle(task.slot)
        name = task.job_id
        self.dispatcher.shares.charge(name, self.jobs[name].task_s)
        self.used[name] += self.jobs[name].task_s
        self.steps[name] += 1
        if self.steps[name] % self.slots == 0:
            self.at(self.now_s + self.jobs[name].thinks_s, "step", name)

    def wait_over(self, number: int) -> None:
        if self.dispatcher.waiting and number == self.dispatcher.waits:
            self.dispatcher.wait_over()

    def share(self, name: str) -> float:
        return self.used[name] / sum(self.used.values())


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Job(50, 0.1), Job(50, 0.1), 0.5),
        (Job(50, 0.1), Job(50, 1.0), 0.5),
        (Job(50, 0.02), Job(50, 0.3), 0.5),
        (Job(100, 0.1), Job(50, 0.1), 2 / 3),
        (Job(90, 0.1), Job(10, 1.0), 0.9),
        (Job(10, 0.1), Job(90, 1.0), 0.1),
    ],
)
def test_time_is_shared_by_weight_whatever_the_tasks(
    slots: int, first: Job, second: Job, expected: float
) -> None:
    machine = Machine({"a": first, "b": second}, slots)
    machine.run(150.0)
    assert machine.share("a") == pytest.approx(expected, abs=0.04)


def test_without_waiting_the_long_tasks_would_have_it_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the waiting is for: who comes first alone does not decide it."""
    monkeypatch.setattr(Shares, "worth_waiting", lambda *_: "")
    machine = Machine({"a": Job(50, 0.1), "b": Job(50, 1.0)})
    machine.run(150.0)
    assert machine.share("a") < 0.15


@given(
    priorities=st.lists(st.integers(0, 100), min_size=2, max_size=5),
    task_s=st.lists(st.sampled_from([0.05, 0.1, 0.4]), min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=15)
def test_nobody_starves_and_slots_are_busy(priorities: list[int], task_s: list[float]) -> None:
    jobs = {f"j{n}": Job(each, task_s[n]) for n, each in enumerate(priorities)}
    machine = Machine(jobs)
    machine.run(200.0)
    total = sum(max(1, each) for each in priorities)
    for name, job in jobs.items():
        assert machine.used[name] >= 0.7 * 200 * max(1, job.priority) / total - 3 * job.task_s
    # A job that is alone for a moment thinks, too; so a fifth is more than what is waited for.
    assert sum(machine.used.values()) >= 0.8 * 200


def test_a_job_by_itself_never_waits() -> None:
    machine = Machine({"a": Job(50, 0.1, thinks_s=0.0)}, slots=2)
    machine.run(50.0)
    assert machine.waited == 0
    assert machine.used["a"] == pytest.approx(100.0, rel=0.02)


def test_who_stays_away_is_waited_for_less_and_less() -> None:
    machine = Machine({"a": Job(50, 0.1, thinks_s=3.0), "b": Job(50, 0.1, thinks_s=0.0)})
    machine.run(300.0)
    assert machine.used["b"] >= 0.93 * 300
    assert machine.waited < 150


def test_a_share_grows_when_another_job_ends_and_shrinks_when_one_comes() -> None:
    jobs = {"a": Job(50, 0.1), "b": Job(50, 0.1, begins_s=100.0, ends_s=200.0)}
    alone, both, after = Machine(jobs), Machine(jobs), Machine(jobs)
    alone.run(100.0)
    both.run(200.0, since_s=101.0)
    after.run(300.0, since_s=203.0)
    assert alone.share("a") == 1.0
    assert both.share("a") == pytest.approx(0.5, abs=0.03)
    assert after.share("a") == 1.0
    assert after.used["a"] >= 0.9 * 97


def test_the_time_that_it_took_to_prepare_a_job_is_no_time_that_it_lacks() -> None:
    jobs = {"old": Job(25, 0.1), "new": Job(75, 0.1, begins_s=10.0, prepares_s=30.0)}
    machine = Machine(jobs)
    machine.run(55.0, since_s=40.0)
    assert machine.used["new"] / machine.used["old"] == pytest.approx(3.0, rel=0.1)


def test_a_job_begins_level_with_those_that_compute_and_not_with_one_still_prepared() -> None:
    shares = Shares()
    shares.enrol("old", 50)
    shares.charge("old", 9.0)
    shares.enrol("new", 50)
    shares.enrol("prepared", 50)
    shares.charge("old", 1.0)
    shares.charge("new", 0.5)
    assert shares.first(["old", "new"]) == "old"


def test_a_job_gets_back_no_more_than_its_credit() -> None:
    shares = Shares()
    shares.enrol("a", 50)
    shares.enrol("b", 50)
    shares.charge("a", 1.0)
    for _ in range(10_000):
        shares.charge("b", 0.1)
    shares.charge("a", 0.9 * CREDIT_S)
    assert shares.first(["b", "a"]) == "a"
    shares.charge("a", 0.2 * CREDIT_S)
    assert shares.first(["b", "a"]) == "b"


def test_a_new_job_begins_level_with_the_last() -> None:
    shares = Shares()
    shares.enrol("a", 50)
    shares.charge("a", 500.0)
    shares.enrol("b", 50)
    shares.charge("b", 0.2)
    assert shares.first(["b", "a"]) == "a"


def assign(job_id: str, priority: int) -> coordination.SessionResponse:
    spec = job_spec_pb2.JobSpec(priority=priority)
    layout = training_pb2.Layout(dtype="float32", element_count=10)
    plan = training_pb2.JobPlan(
        job_id=job_id, layout=layout, shards=1, spec=spec.SerializeToString()
    )
    piece = training_pb2.ParameterRange(element_count=10, aggregator_id="a0", address="x:1")
    node = training_pb2.TreeNode(first=0, span=1)
    message = coordination.AssignJob(
        plan=plan, term=1, placement=1, ranges=[piece], train_nodes=[node]
    )
    return coordination.SessionResponse(generation=1, assign_job=message)


def test_the_worker_weighs_jobs_by_their_priority_and_says_when_it_waits() -> None:
    core = WorkerCore(1)
    core.message(assign("high", 100))
    core.message(assign("low", 25))
    core.slot_idle(0)
    core.computed("high", 1.0)
    core.computed("low", 1.0)
    task = Task(1, "low", 1, ROUND, [Part(Node(0, 1), 0)], 0)
    core.dispatcher.submit(task)
    (wait,) = core.settle([])
    assert isinstance(wait, WaitForJob)
    assert core.settle([]) == [], "it is said once"
    assert core.wait_over(wait.number - 1) == [], "that one was over before"
    (run,) = core.wait_over(wait.number)
    assert run.task is task
    assert core.wait_over(wait.number) == []


def test_a_job_that_left_is_waited_for_by_nobody() -> None:
    core = WorkerCore(1)
    core.message(assign("high", 100))
    core.message(assign("low", 25))
    core.slot_idle(0)
    core.computed("high", 1.0)
    core.computed("low", 1.0)
    revoke = coordination.RevokeJob(job_id="high", term=1)
    core.message(coordination.SessionResponse(generation=1, revoke_job=revoke))
    core.dispatcher.submit(Task(1, "low", 1, ROUND, [Part(Node(0, 1), 0)], 0))
    (run,) = core.settle([])
    assert run.task.job_id == "low"
