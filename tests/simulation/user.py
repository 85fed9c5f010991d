"""A user of the simulated cluster: submits, watches, now and then changes her mind; never forgets
what she was told."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from phalanx.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.rpc.channel import call_with_retry, open_channel
from phalanx.testing.simulation.loop import SimulationFailed
from phalanx.v1 import (
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    storage_service_pb2,
    storage_service_pb2_grpc,
)
from tests.simulation import jobs
from tests.simulation.wishes import Wish

Job = job_pb2.Job
ENDED = (Job.STATE_SUCCEEDED, Job.STATE_FAILED, Job.STATE_CANCELLED)
POLL_S = 0.5
ATTEMPT_S = 5.0
REPEATED = 0.3


class User:
    """Runs in a process of its own; `ended` once all her jobs are."""

    def __init__(
        self,
        controls: tuple[str, ...],
        storage: str,
        shapes: list[jobs.Shape],
        chance: random.Random,
        wishes: Sequence[Wish] = (),
    ) -> None:
        self.shapes = shapes
        self._wishes = wishes
        self.ids: list[str] = []
        self.last: dict[str, Any] = {}
        self.cancels: set[str] = set()
        """Jobs that she asked to cancel, whether she was answered yet or not."""
        self.cancelled: set[str] = set()
        """Jobs whose cancellation was acknowledged."""
        self.pauses = 0
        self._refused: set[str] = set()
        """Jobs that she was told cannot pause. What is refused is not remembered: a copy of the
        call that is still under way may pause them later."""
        self._resuming: list[asyncio.Task[None]] = []
        self.repeats = 0
        """Calls that she made again although they had been answered."""
        self.old_answers = 0
        """Answers by a leader of a lower generation than another one's before."""
        self.incomplete = 0
        """Lists that said that jobs may be missing."""
        self.looks_at_lists = False
        """Whether she asks every control process for its jobs each time that she looks."""
        self.reasons: Counter[str] = Counter()
        """Why jobs were where they were, each time that she looked."""
        self.ended = False
        self.on_end: Callable[[], None] = lambda: None
        self._controls = controls
        self._storage = storage
        self._chance = chance
        self._turn = 0
        self._stubs: list[Any] = []
        self._plan: list[tuple[float, str, int]] = []
        self.waits_s = [0.0] * len(shapes)
        """How long she waits before she submits each job."""

    def will(self, after_s: float, act: str, index: int) -> None:
        """Plan to pause and resume, or to cancel, one of the jobs."""
        self._plan.append((after_s, act, index))

    async def run(self) -> None:
        try:
            await self._run()
        except PhalanxError as error:
            raise SimulationFailed(f"the user was told {error!r}") from error

    async def _run(self) -> None:
        self._stubs = [
            job_service_pb2_grpc.JobServiceStub(open_channel(each)) for each in self._controls
        ]
        await put_data(self._storage, self._chance)
        for number, shape in enumerate(self.shapes):
            await asyncio.sleep(self.waits_s[number])
            spec = jobs.job_spec(shape, f"{shape.bad or 'job'}-{number}-{shape.elements}")
            if self._wishes:
                self._wishes[number].write(spec)
            request = job_service_pb2.SubmitJobRequest(spec=spec, request_id=f"submit-{number}")
            answer = await self._insist_twice(lambda stub: stub.SubmitJob, request)
            self.ids.append(answer.job.id)
        changes = [asyncio.create_task(self._change(*each)) for each in self._plan]
        while not self._all_ended():
            await asyncio.sleep(POLL_S)
            for job_id in self.ids:
                await self._look(job_id)
            if self.looks_at_lists:
                await self._look_at_lists()
        for change in (*changes, *self._resuming):
            change.cancel()
        listed = await self._whole_list("default")
        if sorted(job.id for job in listed.jobs) != sorted(self.ids):
            raise SimulationFailed(
                f"{len(listed.jobs)} jobs are there, {len(self.ids)} were submitted, each under "
                "one request id"
            )
        self.ended = True
        self.on_end()

    # Inside

    def _all_ended(self) -> bool:
        return all(job_id in self.last and self.last[job_id].state in ENDED for job_id in self.ids)

    async def _look(self, job_id: str) -> None:
        request = job_service_pb2.GetJobRequest(job_id=job_id)
        try:
            answer = await self._insist(lambda stub: stub.GetJob, request)
        except NotFound:
            raise SimulationFailed(f"{job_id} was acknowledged and is not there") from None
        before = self.last.get(job_id)
        if before is not None and answer.job.generation < before.generation:
            # A leader that is cut off from storage does not know that it was replaced.
            self.old_answers += 1
            self._turn += 1
            return
        if before is not None and before.state in ENDED:
            same = (before.state, before.result.parameters_sha256)
            now = (answer.job.state, answer.job.result.parameters_sha256)
            if same != now:
                raise SimulationFailed(f"{job_id} had ended as {same} and is {now}")
        self.last[job_id] = answer.job
        if answer.job.state == Job.STATE_PAUSED and job_id in self._refused:
            self._refused.discard(job_id)
            self._resuming.append(asyncio.create_task(self._resume(job_id)))
        self.reasons[answer.job.reason] += 1
        most = answer.job.spec.resources.max_workers
        hosts = [each.worker_id for each in answer.job.progress.workers if each.shards]
        if 0 < most < len(hosts):
            raise SimulationFailed(f"{job_id} wants {most} workers at most and has {hosts}")

    async def _look_at_lists(self) -> None:
        """Whoever is asked: what looks whole has every job that was acknowledged before."""
        request = job_service_pb2.ListJobsRequest(namespace="default")
        for stub in self._stubs:
            known = set(self.ids)
            try:
                listed = await call_with_retry(
                    stub.ListJobs, request, timeout_s=ATTEMPT_S, attempts=1
                )
            except (Unavailable, DeadlineExceeded):
                continue
            missing = known - {job.id for job in listed.jobs}
            self.incomplete += bool(listed.incomplete)
            if missing and not listed.incomplete:
                raise SimulationFailed(
                    f"{sorted(missing)} are missing from a list that looks whole"
                )

    async def _whole_list(self, namespace: str) -> Any:
        """Ask for all jobs until somebody knows them all."""
        request = job_service_pb2.ListJobsRequest(namespace=namespace)
        while True:
            listed = await self._insist(lambda stub: stub.ListJobs, request)
            if not listed.incomplete:
                return listed
            self.incomplete += 1
            self._turn += 1
            await asyncio.sleep(0.1)

    async def _change(self, after_s: float, act: str, index: int) -> None:
        await asyncio.sleep(after_s)
        job_id = self.ids[index]
        try:
            if act == "cancel":
                self.cancels.add(job_id)
                cancel = job_service_pb2.CancelJobRequest(job_id=job_id, request_id=f"c-{job_id}")
                await self._insist_twice(lambda stub: stub.CancelJob, cancel)
                self.cancelled.add(job_id)
                return
            pause = job_service_pb2.PauseJobRequest(job_id=job_id, request_id=f"p-{job_id}")
            await self._insist_twice(lambda stub: stub.PauseJob, pause)
            self.pauses += 1
        except FailedPrecondition:
            if act == "pause":
                self._refused.add(job_id)
            return  # it had ended, or did not run yet
        await self._resume(job_id)

    async def _resume(self, job_id: str) -> None:
        resume = job_service_pb2.ResumeJobRequest(job_id=job_id, request_id=f"r-{job_id}")
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self._insist_twice(lambda stub: stub.ResumeJob, resume)
            except FailedPrecondition as error:
                if error.reason == "STILL_PAUSING":
                    continue
            return

    async def _insist_twice(self, method: Callable[[Any], Any], request: Any) -> Any:
        """Now and then she asks again, as one does whose answer was lost: it is the first one."""
        answer = await self._insist(method, request)
        if self._chance.random() < REPEATED:
            self.repeats += 1
            again = await self._insist(method, request)
            if again.job.id != answer.job.id:
                raise SimulationFailed(
                    f"{request.request_id} made {answer.job.id}, and {again.job.id} when repeated"
                )
        return answer

    async def _insist(self, method: Callable[[Any], Any], request: Any) -> Any:
        """Call whoever leads until somebody answers; the request id makes that harmless."""
        while True:
            stub = self._stubs[self._turn % len(self._stubs)]
            try:
                return await call_with_retry(method(stub), request, timeout_s=ATTEMPT_S, attempts=1)
            except (Unavailable, DeadlineExceeded, ResourceExhausted):
                self._turn += 1  # a full disk is a reason to try again, too
            await asyncio.sleep(0.1)


