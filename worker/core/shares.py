"""How several jobs share the slots of a worker: each gets time in proportion to its weight.

Each job has a virtual time: the seconds that its leaves took, divided by its weight. Whoever is
least far comes first. That alone would not be fair: a job whose step is over has nothing to compute
until the next version is there, a few milliseconds later, and in that moment a job with long tasks
would take the slot, each time. So a slot waits for a moment for a job that is far behind, as long
as such waits are not in vain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

USUAL_PRIORITY = 50
"""A job of this priority is charged a second for a second."""

LEAD_S = 0.1
"""A job that is no further ahead of another has no need to wait for it."""

CREDIT_S, CREDIT_TASKS = 5.0, 8
"""What a job may lack at most, or so many of the longest tasks of others: it does not get back all
the time in which it wanted none."""

FADES = 0.99
"""How much of the longest task is remembered after each other one."""

VAIN_MAX = 64
"""For so many decisions at most nobody waits for a job that did not come in time; it doubles each
time."""


@dataclass
class _Share:
    weight: float
    virtual_s: float
    computes: bool = False
    """Whether it has computed here, and so will again."""
    vain: int = 0
    skip: int = 0


class Shares:
    """Virtual times of the jobs of one worker. No clock: time is what leaves took."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Share] = {}
        self._longest_s = 0.0

    def enrol(self, job_id: str, priority: int) -> None:
        """A job begins here, level with the one that is least far."""
        virtual_s = min((share.virtual_s for share in self._jobs.values()), default=0.0)
        self._jobs[job_id] = _Share(max(1, priority) / USUAL_PRIORITY, virtual_s)

    def dismiss(self, job_id: str) -> None:
        """A job ends here."""
        self._jobs.pop(job_id, None)

    def charge(self, job_id: str, seconds: float) -> None:
        """Leaves of a job took so long."""
        charged = self._jobs.get(job_id)
        if charged is None:
            return
        if not charged.computes:
            # What it took to prepare it is not time that it lacks.
            others = [each.virtual_s for each in self._jobs.values() if each.computes]
            charged.virtual_s = max(charged.virtual_s, min(others, default=0.0))
            charged.computes = True
        charged.virtual_s += seconds / charged.weight
        self._longest_s = max(seconds / charged.weight, FADES * self._longest_s)
        last_s = charged.virtual_s - max(CREDIT_S, CREDIT_TASKS * self._longest_s)
        for share in self._jobs.values():
            share.virtual_s = max(share.virtual_s, last_s)

    def first(self, job_ids: Iterable[str]) -> str:
        """Return which of these jobs comes first; among equals the first that is named."""
        return min(job_ids, key=self._virtual_s)

    def worth_waiting(self, job_id: str, waiting: Collection[str]) -> str:
        """Return a job that has no task here at the moment and is so far behind that this one
        should wait for it; empty: it should not wait."""
        limit_s = self._virtual_s(job_id) - LEAD_S
        behind = [
            (share.virtual_s, other)
            for other, share in self._jobs.items()
            if share.computes and share.virtual_s < limit_s and other not in waiting
        ]
        for _, other in sorted(behind):
            share = self._jobs[other]
            if share.skip == 0:
                return other
            share.skip -= 1
        return ""

    def came(self, job_id: str) -> None:
        """A job that was waited for has something to compute."""
        if job_id in self._jobs:
            self._jobs[job_id].vain = 0

    def stayed_away(self, job_id: str) -> None:
        """A job was waited for in vain."""
        share = self._jobs.get(job_id)
        if share is not None:
            share.vain = min(2 * share.vain or 1, VAIN_MAX)
            share.skip = share.vain

    def _virtual_s(self, job_id: str) -> float:
        share = self._jobs.get(job_id)
        return share.virtual_s if share is not None else 0.0
