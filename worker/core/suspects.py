"""Leaves that ran when the leaf server died, and which of them it died of.

The leaf server runs no job's code, so its death is nobody's fault at first: a person or the kernel
may have killed it. But user code can kill its parent too. So tasks run one at a time until the
leaves that ran have passed; one over which the server dies again, alone, is the one.
"""

from __future__ import annotations

from worker.core.dispatch import Task

TASKS_ALONE_MAX = 16
"""Suspects may have been moved to other workers: after so many tasks that ended well the worker
goes on as usual."""


class Suspects:
    """The suspected leaves of a worker: (job, whether in an evaluation, shard)."""

    def __init__(self) -> None:
        self._leaves: set[tuple[str, bool, int]] = set()
        self._ended_well = 0

    def __bool__(self) -> bool:
        """Whether tasks must run one at a time."""
        return bool(self._leaves)

    def server_died(self, task: Task, shard: int) -> bool:
        """The leaf server died while this leaf of a task ran; return whether it died of it."""
        leaf = task.job_id, task.round.is_evaluation, shard
        if leaf in self._leaves:
            self._leaves.discard(leaf)
            return True
        self._leaves.add(leaf)
        self._ended_well = 0
        return False

    def ended_well(self, task: Task) -> None:
        """The leaf process of a task is through with it and lives."""
        self._ended_well += 1
        if self._ended_well >= TASKS_ALONE_MAX:
            self._leaves.clear()
        for part in task.parts:
            for shard in range(part.node.first, part.node.first + part.node.span):
                self._leaves.discard((task.job_id, task.round.is_evaluation, shard))
