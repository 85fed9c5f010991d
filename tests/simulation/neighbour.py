"""A second user of the simulated cluster, who uses everything that there is.

In a namespace of her own she has jobs with bad leaves (`jobs.BAD`), retries, cancels and deletes
them, asks for more than her quota, looks at members and catalogues page by page, drains workers,
and asks for what there is not. Each answer is checked; nothing that she does may harm the others.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from phalanx.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.rpc.channel import call_with_retry, open_channel
from phalanx.testing.simulation.loop import SimulationFailed
from phalanx.v1 import (
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from tests.simulation import jobs, references
from tests.simulation.cluster import STORAGE, Cluster
from tests.simulation.user import ATTEMPT_S, ENDED, Job, put_data

NAMESPACE = "neighbours"
JOBS_MAX = 4
"""The quota of each namespace, in clusters that have her."""
SHAPE = jobs.Shape(elements=40, shards=3, steps=8, optimizer="sgd", checkpoint_every=3)
COMES_BACK_S = (2.0, 5.0, 10.0, 20.0, 30.0)
"""When somebody looks whether a worker that was drained is there again."""

Pb = job_service_pb2


class Neighbour:
    """Runs in a process of her own."""

    name, namespace = "neighbour", NAMESPACE

    def __init__(
        self, cluster: Cluster, chance: random.Random, fingerprints: Mapping[str, str]
    ) -> None:
        """`fingerprints` are those with which jobs began."""
        self.errands = 0
        """Those that came to an end."""
        self.ends: dict[str, int] = {}
        """How many of her jobs ended as they must, by what was bad in them."""
        self._cluster = cluster
        self._chance = chance
        self._fingerprints = fingerprints
        self._channels: dict[str, Any] = {}
        self._turn = 0
        self._number = 0
        self._jobs: dict[str, jobs.Shape] = {}

    async def run(self) -> None:
        """Do one errand after another, in any order, until the run is over."""
        try:
            await self._run()
        except SimulationFailed:
            raise
        except Exception as error:
            # Of whoever just ended nobody would hear.
            raise SimulationFailed(f"the neighbour was told {error!r}") from error

    async def _run(self) -> None:
        await put_data(STORAGE, self._chance, NAMESPACE)
        looks = (
            self._looks_at_members,
            self._looks_at_jobs,
            self._looks_at_data,
            self._looks_at_models,
        )
        errands = (
            *(self._bad_job(bad) for bad in jobs.BAD),
            self._changes_her_mind,
            self._more_than_her_share,
            self._drains,
            *looks,
        )
        while True:
            # Others have to get through in the end, so there is no more work from her then.
            able = looks if self._cluster.healed else errands
            for errand in self._chance.sample(able, len(able)):
                try:
                    await errand()
                    self.errands += 1
                    await self._look_at_bad_jobs()
                except (Unavailable, DeadlineExceeded, ResourceExhausted):
                    pass  # something is broken, or the disk is full; another time
                await asyncio.sleep(self._chance.uniform(0.1, 0.4))

    # Jobs

    def _bad_job(self, bad: str) -> Callable[[], Awaitable[None]]:
        async def submit() -> None:
            shape = replace(SHAPE, bad=bad)
            try:
                job = await self._submit(shape)
            except ResourceExhausted:
                return  # she has as many as she may
            self._jobs[job.id] = shape

        return submit

    async def _submit(self, shape: jobs.Shape, change: Callable[[Any], None] | None = None) -> Any:
        self._number += 1
        spec = jobs.job_spec(shape, f"{shape.bad or 'job'}-{self._number}-{shape.elements}")
        spec.namespace = self.namespace
        if change is not None:
            change(spec)
        request = Pb.SubmitJobRequest(spec=spec, request_id=f"{self.name}-{self._number}")
        return (await self._control("SubmitJob", request)).job

    async def _look_at_bad_jobs(self) -> None:
        for job_id, shape in list(self._jobs.items()):
            job = (await self._control("GetJob", Pb.GetJobRequest(job_id=job_id))).job
            if job.state in ENDED:
                del self._jobs[job_id]
                self._judge(job, shape)
                if self._chance.random() < 0.5:
                    await self._attempt(self._try_again_and_forget(job))

    def _judge(self, job: Any, shape: jobs.Shape) -> None:
        wanted = {"poison": "POISON_SHARD", "nan": "NON_FINITE"}.get(shape.bad, "")
        told = f"{Job.State.Name(job.state)}: {job.reason}: {job.message}"
        if wanted:
            named = [failure.shard for failure in job.failures] == [jobs.BAD_SHARD]
            if (job.state, job.reason) != (Job.STATE_FAILED, wanted) or not named:
                raise SimulationFailed(f"{job.id} ended as {told}, and should by {wanted}")
        elif job.state == Job.STATE_SUCCEEDED:
            self._judge_result(job, shape)
        elif job.reason != "POISON_SHARD":  # its leaf may have hung besides
            raise SimulationFailed(f"{job.id} ended as {told}")
        self.ends[shape.bad] = self.ends.get(shape.bad, 0) + 1

    def _judge_result(self, job: Any, shape: jobs.Shape) -> None:
        shape = replace(shape, fingerprint=self._fingerprints[job.id])
        lost = jobs.examples_skipped(shape)
        found = job.result.parameters_sha256, job.result.examples_lost
        if found != (references.reference_sha256(shape, shape.ends_at), lost):
            raise SimulationFailed(f"{job.id} ended with {found[1]} examples lost, or other bits")

    async def _try_again_and_forget(self, job: Any) -> None:
        """Retry what has failed, cancel that, delete both; and what is deleted stays so."""
        again = job
        if job.state == Job.STATE_FAILED:
            request = Pb.RetryJobRequest(job_id=job.id, request_id=f"retry-{job.id}")
            again = (await self._control("RetryJob", request)).job
            repeated = (await self._control("RetryJob", request)).job
            self._demand(again.id == repeated.id, "a repeated retry made another job")
            cancel = Pb.CancelJobRequest(job_id=again.id, request_id=f"cancel-{again.id}")
            try:
                await self._control("CancelJob", cancel)
            except FailedPrecondition:
                return  # it has failed by now
        for each in {job.id, again.id}:
            await self._delete(each)

    async def _delete(self, job_id: str) -> None:
        request = Pb.DeleteJobRequest(job_id=job_id, request_id=f"delete-{job_id}")
        await self._control("DeleteJob", request)
        await self._control("DeleteJob", request)
        await self._refused(NotFound, "GetJob", Pb.GetJobRequest(job_id=job_id))
        other = Pb.DeleteJobRequest(job_id=job_id, request_id=f"delete-again-{job_id}")
        await self._refused(NotFound, "DeleteJob", other)

    async def _changes_her_mind(self) -> None:
        """Pause, resume and cancel a job in an order that there is not, too."""
        try:
            job = await self._submit(replace(SHAPE, steps=60))
        except ResourceExhausted:
            return
        pause = Pb.PauseJobRequest(job_id=job.id, request_id=f"pause-{job.id}")
        resume = Pb.ResumeJobRequest(job_id=job.id, request_id=f"resume-{job.id}")
        cancel = Pb.CancelJobRequest(job_id=job.id, request_id=f"cancel-{job.id}")
        delete = Pb.DeleteJobRequest(job_id=job.id, request_id=f"delete-{job.id}")
        retry = Pb.RetryJobRequest(job_id=job.id, request_id=f"retry-{job.id}")
        for method, request in (("RetryJob", retry), ("DeleteJob", delete), ("ResumeJob", resume)):
            await self._refused(FailedPrecondition, method, request)
        await self._attempt(self._control("PauseJob", pause))
        await self._attempt(self._control("ResumeJob", resume))
        await self._control("CancelJob", cancel)
        await self._control("CancelJob", cancel)
        await self._refused(AlreadyExists, "CancelJob", _with(cancel, job_id=f"{job.id}x"))
        await self._refused(FailedPrecondition, "PauseJob", _with(pause, request_id="late"))
        await self._delete(job.id)

    async def _more_than_her_share(self) -> None:
        """At some point her quota is used up, and she is told so; then she gives it back."""
        made = []
        for _ in range(JOBS_MAX + 1):
            try:
                made.append(await self._submit(replace(SHAPE, steps=60)))
            except ResourceExhausted:
                break
        if len(made) > JOBS_MAX:
            # Where calls took long the first ones may have ended before she asked for the last.
            request = Pb.GetJobRequest(job_id=made[0].id)
            first = (await self._control("GetJob", request)).job
            self._demand(first.HasField("end_time"), "she got more than her quota")
        for job in made:
            request = Pb.CancelJobRequest(job_id=job.id, request_id=f"cancel-{job.id}")
            await self._attempt(self._control("CancelJob", request))

    # Looking around

    async def _looks_at_members(self) -> None:
        page, told = "", []
        while page or not told:
            listed = cluster_service_pb2.ListWorkersRequest(page_size=1, page_token=page)
            answer = await self._control("ListWorkers", listed)
            told += [worker.id for worker in answer.workers]
            page = answer.next_page_token
            if not answer.workers:
                break
        self._demand(len(told) == len(set(told)), f"workers are listed twice: {told}")
        cluster = await self._control("GetCluster", cluster_service_pb2.GetClusterRequest())
        self._demand(cluster.generation > 0, "nobody leads, and somebody answers")

    async def _looks_at_jobs(self) -> None:
        request = Pb.ListJobsRequest(namespace=NAMESPACE, page_size=1)
        seen: list[str] = []
        while True:
            answer = await self._control("ListJobs", request)
            seen += [job.id for job in answer.jobs]
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
        self._demand(len(seen) == len(set(seen)), f"jobs are listed twice: {seen}")
        await self._refused(
            NotFound, "CancelJob", Pb.CancelJobRequest(job_id="no", request_id="no")
        )

    async def _looks_at_data(self) -> None:
        make, name = dataset_service_pb2, jobs.DATASET

        async def get(name: str) -> Any:
            return await self._data(
                "GetDataset", make.GetDatasetRequest(namespace=NAMESPACE, name=name)
            )

        first = (await get(f"{name}@1")).dataset
        self._demand((await get(name)).dataset.version >= 1, "the newest version is missing")
        await get(f"{NAMESPACE}/{name}")
        for wrong, error in (
            (f"{name}@99", NotFound),
            (f"{name}@0", InvalidArgument),
            ("../data", InvalidArgument),
        ):
            await self._expect(error, get(wrong))
        self._number += 1
        create = make.CreateDatasetRequest(
            namespace=NAMESPACE,
            name="spare",
            manifest_digest=first.manifest_digest,
            request_id=f"data-{self._number}",
        )
        made = (await self._data("CreateDataset", create)).dataset
        again = (await self._data("CreateDataset", create)).dataset
        self._demand(made.version == again.version, "a repeated call made another version")
        await self._expect(AlreadyExists, self._data("CreateDataset", _with(create, name="other")))
        await self._pages("ListDatasets", make.ListDatasetsRequest, "datasets", self._data)
        delete = make.DeleteDatasetRequest(
            namespace=NAMESPACE, name=f"spare@{made.version}", request_id=f"drop-{self._number}"
        )
        await self._data("DeleteDataset", delete)
        await self._expect(NotFound, get(f"spare@{made.version}"))

    async def _looks_at_models(self) -> None:
        make = model_service_pb2
        await self._pages("ListModels", make.ListModelsRequest, "models", self._models)
        listed = await self._models("ListModels", make.ListModelsRequest(namespace=NAMESPACE))
        for model in listed.models[:1]:
            name = f"{model.name}@{model.version}"
            request = make.GetModelRequest(namespace=NAMESPACE, name=name)
            found = (await self._models("GetModel", request)).model
            self._demand(found.job_id == model.job_id, f"{name} is another model")
        nothing = make.CreateModelRequest(request_id="nothing")
        nothing.model.namespace, nothing.model.name = NAMESPACE, "nothing"
        await self._expect(InvalidArgument, self._models("CreateModel", nothing))

    async def _pages(self, method: str, request: Any, field: str, call: Any) -> None:
        page, seen = "", []
        while True:
            asked = request(namespace=NAMESPACE, page_size=1, page_token=page)
            answer = await call(method, asked)
            seen += [(each.name, each.version) for each in getattr(answer, field)]
            page = answer.next_page_token
            if not page:
                break
        self._demand(len(seen) == len(set(seen)), f"{field} are listed twice: {seen}")
        for wrong in (request(page_size=-1), request(page_token="no token")):
            await self._expect(InvalidArgument, call(method, wrong))

    async def _drains(self) -> None:
        """A worker leaves, and comes back as another process."""
        cluster = self._cluster
        name = self._chance.choice(cluster.workers)
        if cluster.healed or name in cluster.lost:
            return
        request = cluster_service_pb2.DrainWorkerRequest(worker_id=name, request_id=f"drain-{name}")
        try:
            await self._control("DrainWorker", request)
            await self._control("DrainWorker", request)
        except (NotFound, FailedPrecondition):
            return  # nobody knows it yet, or it is lost
        for after_s in COMES_BACK_S:
            cluster.world.at(cluster.world.now_s + after_s, lambda: cluster.ensure(name))

    # Inside

    async def _control(self, method: str, request: Any) -> Any:
        """Call control, whoever leads."""
        clustered = method in ("GetCluster", "ListWorkers", "DrainWorker")
        for _ in range(10):
            addresses = self._cluster.control_addresses
            channel = self._channel(addresses[self._turn % len(addresses)])
            stub: Any = job_service_pb2_grpc.JobServiceStub(channel)
            if clustered:
                stub = cluster_service_pb2_grpc.ClusterServiceStub(channel)
            try:
                return await call_with_retry(
                    getattr(stub, method), request, timeout_s=ATTEMPT_S, attempts=1
                )
            except (Unavailable, DeadlineExceeded):
                self._turn += 1
            except ResourceExhausted as error:
                if error.reason in ("QUOTA_EXCEEDED", "JOB_TOO_LARGE"):
                    raise
            await asyncio.sleep(0.2)
        raise Unavailable("nobody answers")

    async def _data(self, method: str, request: Any) -> Any:
        stub = dataset_service_pb2_grpc.DatasetServiceStub(self._channel(STORAGE))
        return await call_with_retry(getattr(stub, method), request, timeout_s=ATTEMPT_S)

    async def _models(self, method: str, request: Any) -> Any:
        stub = model_service_pb2_grpc.ModelServiceStub(self._channel(STORAGE))
        return await call_with_retry(getattr(stub, method), request, timeout_s=ATTEMPT_S)

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    async def _refused(self, error: type[PhalanxError], method: str, request: Any) -> None:
        await self._expect(error, self._control(method, request))

    async def _expect(self, error: type[PhalanxError], call: Awaitable[Any]) -> None:
        try:
            answer = await call
        except error:
            return
        except (Unavailable, DeadlineExceeded, ResourceExhausted):
            return  # it was not decided
        raise SimulationFailed(f"this should have been refused as {error.__name__}: {answer}")

    async def _attempt(self, call: Awaitable[Any]) -> None:
        """What may come too late."""
        with suppress(FailedPrecondition, ResourceExhausted):
            await call

    def _demand(self, holds: bool, message: str) -> None:
        if not holds:
            raise SimulationFailed(message)


def _with(request: Any, **changed: Any) -> Any:
    made = type(request)()
    made.CopyFrom(request)
    for name, value in changed.items():
        setattr(made, name, value)
    return made
