"""Tasks that need the results of others: which of them have all, and what these are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from phalanx.v1.task_service_pb2 import StoredValue, TaskResult


class Needs:
    """What `needs[task]` are the tasks whose results a task gets, all with smaller numbers.

    Results are kept of tasks that others need, and of the last one: it is the outcome of the job.
    """

    def __init__(self, needs: Sequence[Sequence[int]] = ()) -> None:
        self._needs = needs
        self._missing = [len(set(each)) for each in needs]
        self._users: dict[int, list[int]] = {}
        for task, each in enumerate(needs):
            for needed in set(each):
                self._users.setdefault(needed, []).append(task)
        self._values: dict[int, StoredValue] = {}

    @property
    def outcome(self) -> StoredValue | None:
        """The result of the last task, once it is durable."""
        return self._values.get(len(self._needs) - 1)

    def blocked(self, task: int) -> bool:
        """Whether a task needs what is not there yet."""
        return bool(self._missing) and self._missing[task] > 0

    def done(self, result: TaskResult) -> list[int]:
        """A result is durable; return the tasks that have all they need with it."""
        task = result.task
        users = self._users.get(task, [])
        if users or task == len(self._needs) - 1:
            self._values[task] = result.stored
        ready = []
        for user in users:
            self._missing[user] -= 1
            if not self._missing[user]:
                ready.append(user)
        return ready

    def inputs(self, tasks: Iterable[int]) -> tuple[tuple[StoredValue, ...], ...]:
        """What each of some tasks gets, in the order in which its program asks for it; nothing at
        all where no task needs anything."""
        if not self._users:
            return ()
        return tuple(tuple(self._values[each] for each in self._needs[task]) for task in tasks)