async def put_data(storage: str, chance: random.Random, namespace: str = "") -> None:
    """Put the data set that all jobs read into a namespace."""
    channel = open_channel(storage)
    blobs = storage_service_pb2_grpc.StorageServiceStub(channel)
    datasets = dataset_service_pb2_grpc.DatasetServiceStub(channel)
    await _until_done(chance, lambda: _put(blobs, jobs.CHUNK))
    put = await _until_done(chance, lambda: _put(blobs, jobs.manifest().to_json()))
    request = dataset_service_pb2.CreateDatasetRequest(
        namespace=namespace,
        name=jobs.DATASET,
        manifest_digest=put.digest,
        request_id=f"data{namespace}",
    )
    await _until_done(
        chance, lambda: call_with_retry(datasets.CreateDataset, request, timeout_s=5.0)
    )


async def _until_done(chance: random.Random, attempt: Callable[[], Any]) -> Any:
    while True:
        try:
            return await attempt()
        except PhalanxError as error:
            if isinstance(error, Aborted):
                raise
        await asyncio.sleep(chance.uniform(0.2, 0.3))


async def _put(blobs: Any, content: bytes) -> Any:
    first = storage_service_pb2.PutBlobRequest(expected_bytes=len(content), chunk=content)

    async def attempt(request: Any, *, timeout: float) -> Any:
        async def messages() -> Any:
            yield request

        return await blobs.PutBlob(messages(), timeout=timeout)

    return await call_with_retry(attempt, first, timeout_s=5.0)
