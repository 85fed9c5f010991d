"""A user of the simulated cluster with sets of independent tasks: reads results, now and then
mends a set that has failed and tries it again, and forgets those that have ended."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence

import grpc
import grpc.aio

from coordinator.aggregation.core.dispatch.dispatcher import TERM_SHIFT
from phalanx.errors import (
    DeadlineExceeded,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from phalanx.rpc.channel import call_with_retry, open_channel
from phalanx.rpc.status import from_rpc_error
from phalanx.tasks import kept_holder
from phalanx.testing.simulation.loop import SimulationFailed
from phalanx.v1 import job_service_pb2 as pb
from phalanx.v1 import job_service_pb2_grpc, storage_service_pb2, storage_service_pb2_grpc
from phalanx.v1.task_service_pb2 import TaskResult
from tests.simulation import jobs, programs
from tests.simulation.task_sets import NAMESPACE, AnySet, Calls, job_spec
from tests.simulation.tasking import Journalled
from tests.simulation.user import ATTEMPT_S, POLL_S, Job, User, put_data

FORGOTTEN = 0.5
LOOKS_MAX = 100
"""How often she looks whether storage has forgotten what she deleted."""
FAILS = ("POISON_TASK", "JOB_NOT_PREPARED")


class TaskUser(User):
    """Runs in a process of her own; `ended` once all her sets are."""

    def __init__(
        self,
        controls: tuple[str, ...],
        storage: str,
        sets: Sequence[AnySet],
        chance: random.Random,
        calls: Calls,
        journals: Mapping[str, Journalled],
    ) -> None:
        """`calls` is what machines did, `journals` what is recorded of it."""
        super().__init__(controls, storage, [], chance)
        self.waits_s = [0.0] * len(sets)
        self.sets = sets
        self.results = 0
        """Tasks that she was told are done."""
        self.given_up = 0
        self.retries = 0
        self.passed = 0
        """Tasks of programs that ended without them."""
        self._calls = calls
        self._unloadable = frozenset(calls.unloadable)
        self._journals = journals
        self._read: dict[str, dict[int, TaskResult]] = {}

    async def _run(self) -> None:
        self._stubs = [
            job_service_pb2_grpc.JobServiceStub(open_channel(each)) for each in self._controls
        ]
        if any(isinstance(each, programs.ProgramSet) for each in self.sets):
            await put_data(self._storage, self._chance, NAMESPACE)
        for number, each in enumerate(self.sets):
            await asyncio.sleep(self.waits_s[number])
            spec = job_spec(each, f"tasks-{number}", jobs.DATASET)
            request = pb.SubmitJobRequest(spec=spec, request_id=f"submit-tasks-{number}")
            answer = await self._insist_twice(lambda stub: stub.SubmitJob, request)
            self.ids.append(answer.job.id)
        changes = [asyncio.create_task(self._change(*each)) for each in self._plan]
        while not self._all_ended():
            await asyncio.sleep(POLL_S)
            for number, job_id in enumerate(self.ids):
                await self._look(job_id)
                await self._look_at_results(job_id)
                if self.last[job_id].state == Job.STATE_FAILED:
                    await self._mend(number, job_id)
        for change in (*changes, *self._resuming):
            change.cancel()
        for number, job_id in enumerate(self.ids):
            await self._judge(number, job_id)
            if self._chance.random() < FORGOTTEN:
                await self._forget(job_id)
        listed = await self._whole_list(NAMESPACE)
        if {job.id for job in listed.jobs} != {*self.ids} - self._calls.deleted:
            raise SimulationFailed(
                f"{self.ids} without {self._calls.deleted} are there as {listed}"
            )
        self.ended = True
        self.on_end()

    # While they run

    async def _look(self, job_id: str) -> None:
        await super()._look(job_id)
        step = self.last[job_id].progress.step
        known = self._journals.get(job_id)
        most = known.most if known is not None else 0
        if step > most:
            raise SimulationFailed(f"{job_id}: {step} tasks are told, {most} are in the journal")

    async def _look_at_results(self, job_id: str) -> None:
        """What she has read once stays, but for what was given up; and it is in the journal."""
        wanted = range(self._chance.choice([0, 0, 3]))
        read, known = await self._results(job_id, wanted), self._read.setdefault(job_id, {})
        for task, result in read.items():
            before = known.get(task, result)
            if before != result and not before.HasField("failure"):
                raise SimulationFailed(f"{job_id}: task {task} was {before}, and is {result}")
        if not wanted:
            gone = known.keys() - read.keys()
            if any(not known[task].HasField("failure") for task in gone):
                raise SimulationFailed(f"{job_id}: results of {sorted(gone)} are gone")
            known.clear()
        known.update(read)

    async def _results(self, job_id: str, wanted: Sequence[int] = ()) -> dict[int, TaskResult]:
        """Read results, each of which must be in the journal."""
        request = pb.ReadTaskResultsRequest(job_id=job_id, tasks=wanted)
        read: dict[int, TaskResult] = {}
        while True:
            stub = self._stubs[self._turn % len(self._stubs)]
            read.clear()
            try:
                async for response in stub.ReadTaskResults(request, timeout=ATTEMPT_S):
                    for each in response.results:
                        self._take(job_id, each, wanted, read)
                return read
            except grpc.aio.AioRpcError as raised:
                error = from_rpc_error(raised)
                if not isinstance(error, Unavailable | DeadlineExceeded | ResourceExhausted):
                    raise error from None
                self._turn += 1
            await asyncio.sleep(0.1)

    def _take(
        self, job_id: str, result: TaskResult, wanted: Sequence[int], read: dict[int, TaskResult]
    ) -> None:
        task, known = result.task, self._journals[job_id]
        if task in read or (wanted and task not in wanted):
            raise SimulationFailed(f"{job_id}: task {task} is told twice, or unasked")
        # What was given up may be tried anew meanwhile.
        if known.results.get(task) != result and not result.HasField("failure"):
            raise SimulationFailed(f"{job_id}: {result} is told, and is not in the journal")
        read[task] = result

    async def _mend(self, number: int, job_id: str) -> None:
        """A set that failed as it must goes on once it was mended, with what has no result."""
        job, each, known = self.last[job_id], self.sets[number], self._journals[job_id]
        told = f"{job_id} failed: {job.reason}: {job.message}"
        if job.reason not in FAILS or job_id in self._calls.mended:
            raise SimulationFailed(told)
        if job.reason == "POISON_TASK":
            most = each.failures_max
            if most is None or known.given_up <= most or job.failures[0].task not in known.results:
                raise SimulationFailed(f"{told}, with {known.given_up} tasks given up")
        elif not {*job.failures[0].worker_ids} <= self._unloadable:
            raise SimulationFailed(told)
        self._calls.mended.add(job_id)
        self._calls.unloadable.clear()
        request = pb.RetryJobRequest(job_id=job_id, request_id=f"retry-{job_id}")
        await self._insist_twice(lambda stub: stub.RetryJob, request)
        self.retries += 1
        del self.last[job_id]

    # Afterwards

    async def _judge(self, number: int, job_id: str) -> None:
        job, each, known = self.last[job_id], self.sets[number], self._journals.get(job_id)
        told = f"{job_id} ended as {Job.State.Name(job.state)}: {job.reason}: {job.message}"
        if job.state == Job.STATE_CANCELLED and job_id in self.cancels:
            return
        if job.state != Job.STATE_SUCCEEDED or job_id in self.cancelled or known is None:
            raise SimulationFailed(told)
        read = await self._results(job_id)
        given_up = {task for task, result in read.items() if result.HasField("failure")}
        numbers = job.result.steps, job.result.metrics["tasks/given_up"]
        run = len(each.calls) - len(known.passed)
        self.passed += len(known.passed)
        if len(read) != run or numbers != (len(each.calls), len(given_up)):
            raise SimulationFailed(f"{told}, with {len(read)} results and as {job.result}")
        if job_id not in self._calls.mended and not each.poison - known.passed.keys() <= given_up:
            raise SimulationFailed(f"{job_id}: of {each.poison} only {given_up} are given up")
        self.results += len(read) - len(given_up)
        self.given_up += len(given_up)
        for task, result in read.items():
            if result.HasField("stored"):
                value = await self._blob(result.stored.digest)
                if value != known.values[task]:
                    raise SimulationFailed(f"{job_id}: task {task} has another value")
        wrong = programs.wrong_with(known.spec, job.result) if known.needs else ""
        if wrong:
            raise SimulationFailed(f"{job_id} {wrong}")
        # What an owner pinned that was replaced, and died over it, goes with the next garbage.
        first = kept_holder(job_id, "")
        await self._lets_go(
            lambda each: (
                each.startswith(first) and int(each.removeprefix(first)) >> TERM_SHIFT == known.term
            ),
            f"{job_id} has ended, and its tasks keep something for others",
        )

    async def _blob(self, digest: str) -> bytes:
        stub = storage_service_pb2_grpc.StorageServiceStub(open_channel(self._storage))
        request = storage_service_pb2.GetBlobRequest(digest=digest)
        while True:
            try:
                answers = stub.GetBlob(request, timeout=ATTEMPT_S)
                content = b"".join([each.chunk async for each in answers])
            except grpc.aio.AioRpcError as raised:
                error = from_rpc_error(raised)
                if not isinstance(error, Unavailable | DeadlineExceeded):
                    raise error from None
                await asyncio.sleep(0.1)
            else:
                if hashlib.sha256(content).hexdigest() != digest:
                    raise SimulationFailed(f"blob {digest} is damaged")
                return content

    async def _lets_go(self, mine: Callable[[str], bool], told: str) -> None:
        """Wait until none of these holders pins anything."""
        stub = storage_service_pb2_grpc.StorageServiceStub(open_channel(self._storage))
        listing = storage_service_pb2.ListPinsRequest()
        for _ in range(LOOKS_MAX):
            try:
                listed = await call_with_retry(stub.ListPins, listing, timeout_s=ATTEMPT_S)
                if not any(mine(each) for each in listed.holders):
                    return
            except (Unavailable, DeadlineExceeded):
                pass
            await asyncio.sleep(POLL_S)
        raise SimulationFailed(told)

    async def _forget(self, job_id: str) -> None:
        """Delete a set: what its results needed is let go of."""
        request = pb.DeleteJobRequest(job_id=job_id, request_id=f"delete-{job_id}")
        await self._insist(lambda stub: stub.DeleteJob, request)
        self._calls.deleted.add(job_id)
        await self._lets_go(
            lambda each: each.startswith(f"{job_id}/"),
            f"{job_id} is deleted, and still holds blobs",
        )
        read = pb.GetJobRequest(job_id=job_id)
        try:
            await self._insist(lambda stub: stub.GetJob, read)
        except NotFound:
            return
        raise SimulationFailed(f"{job_id} is deleted, and there")
