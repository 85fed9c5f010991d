"""The calls of sets of tasks in a simulated leaf process, beside the leaves of jobs that train.

A task of a program first asks its worker for the results of others, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phalanx.tasks import is_program, runs_tasks
from phalanx.testing.simulation.loop import SimulationFailed
from phalanx.v1 import coordination_service_pb2, training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.simulation import programs, task_sets
from tests.simulation.hosts import Leaf
from worker import ipc
from worker.ipc import Kind

LeafFailed = coordination_service_pb2.LeafFailed
Input = tuple[str, int]
_GONE = b"gone"
"""What is read of something that a task does without."""


@dataclass(frozen=True)
class _Set:
    """What a leaf process knows of a set of tasks."""

    job_id: str
    spec: JobSpec
    arguments: list[Mapping[str, Any]]


class CallingLeaf(Leaf):
    """A leaf process that runs calls, too."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._calls = self._machines.calls
        self._sets: dict[int, _Set] = {}
        self._running: tuple[str, int] | None = None
        """Job and task of the call that runs."""
        self._awaited: tuple[str, Callable[[dict[str, Any]], None]] | None = None
        """What was asked for, and what to do with the answer."""

    def send(self, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        if kind is Kind.FETCHED:
            self._loop.call_later(0.0002, self._fetched, ipc.unpack_json(body)[0])
        else:
            super().send(kind, body, fds)

    def hung(self) -> None:
        if self._running is not None and not self._dead:
            self._calls.fails(*self._running, self._worker)
        super().hung()

    def end_orphaned(self) -> None:
        if self._running is not None and not self._dead and self._process.alive:
            self._calls.ends_with_server(*self._running, self._worker)
        super().end_orphaned()

    def _obey(self, kind: Kind, body: bytes, fds: tuple[int, ...]) -> None:
        if kind is Kind.SETUP or kind is Kind.DESCRIBE:
            document, plan_bytes = ipc.unpack_json(body)
            plan = training_pb2.JobPlan.FromString(plan_bytes)
            spec = JobSpec.FromString(plan.spec)
            if runs_tasks(spec):
                self._load(kind, document["job"], plan, spec)
                return
        elif kind is Kind.DROP:
            self._sets.pop(ipc.unpack_json(body)[0]["job"], None)
        super()._obey(kind, body, fds)

    def _load(self, kind: Kind, job: int, plan: training_pb2.JobPlan, spec: JobSpec) -> None:
        """Load the function of a set of tasks, to know it or to run it."""
        self._machines.demand_wanted(spec, self._worker)
        broken = self._worker in self._calls.unloadable
        if kind is Kind.DESCRIBE:
            described = coordination_service_pb2.JobDescribed(job_id=plan.job_id)
            described.layout.element_count = len(task_sets.arguments_of(spec))
            reply = ipc.pack_json({"job": job}, described.SerializeToString())
            self._say(Kind.DESCRIBED, reply)
            return
        if not broken:
            self._sets[job] = _Set(plan.job_id, spec, task_sets.arguments_of(spec))
        error = "it cannot be loaded" if broken else ""
        answer = {"job": job, "error": error, "traceback": "", "device": ""}
        self._say(Kind.SETUP_DONE, ipc.pack_json(answer))

    def _begin(self, order: ipc.RunOrder) -> None:
        if order.job in self._sets:
            self.page.task, self.page.step = order.task, order.version
            self._call(order, 0)
        else:
            super()._begin(order)

    def _call(self, order: ipc.RunOrder, index: int) -> None:
        """Run one call after another, then say that the batch has ended."""
        if self._dead:
            return
        if index == len(order.parts) or self.page.cancelled_task == order.task:
            self._over(order)
            return
        known, task = self._sets[order.job], order.parts[index][0]
        job_id, arguments, machines = known.job_id, known.arguments[task], self._machines
        how = self._calls.how(job_id, task, arguments)
        if how == "stillborn":  # the process ends before it says that it begins
            self._die(job_id, task)
            return
        self.page.shard = task
        self._running = job_id, task
        self._calls.begun += 1
        if how == "endless" or (self._worker in machines.hung and not is_program(known.spec)):
            return  # until it is killed
        inputs = order.inputs[index] if order.inputs else ()
        self._read(order, inputs, [], lambda read: self._run(order, index, how, read))

    def _run(self, order: ipc.RunOrder, index: int, how: str, read: list[bytes]) -> None:
        """Run a call that has all that it reads."""
        known, task = self._sets[order.job], order.parts[index][0]
        job_id, arguments, machines = known.job_id, known.arguments[task], self._machines
        seconds = task_sets.seconds_of(arguments, machines.leaf_s(self._worker))
        if is_program(known.spec) and self._worker in machines.hung:
            machines.hung.discard(self._worker)  # a task may take a day before it is killed
            seconds += task_sets.LASTS_S

        def ends() -> None:
            if self._dead:
                return
            if how == "crashes":
                self._die(job_id, task)
                return
            self.page.shard = -1
            self._running = None
            if how or self._worker in machines.bad:
                machines.bad.discard(self._worker)
                self._calls.fails(job_id, task, self._worker)
                self._call_failed(order, index, task, seconds)
            else:
                self.page.leaves += 1
                value = task_sets.returned(known.spec, task, self._went_on(known, task, read))
                kept = programs.kept_by(known.spec, task)
                earlier = programs.earlier_by(known.spec, task)
                body = ipc.pack_call(order.task, index, seconds, value, kept, earlier)
                self._say(Kind.CALL_DONE, body)
            self._call(order, index + 1)

        self._loop.call_later(seconds, ends)

    def _went_on(self, known: _Set, task: int, read: list[bytes]) -> list[bytes]:
        """Take what the task goes on from from what it has read; return the rest."""
        needs = len(programs.graph_of_spec(known.spec).needs[task]) if is_program(known.spec) else 0
        if len(read) <= needs:
            return read
        expected = programs.kept_by(known.spec, programs.goes_on_from(known.spec, task))
        if read[needs:] not in ([expected], [_GONE]):
            what = f"{self._worker}: task {task} goes on from what another task has kept"
            self._machines.world.fail(SimulationFailed(what))
        self._calls.went_on += read[needs] != _GONE
        return read[:needs]

    def _may_be_gone(self, order: ipc.RunOrder, at: int, digest: str) -> bool:
        """Whether nobody promised that a blob is there: what comes after all that a task needs."""
        known = self._sets[order.job]
        if not is_program(known.spec):
            return False
        needs = programs.graph_of_spec(known.spec).needs
        for place, (task, _, _) in enumerate(order.parts):
            given = order.inputs[place]
            if len(given) > len(needs[task]) == at and given[at][0] == digest:
                return True
        return False

    def _read(
        self,
        order: ipc.RunOrder,
        inputs: tuple[Input, ...],
        read: list[bytes],
        then: Callable[[list[bytes]], None],
    ) -> None:
        """Ask for one result of another task after another, as long as the batch is wanted."""
        if len(read) == len(inputs):
            then(read)
            return
        digest, size_bytes = inputs[len(read)]

        def fetched(answer: dict[str, Any]) -> None:
            # A worker may not have heard yet that the job is deleted.
            deleted = self._sets[order.job].job_id in self._calls.deleted
            if answer.get("cancelled") or (answer["error"] and deleted):
                self._running = None
                self._over(order)
                return
            if answer["error"] and self._may_be_gone(order, len(read), digest):
                self._read(order, inputs, [*read, _GONE], then)
                return
            if answer["error"]:
                what = f"{self._worker}: what a task reads is not there: {answer['error']}"
                self._machines.world.fail(SimulationFailed(what))
                return
            content = self._machines.files[self._worker, digest]
            self._read(order, inputs, [*read, content], then)

        self._awaited = digest, fetched
        asked = {"digest": digest, "size_bytes": size_bytes}
        self._say(Kind.FETCH, ipc.pack_json(asked))

    def _fetched(self, answer: dict[str, Any]) -> None:
        if self._dead or self._awaited is None or answer["digest"] != self._awaited[0]:
            return
        then, self._awaited = self._awaited[1], None
        then(answer)

    def _die(self, job_id: str, task: int) -> None:
        self._calls.fails(job_id, task, self._worker)
        self._dead = True
        self._loop.call_later(0.001, self._on_exit, self, 1)

    def _call_failed(self, order: ipc.RunOrder, index: int, task: int, seconds: float) -> None:
        failure = {
            "task": order.task,
            "index": index,
            "shard": task,
            "kind": int(LeafFailed.KIND_RAISED),
            "reason": "",
            "message": "ValueError",
            "traceback": "in the call",
            "rows": (0, 0),
            "seconds": seconds,
        }
        self._say(Kind.PART_FAILED, ipc.pack_json(failure))
