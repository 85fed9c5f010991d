"""What the worker decides about the tasks of a job: which calls run, what is told of them.

Tasks come from their owner as attempts, and each is kept until the owner says that it is settled:
waiting, running, or with a report that is told again on every new stream. Slots run them in
batches, larger ones where calls are short.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from phalanx.reduction import Node
from phalanx.tasks import timeout_s
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import task_service_pb2, training_pb2
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.job_spec_pb2 import JobSpec
from worker.core.dispatch import Dispatcher, Task
from worker.core.effects import Cancel, Effect, OpenStreams, Report, Wake
from worker.core.rounds import LeafFailure, Part, PartState, Round

LeafFailed = coordination.LeafFailed
Inputs = tuple[tuple[str, int], ...]
"""Results of other tasks: digest and size of each."""

BATCH_MAX = 64
BATCH_S = 0.02
"""Calls that one slot gets at once take about so long."""

LOSSES_WITHOUT_BLAME_MAX = 3
REPORTS_PER_MESSAGE = 512
REPORTS_BYTES = 1024 * 1024
_WEIGHT = 0.1
NO_STEP = -1


class TaskSetCore:
    """The tasks of one job on this worker; lives over terms. Methods return what is to be done."""

    def __init__(
        self, plan: training_pb2.JobPlan, dispatcher: Dispatcher, new_task_id: Callable[[], int]
    ) -> None:
        self.plan = plan
        self.job_id = plan.job_id
        self.term = 0
        self.placement = -1
        self.prepared = False
        self.leaf_sha256 = ""
        #: Tasks are handed out by their owner, not placed by control.
        self.train_nodes: list[Node] = []
        self.evaluation_nodes: list[Node] = []
        self.assigned = training_pb2.Given()
        self.timeout_s = timeout_s(JobSpec.FromString(plan.spec))
        self._dispatcher = dispatcher
        self._new_task_id = new_task_id
        self._owner = self._address = ""
        self._waiting: deque[tuple[int, int]] = deque()
        #: Attempts that wait or run → their task.
        self._open: dict[int, int] = {}
        #: Attempts of a program that wait or run → the results that they need.
        self._inputs: dict[int, Inputs] = {}
        self._batches: dict[int, tuple[Task, list[int]]] = {}
        self._reports: dict[int, task_service_pb2.TaskReport] = {}
        self._unsent: deque[int] = deque()
        self._mean_s: float | None = None
        self._losses: dict[int, int] = {}

    @property
    def slots(self) -> int:
        """Calls that run at once."""
        return self._dispatcher.slots

    # Control

    def assign(self, message: coordination.AssignJob) -> list[Effect]:
        """Take a term; what is under way goes on, and its owner of this term hears of it."""
        if (message.term, message.placement) <= (self.term, self.placement):
            return []
        self.placement = message.placement
        self.assigned = message.given
        if message.term == self.term:
            return []
        self.plan, self.term = message.plan, message.term
        owner = message.ranges[0]
        self._owner, self._address = owner.aggregator_id, owner.address
        return self._ask_for_tasks() if self.prepared else []

    def prepare_done(self, leaf_sha256: str = "") -> list[Effect]:
        """The code is here and the leaf processes know the job: now tasks do not wait here."""
        self.prepared = True
        return self._ask_for_tasks()

    def leave(self) -> list[Effect]:
        """The job was revoked: nobody wants anything of it."""
        self.prepared = False
        self._waiting.clear()
        self._open.clear()
        self._inputs.clear()
        self._reports.clear()
        self._unsent.clear()
        return self._end_unwanted()

    def skip(self, message: coordination.AbsentShards) -> list[Effect]:
        """Of no meaning here."""
        return []

    def open_failures(self) -> list[Effect]:
        """Failures are told to the owner of the tasks."""
        return []

    # The stream

    def held(self) -> list[task_service_pb2.TaskAttempt]:
        """What a hello names: all that was not settled."""
        held = dict(self._open)
        held.update((attempt, report.task) for attempt, report in self._reports.items())
        return [
            task_service_pb2.TaskAttempt(task=task, attempt=attempt)
            for attempt, task in held.items()
        ]

    def stream_opened(self) -> list[Effect]:
        """The owner has heard what is held: tell it again what came of it."""
        self._unsent = deque(self._reports)
        return self._wake()

    def told(self, message: task_service_pb2.WorkResponse) -> list[Effect]:
        """The owner hands tasks out and settles attempts."""
        for attempt in message.settled:
            self._reports.pop(attempt, None)
            self._open.pop(attempt, None)
            self._inputs.pop(attempt, None)
        for number, inputs in enumerate(message.inputs, message.first_attempt):
            self._inputs[number] = tuple((each.digest, each.size_bytes) for each in inputs.values)
        for number, task in enumerate(message.tasks, message.first_attempt):
            self._open[number] = task
            self._waiting.append((task, number))
        if len(self._waiting) > 2 * len(self._open):
            # Others were quicker with most of what waits here; a call that hangs may hold it up.
            self._waiting = deque(each for each in self._waiting if each[1] in self._open)
        return [*self._end_unwanted(), *self._start()]

    def next_reports(self) -> task_service_pb2.TaskReports | None:
        """What came of attempts and was not told on this stream; None: nothing."""
        message, size = task_service_pb2.TaskReports(), 0
        while self._unsent and len(message.reports) < REPORTS_PER_MESSAGE and size < REPORTS_BYTES:
            report = self._reports.get(self._unsent.popleft())
            if report is not None:
                message.reports.append(report)
                size += len(report.value_json)
        return message if message.reports else None

    # Leaf processes

    def owns(self, task: Task) -> bool:
        """Whether this is the hosting that gave the batch out."""
        batch = self._batches.get(task.id)
        return batch is not None and batch[0] is task

    def call_done(self, task: Task, index: int, seconds: float) -> tuple[int, int]:
        """A call of a batch returned: return task and attempt, to be reported with its value."""
        part = task.parts[index]
        part.state = PartState.DONE
        if self._mean_s is None:
            self._mean_s = seconds
        self._mean_s += _WEIGHT * (seconds - self._mean_s)
        self._losses.pop(part.node.first, None)
        return part.node.first, self._batches[task.id][1][index]

    def report(self, number: int, attempt: int, **outcome: Any) -> list[Effect]:
        """Say what came of an attempt, unless nobody wants to know any more."""
        if self._open.pop(attempt, None) is None:
            return []
        self._inputs.pop(attempt, None)
        report = task_service_pb2.TaskReport(task=number, attempt=attempt, **outcome)
        self._reports[attempt] = report
        self._unsent.append(attempt)
        return self._wake()

    def part_failed(self, task: Task, part: Part, failure: LeafFailure) -> list[Effect]:
        """A call raised, or its process died of it."""
        part.state = PartState.FAILED
        told = Failure(
            code=failure.reason or LeafFailed.Kind.Name(failure.kind).removeprefix("KIND_"),
            message=failure.message,
            traceback=failure.traceback,
        )
        attempt = self._batches[task.id][1][task.parts.index(part)]
        return self.report(part.node.first, attempt, seconds=failure.seconds, failure=told)

    def task_ended(self, task: Task, lost: bool = False) -> list[Effect]:
        """A leaf process is through with a batch, or died over it: the rest of it waits again."""
        _, attempts = self._batches.pop(task.id)
        effects: list[Effect] = []
        again: list[tuple[int, int]] = []
        for part, attempt in zip(task.parts, attempts, strict=True):
            number = part.node.first
            if part.state is not PartState.RUNNING or attempt not in self._open:
                continue
            if lost and not task.unheard and self._blame_without_call(number):
                message = "the leaf process dies again and again before it runs the call"
                failure = Failure(code="CRASHED", message=message)
                effects += self.report(number, attempt, failure=failure)
            else:
                again.append((number, attempt))
        self._waiting.extendleft(reversed(again))
        return [*effects, *self._start()]

    # Inside

    def _start(self) -> list[Effect]:
        """Give batches to slots that have none of this job."""
        if not self.prepared:
            return []
        busy = {task.slot for task, _ in self._batches.values()}
        for slot in range(self.slots):
            if slot not in busy and len(self._batches) < self.slots:
                self._submit(slot)
        return []

    def _submit(self, slot: int) -> None:
        limit = min(self._batch_size(), -(-len(self._waiting) // self.slots))
        batch: list[tuple[int, int]] = []
        while self._waiting and len(batch) < limit:
            # What the next such death will be blamed on runs alone: one call that no process gets
            # to run would have all that are with it blamed.
            losses = self._losses.get(self._waiting[0][0], 0)
            alone = losses == LOSSES_WITHOUT_BLAME_MAX - 1
            if alone and batch:
                break
            task, attempt = self._waiting.popleft()
            if attempt in self._open:
                batch.append((task, attempt))
                if alone:
                    break
        if not batch:
            return
        go = training_pb2.GoRecord(term=self.term, version=NO_STEP)
        order = Task(
            id=self._new_task_id(),
            job_id=self.job_id,
            term=self.term,
            round=Round(go, self.plan.total_steps, self.slots),
            parts=[Part(Node(task, 1), slot) for task, _ in batch],
            slot=slot,
            inputs=tuple(self._inputs.get(attempt, ()) for _, attempt in batch)
            if self._inputs
            else (),
        )
        self._batches[order.id] = (order, [attempt for _, attempt in batch])
        self._dispatcher.submit(order)

    def _batch_size(self) -> int:
        if self._mean_s is None:
            return 1
        if self._mean_s * BATCH_MAX <= BATCH_S:
            return BATCH_MAX
        return max(1, math.floor(BATCH_S / self._mean_s))

    def _end_unwanted(self) -> list[Effect]:
        """End batches of which nothing is wanted any more."""
        effects: list[Effect] = []
        for task, attempts in list(self._batches.values()):
            if task.cancelled or any(attempt in self._open for attempt in attempts):
                continue
            if self._dispatcher.withdraw(task):
                del self._batches[task.id]
            else:
                task.cancelled = True
                effects.append(Cancel(task))
        return effects

    def _blame_without_call(self, number: int) -> bool:
        losses = self._losses.get(number, 0) + 1
        self._losses[number] = losses
        return losses >= LOSSES_WITHOUT_BLAME_MAX

    def _wake(self) -> list[Effect]:
        return [Wake(self.job_id, self._owner)]

    def _ask_for_tasks(self) -> list[Effect]:
        """Open the stream of this term, and tell control that the job is hosted."""
        ready = coordination.WorkerJobReady(job_id=self.job_id, term=self.term)
        return [
            OpenStreams(self.job_id, self.term, ((self._owner, self._address),)),
            Report(coordination.SessionRequest(worker_job_ready=ready)),
        ]
