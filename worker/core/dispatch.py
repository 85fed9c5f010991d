"""Which slot computes what, over all jobs of the worker.

A task is what one slot computes of one round in one go. It waits at the slot that the division
chose; a slot that has nothing of its own takes over what waits at a busy or broken one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from worker.core.rounds import Part, PartState, Round


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


class Dispatcher:
    """Queues of the slots; all of them start as not ready."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._queues: list[deque[Task]] = [deque() for _ in range(slots)]
        self._idle: set[int] = set()
        self.one_at_a_time = False
        self.running: dict[int, Task] = {}

    def submit(self, task: Task) -> None:
        """Queue a task at its slot."""
        self._queues[task.slot].append(task)

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
            if not queue:
                break
            started.append(queue.popleft())
            started[-1].slot = slot
            self.running[slot] = started[-1]
            for part in started[-1].parts:
                part.state = PartState.RUNNING
        self._idle.difference_update(task.slot for task in started)
        return started
