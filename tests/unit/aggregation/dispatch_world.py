"""A world for the dispatcher of tasks: workers, streams, a journal and everything that goes wrong.

Whatever happens is drawn from one seed. Streams deliver in order or break; workers die or only lose
their stream; owners die, and the one before may still try to write; reports come twice.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.aggregation.core.dispatch.dispatcher import INDEPENDENT, Dispatcher, State
from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Effect,
    Event,
    Failed,
    Finished,
    Moved,
    Paused,
    Reported,
    Send,
    Tick,
    WorkerClosed,
    WorkerOpened,
)
from phalanx.programs import Graph
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.task_service_pb2 import StoredValue, TaskAttempt, TaskRecord, TaskReport


@dataclass
class Worker:
    """What a worker process knows: attempts that it runs, and reports that were not settled."""

    name: str
    open: dict[int, int] = field(default_factory=dict)
    inputs: dict[int, tuple[str, ...]] = field(default_factory=dict)
    reports: dict[int, TaskReport] = field(default_factory=dict)
    unsent: deque[int] = field(default_factory=deque)
    session: int = 0
    inbox: deque[Send] = field(default_factory=deque)


def value_of(task: int, inputs: Sequence[str]) -> str:
    """What a task makes of the results that it needs."""
    return f"{task}({','.join(inputs)})"


class World:
    """Runs one seed. `poison` tasks fail in their own process wherever they run; in a
    `graph` a task's result is made of those of others, and stored: empty for tasks of `empty`."""

    def __init__(
        self,
        seed: int,
        *,
        total: int = 40,
        poison: frozenset[int] = frozenset(),
        attempts_max: int = 3,
        failures_max: int | None = None,
        deadly: bool = True,
        graph: Graph = INDEPENDENT,
        empty: frozenset[int] = frozenset(),
    ) -> None:
        self.random = random.Random(seed)
        self.total, self.poison, self.deadly = total, poison, deadly
        self._limits = attempts_max, failures_max
        self.graph, self.empty = graph, empty
        self.journal: list[bytes] = []
        self.now_s = 100.0
        self.term = 0
        self.sessions = 0
        self.workers = [Worker(f"worker-{number}") for number in range(3)]
        self.given: dict[int, int] = {}
        self.settled_early: list[int] = []
        self.moved: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.end: Effect | None = None
        self.tried: Counter[int] = Counter()
        self.pending: tuple[int, bytes] | None = None
        self.zombies: list[tuple[int, bytes]] = []
        self.new_owner()

    # The owner

    def new_owner(self) -> None:
        """The owner dies; the next one reads the journal. What the old one was writing may come
        before the new one begins, or is refused."""
        if self.pending is not None:
            self.zombies.append(self.pending)
            self.pending = None
        for worker in self.workers:
            worker.session, worker.inbox = 0, deque()
        if self.zombies and self.random.random() < 0.5:
            self.write(*self.zombies.pop())
        self.term += 1
        self.dispatcher = Dispatcher(self.total, self.term, *self._limits, self.graph)
        for payload in self.journal:
            self.dispatcher.restore(TaskRecord.FromString(payload))
        self.journal.append(self.dispatcher.begin().SerializeToString())
        self.end = None
        self.handle(Tick())

    def write(self, place: int, payload: bytes) -> bool:
        """Append at a place; refused where another record stands."""
        if place != len(self.journal):
            self.faults["write refused"] += 1
            return False
        self.journal.append(payload)
        return True

    def handle(self, event: Event) -> None:
        for effect in self.dispatcher.handle(event, self.now_s):
            match effect:
                case Send():
                    self.sent(effect)
                case Append():
                    assert self.pending is None, "two appends at once"
                    self.pending = len(self.journal), effect.record.SerializeToString()
                case Moved():
                    self.moved[effect.cause] += len(effect.tasks)
                case Finished() | Failed() | Paused():
                    assert self.end is None, "two ends"
                    self.end = effect
        for peer in self.dispatcher._peers.values():
            for attempt in peer.attempts.values():
                state = self.dispatcher.state(attempt.task)
                assert state < State.REPORTED, "an attempt at a task that has its result counts"

    def sent(self, effect: Send) -> None:
        for number, task in enumerate(effect.tasks, effect.first_attempt):
            assert number not in self.given, "an attempt number was given twice"
            self.given[number] = task
        for worker in self.workers:
            if worker.session == effect.session:
                worker.inbox.append(effect)

    # Workers

    def connect(self, worker: Worker) -> None:
        self.sessions += 1
        worker.session = self.sessions
        held = {**worker.open, **{key: each.task for key, each in worker.reports.items()}}
        worker.unsent = deque(worker.reports)
        attempts = [TaskAttempt(task=task, attempt=number) for number, task in held.items()]
        self.handle(WorkerOpened(worker.session, worker.name, 2, attempts))

    def disconnect(self, worker: Worker, *, dies: bool) -> None:
        session, worker.session, worker.inbox = worker.session, 0, deque()
        if dies:
            worker.open.clear()
            worker.inputs.clear()
            worker.reports.clear()
        if session:
            self.handle(WorkerClosed(session))

    def receive(self, worker: Worker) -> None:
        message = worker.inbox.popleft()
        durable = self.durable_results()
        for number in message.settled:
            report = worker.reports.pop(number, None)
            worker.open.pop(number, None)
            if report is not None and not self.is_safe(report, durable):
                self.settled_early.append(number)
        for number, task in enumerate(message.tasks, message.first_attempt):
            worker.open[number] = task
            if self.graph.count:
                inputs = message.inputs[number - message.first_attempt]
                worker.inputs[number] = tuple(each.digest for each in inputs)

    def is_safe(self, report: TaskReport, durable: dict[int, int]) -> bool:
        """Whether a report may be forgotten: its task has a durable result, or another attempt's
        is on its way, or it is a failure."""
        if report.HasField("failure") or report.task in durable or self.end is not None:
            return True
        others = self.dispatcher.state(report.task) is State.REPORTED
        return others and report.attempt not in self.dispatcher._settling

    def run_one(self, worker: Worker) -> None:
        number = self.random.choice(list(worker.open))
        task = worker.open.pop(number)
        report = TaskReport(task=task, attempt=number, seconds=0.01)
        if task in self.poison:
            report.failure.CopyFrom(Failure(code="RAISED", message="no", traceback="here"))
            self.tried[task] += 1
        elif self.graph.count:
            digest = value_of(task, worker.inputs[number])
            size = 0 if task in self.empty else 1
            report.stored.CopyFrom(StoredValue(digest=digest, size_bytes=size))
        else:
            report.value_json = str(task * 2)
        worker.reports[number] = report
        worker.unsent.append(number)

    def report(self, worker: Worker) -> None:
        count = self.random.randint(0, len(worker.unsent))
        numbers = [worker.unsent.popleft() for _ in range(count)]
        reports = [worker.reports[number] for number in numbers if number in worker.reports]
        if reports and self.random.random() < 0.1:
            self.faults["said twice"] += 1
            reports.append(reports[0])
        copies = []
        for each in reports:
            copy = TaskReport()
            copy.CopyFrom(each)
            copies.append(copy)
        self.handle(Reported(worker.session, copies))

    # Time

    def step(self) -> None:
        """One thing happens."""
        self.now_s += self.random.choice((0.001, 0.01, 0.1))
        worker = self.random.choice(self.workers)
        chance = self.random.random()
        if self.deadly and chance < 0.02:
            dies = self.random.random() < 0.5
            self.faults["worker dies" if dies else "stream breaks"] += 1
            self.disconnect(worker, dies=dies)
        elif self.deadly and chance < 0.03:
            self.faults["owner dies"] += 1
            self.new_owner()
        elif chance < 0.10:
            self.handle(Tick())
        elif chance < 0.30 and self.pending is not None:
            pending, self.pending = self.pending, None
            assert self.write(*pending), "the owner of the newest term was refused"
            self.handle(Appended())
        elif self.zombies and chance < 0.32:
            place, payload = self.zombies.pop()
            assert not self.write(place, payload), "an owner of an earlier term wrote"
        elif not worker.session:
            self.connect(worker)
        elif worker.inbox and chance < 0.6:
            self.receive(worker)
        elif worker.open and chance < 0.8:
            self.run_one(worker)
        else:
            self.report(worker)

    def run(self, steps_max: int = 60_000) -> None:
        """Until the end; faults stop after a while, so there is one."""
        for number in range(steps_max):
            if self.end is not None:
                return
            if number == 3000:
                self.deadly = False
            self.step()
        raise AssertionError(f"no end: {self.dispatcher.done} of {self.total} done")

    # What is durable

    def records(self) -> list[TaskRecord]:
        return [TaskRecord.FromString(payload) for payload in self.journal]

    def durable_results(self) -> dict[int, int]:
        """Results in the journal by task: how many."""
        found: Counter[int] = Counter()
        for record in self.records():
            for task in record.tried_anew:
                found[task] -= 1
            found.update(result.task for result in record.results)
        return {task: count for task, count in found.items() if count}
