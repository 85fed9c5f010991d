"""Tasks that need the results of others: which of them have all, and what these are."""

from __future__ import annotations

from collections.abc import Iterable

from phalanx.programs.base import Graph
from phalanx.v1.task_service_pb2 import StoredValue, TaskResult


class Needs:
    """What the tasks of a graph get of each other.

    Results are kept of tasks that others need, and of the last one: it is the outcome of the job.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._missing = [len(set(each)) for each in graph.needs]
        self._users: dict[int, list[int]] = {}
        for task, each in enumerate(graph.needs):
            for needed in set(each):
                self._users.setdefault(needed, []).append(task)
        self._values: dict[int, StoredValue] = {}
        self._kept: dict[int, StoredValue] = {}
        #: What tasks may go on from, of those of which it is known.
        self._earlier: dict[int, StoredValue] = {}

    @property
    def outcome(self) -> StoredValue | None:
        """The result of the last task, once it is durable."""
        return self._values.get(self._graph.count - 1)

    def blocked(self, task: int) -> bool:
        """Whether a task needs what is not there yet."""
        return bool(self._missing) and self._missing[task] > 0

    def done(self, result: TaskResult) -> tuple[list[int], list[int]]:
        """A result is durable; return the tasks that have all they need with it, and those that
        are passed over because of it."""
        ready: list[int] = []
        passed: list[int] = []
        self._take_beside(result)
        known = [(result.task, result.stored)]
        while known:
            task, value = known.pop()
            users = self._users.get(task, [])
            if users or task == self._graph.count - 1:
                self._values[task] = value
            for user in users:
                self._missing[user] -= 1
                if self._missing[user]:
                    continue
                empty = self._graph.passed(user, self._values)
                if empty is None:
                    ready.append(user)
                else:
                    passed.append(user)
                    known.append((user, empty))
        return ready, passed

    def inputs(self, tasks: Iterable[int]) -> tuple[tuple[StoredValue, ...], ...]:
        """What each of some tasks gets, in the order in which its program asks for it, then what it
        may go on from, if there is something; nothing at all where no task needs anything."""
        if not self._users:
            return ()
        needs = self._graph.needs
        return tuple(
            tuple(self._values[each] for each in needs[task])
            + ((self._earlier[task],) if task in self._earlier else ())
            for task in tasks
        )

    def _take_beside(self, result: TaskResult) -> None:
        if result.HasField("kept"):
            kept = result.kept
            self._kept[result.task] = StoredValue(
                digest=kept.sha256.hex(), size_bytes=kept.size_bytes
            )
        for user, earlier in zip(self._users.get(result.task, ()), result.earlier, strict=False):
            if earlier in self._kept:
                self._earlier[user] = self._kept[earlier]
