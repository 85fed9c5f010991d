"""What a slot has for one set of code: its process, and what that is busy with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from worker.core.dispatch import Task
from worker.core.restarts import Restarts
from worker.session.process import LeafProcess
from worker.session.setup import PreparedJob


@dataclass(frozen=True)
class SetUpFailure:
    """Why a leaf process could not load a job."""

    message: str
    traceback: str


@dataclass(frozen=True)
class SettingUp:
    """A job that a process was told to load, and what comes of it."""

    job_id: str
    done: asyncio.Future[SetUpFailure | None]


@dataclass(eq=False)
class Place:
    """A slot's process for one set of code, alive or about to be started again."""

    slot: int
    code: str
    process: LeafProcess | None = None
    restarts: Restarts = field(default_factory=Restarts)
    lost_starts: int = 0
    task: Task | None = None
    job: PreparedJob | None = None
    describing: asyncio.Future[bytes] | None = None
    description: bytes = b""
    described_job: PreparedJob | None = None
    setting_up: dict[int, SettingUp] = field(default_factory=dict)
    fetching: int = 0
    #: What its processes have told of their GPU, by the number of the job that asked for one.
    devices: dict[int, str] = field(default_factory=dict)

    def ids(self) -> dict[str, object]:
        """What a line of the log names that by which its process is busy with."""
        if self.task is not None:
            ids: dict[str, object] = {"job_id": self.task.job_id}
            return ids if self.task.is_call else {**ids, "step": self.task.round.step}
        jobs = {each.job_id for each in self.setting_up.values()}
        if self.describing is not None and self.described_job is not None:
            jobs.add(self.described_job.plan.job_id)
        return {"job_id": jobs.pop()} if len(jobs) == 1 else {}
