"""Which slot computes what, over all jobs of the worker.

A task is what one slot computes of one round in one go. It waits at the slot that the division
chose; a slot that has nothing of its own takes over what waits at a busy or broken one. Where tasks
of several jobs wait, the job that had least of its share comes first (`shares`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from phalanx.v1 import training_pb2
from worker.core.rounds import Part, PartState, Round
from worker.core.shares import Shares


@dataclass(eq=False, slots=True)
class Task:
    """Parts of one round for one slot. `cancelled`: nobody wants the rest of it any more."""

    id: int
    job_id: str
    term: int
    round: Round
    parts: list[Part]
    slot: int
    #: Buffer of the parameters; -1 where the round needs none.
    parameters: int = -1
    absent: frozenset[int] = field(default_factory=frozenset)
    cancelled: bool = False
    #: Of calls of a program: for each part the results (digest, size) that it needs.
    inputs: tuple[tuple[tuple[str, int], ...], ...] = ()
    #: Whether its process died of the death of the one that starts them, and before it took the
    #: task in: which says nothing of its parts.
    unheard: bool = False

    @property
    def is_call(self) -> bool:
        """Whether its parts are calls of a set of tasks, of which no round decides."""
        return self.round.go.action == training_pb2.GoRecord.ACTION_UNSPECIFIED


class Dispatcher:
    """Queues of the slots; all of them start as not ready."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._queues: list[deque[Task]] = [deque() for _ in range(slots)]
        self._idle: set[int] = set()
        self.one_at_a_time = False
        self.running: dict[int, Task] = {}
        self.shares = Shares()
        #: The job that idle slots wait for, and how often they waited for one.
        self._awaited = ""
        self.waits = 0

    @property
    def waiting(self) -> bool:
        """Whether idle slots wait for a job that is behind."""
        return bool(self._awaited)

    def submit(self, task: Task) -> None:
        """Queue a task at its slot."""
        self._queues[task.slot].append(task)
        if task.job_id == self._awaited:
            self.shares.came(self._awaited)
            self._awaited = ""

    def wait_over(self) -> None:
        """Idle slots have waited long enough: `start` gives them what there is."""
        self.shares.stayed_away(self._awaited)
        self._awaited = ""

    def withdraw(self, task: Task) -> bool:
        """Take a task back; False: it runs already (or has ended)."""
        for queue in self._queues:
            if task in queue:
                queue.remove(task)
                return True
        return False

    def slot_idle(self, slot: int) -> None:
        """The leaf process of a slot waits for work."""
        self.running.pop(slot, None)
        self._idle.add(slot)

    def slot_lost(self, slot: int) -> Task | None:
        """The leaf process of a slot is gone; return what it was running."""
        self._idle.discard(slot)
        return self.running.pop(slot, None)

    def start(self) -> list[Task]:
        """Give waiting tasks to idle slots; `task.slot` is then the slot that runs it."""
        if not self._idle or not any(self._queues):
            return []
        room = 1 - len(self.running) if self.one_at_a_time else self.slots
        started: list[Task] = []
        for slot in sorted(self._idle):
            if len(started) >= room:
                break
            queue = self._queues[slot]
            if not queue:
                queue = max(self._queues, key=len)
            task = self._take(queue)
            if task is None:
                break
            started.append(task)
            started[-1].slot = slot
            self.running[slot] = started[-1]
            for part in started[-1].parts:
                part.state = PartState.RUNNING
        self._idle.difference_update(task.slot for task in started)
        return started

    def _take(self, queue: deque[Task]) -> Task | None:
        """Take the task whose turn it is; None: there is none, or its job has to wait."""
        if not queue or self._awaited:
            return None
        job_id = self.shares.first(task.job_id for task in queue)
        there = {task.job_id for each in self._queues for task in each}
        self._awaited = self.shares.worth_waiting(job_id, there)
        if self._awaited:
            self.waits += 1
            return None
        task = next(task for task in queue if task.job_id == job_id)
        queue.remove(task)
        return task
