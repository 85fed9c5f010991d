"""What the worker decides about its membership: generations, which jobs it hosts, drain.

Also the one place where effects are completed: whatever happened, idle slots get waiting tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from phalanx.reduction import Node
from phalanx.specs.parts import all_reduces
from phalanx.tasks import runs_tasks
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.core.all_reduce.job import AllReduceJob
from worker.core.calls import TaskSetCore
from worker.core.dispatch import Dispatcher, Task
from worker.core.effects import (
    Discard,
    Drained,
    Effect,
    Prepare,
    RefuseSession,
    Report,
    Run,
    WaitForJob,
)
from worker.core.job import JobCore
from worker.core.shares import USUAL_PRIORITY
from worker.core.stateful import make_job
from worker.core.suspects import Suspects


class WorkerCore:
    """All decisions of one worker with `slots` leaf processes."""

    def __init__(self, slots: int, worker_id: str = "") -> None:
        self._worker_id = worker_id
        self.dispatcher = Dispatcher(slots)
        self._suspects = Suspects()
        self.jobs: dict[str, JobCore | TaskSetCore] = {}
        self.generation = 0
        self.draining = False
        self._task_ids = itertools.count(1)

    def message(self, message: coordination.SessionResponse) -> list[Effect]:
        """Control said something."""
        if message.generation < self.generation:
            return [RefuseSession(message.generation, self.generation)]
        self.generation = message.generation
        match message.WhichOneof("message"):
            case "describe_job":
                return [Prepare(message.describe_job.plan, describe=True)]
            case "assign_job":
                return self.settle(self._assign(message.assign_job))
            case "revoke_job":
                return self.settle(self._revoke(message.revoke_job))
            case "absent_shards":
                job = self.jobs.get(message.absent_shards.job_id)
                return self.settle(job.skip(message.absent_shards) if job is not None else [])
            case "job_command":
                self._command(message.job_command)
            case "drain":
                return self.drain()
        return []

    def drain(self) -> list[Effect]:
        """Leave in good order: control is asked to move everything away."""
        if self.draining:
            return []
        self.draining = True
        return [self.drain_request(), *self._drained()]

    def drain_request(self) -> Report:
        """The wish to be drained; said again on every new session."""
        request = coordination.DrainRequested()
        return Report(coordination.SessionRequest(drain_requested=request))

    def let_all_go(self) -> list[Effect]:
        """Let every job go: storage knows nothing of what is held here."""
        gone = [
            coordination.RevokeJob(job_id=job.job_id, term=job.term) for job in self.jobs.values()
        ]
        return self.settle([effect for each in gone for effect in self._revoke(each)])

    def held_jobs(self) -> list[coordination.HeldWorkerJob]:
        """What the hello says of the jobs that are hosted."""
        return [
            coordination.HeldWorkerJob(
                job_id=job.job_id,
                term=job.term,
                placement=job.placement,
                train_nodes=_messages(job.train_nodes),
                evaluation_nodes=_messages(job.evaluation_nodes),
                ready=job.prepared,
                leaf_sha256=job.leaf_sha256,
                given=job.assigned if job.assigned.seal else None,
            )
            for job in self.jobs.values()
        ]

    def settle(self, effects: list[Effect]) -> list[Effect]:
        """Add what follows for the slots: call it on the effects of every event of a job."""
        waits = self.dispatcher.waits
        started = [Run(task) for task in self.dispatcher.start()]
        if self.dispatcher.waits > waits:
            return [*effects, *started, WaitForJob(self.dispatcher.waits)]
        return [*effects, *started]

    def wait_over(self, number: int) -> list[Effect]:
        """The time of a `WaitForJob` is over, whatever happened meanwhile."""
        if not self.dispatcher.waiting or number != self.dispatcher.waits:
            return []
        self.dispatcher.wait_over()
        return self.settle([])

    def computed(self, job_id: str, seconds: float) -> None:
        """Leaves of a job took so long: its share of the slots."""
        self.dispatcher.shares.charge(job_id, seconds)

    def prepare_done(self, job_id: str, leaf_sha256: str = "") -> list[Effect]:
        """Everything that the job needs is here."""
        job = self.jobs.get(job_id)
        return self.settle(job.prepare_done(leaf_sha256)) if job is not None else []

    def slot_idle(self, slot: int) -> list[Effect]:
        """A leaf process is up, or through with a task."""
        self.dispatcher.slot_idle(slot)
        return self.settle([])

    def server_died(self, task: Task, shard: int) -> bool:
        """The process that starts leaf processes died while a leaf of a task ran; return whether
        that leaf is to blame. `task_ended` follows."""
        blamed = self._suspects.server_died(task, shard)
        self.dispatcher.one_at_a_time = bool(self._suspects)
        return blamed

    def task_ended(self, task: Task, lost: bool) -> list[Effect]:
        """The leaf process of a task is through with it, or dead (`lost`)."""
        if lost:
            self.dispatcher.slot_lost(task.slot)
        else:
            self.dispatcher.slot_idle(task.slot)
            self._suspects.ended_well(task)
            self.dispatcher.one_at_a_time = bool(self._suspects)
        job = self.jobs.get(task.job_id)
        known = job is not None and job.owns(task)
        return self.settle(job.task_ended(task, lost) if job is not None and known else [])

    def _assign(self, message: coordination.AssignJob) -> list[Effect]:
        job = self.jobs.get(message.plan.job_id)
        if job is not None:
            return job.assign(message)
        job = self._new_job(message.plan)
        self.jobs[job.job_id] = job
        self.dispatcher.shares.enrol(job.job_id, _priority(message.plan))
        return [Prepare(message.plan), *job.assign(message)]

    def _command(self, command: coordination.JobCommand) -> None:
        """Only the root of an all-reduce job takes commands."""
        job = self.jobs.get(command.job_id)
        pauses = command.kind == coordination.JobCommand.KIND_PAUSE
        if isinstance(job, AllReduceJob) and job.term == command.term and pauses:
            job.pause()

    def _new_job(self, plan: training_pb2.JobPlan) -> JobCore | TaskSetCore:
        def new_task_id() -> int:
            return next(self._task_ids)

        spec = job_spec_pb2.JobSpec.FromString(plan.spec)
        if runs_tasks(spec):
            return TaskSetCore(plan, self.dispatcher, new_task_id)
        if all_reduces(spec.train):
            return AllReduceJob(plan, self.dispatcher, new_task_id, self._worker_id)
        return make_job(plan, self.dispatcher, new_task_id)

    def _revoke(self, message: coordination.RevokeJob) -> list[Effect]:
        job = self.jobs.get(message.job_id)
        released = coordination.WorkerJobReleased(job_id=message.job_id, term=message.term)
        report = Report(coordination.SessionRequest(worker_job_released=released))
        if job is None:
            return [report]
        if message.term < job.term:
            return []
        del self.jobs[message.job_id]
        self.dispatcher.shares.dismiss(message.job_id)
        return [*job.leave(), Discard(message.job_id), report, *self._drained()]

    def _drained(self) -> list[Effect]:
        return [Drained()] if self.draining and not self.jobs else []


def _priority(plan: training_pb2.JobPlan) -> int:
    spec = job_spec_pb2.JobSpec.FromString(plan.spec)
    return spec.priority if spec.HasField("priority") else USUAL_PRIORITY


def _messages(nodes: Iterable[Node]) -> list[training_pb2.TreeNode]:
    return [training_pb2.TreeNode(first=node.first, span=node.span) for node in nodes]
