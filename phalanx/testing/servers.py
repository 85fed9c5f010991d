"""A scripted cluster over real gRPC: the public services with answers that a test chooses.

    with ScriptedCluster() as cluster:
        cluster.jobs["digits-abc"] = job_pb2.Job(id="digits-abc", …)
        cluster.fail("GetJob", Unavailable("not now"))      # once
        run(["--address", cluster.address, "show", "digits-abc"])
        assert cluster.requests("GetJob")[0].job_id == "digits-abc"

It runs in a thread of its own, so that blocking clients can be tested, and keeps what it is told in
memory. It trains nothing and checks no specs.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from google.protobuf.message import Message

from phalanx.errors import AlreadyExists, NotFound, PhalanxError, Unavailable
from phalanx.rpc.server import Server
from phalanx.rpc.types import ServicerContext
from phalanx.v1 import (
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    storage_service_pb2,
    storage_service_pb2_grpc,
    task_service_pb2,
)

GUARD_S = 20.0
"""Longest wait for the server's thread; a guard against a hang, not a measure."""
SERVICES = ("JobService", "ClusterService", "DatasetService", "ModelService", "StorageService")
_CHUNK_BYTES = 1024 * 1024

MessageT = TypeVar("MessageT", bound=Message)


class ScriptedCluster:
    """Everything that is public on this class may be set by a test before or between calls.

    ``watch_script`` is what WatchJob sends; an error in it ends the stream there, and the next call
    goes on after it. ``events``, ``logs`` and ``points`` are what the streams and lists of that
    kind give, and ``incomplete`` why there may be more.
    """

    def __init__(self, listen: str = "127.0.0.1:0") -> None:
        self.address = ""
        self.jobs: dict[str, job_pb2.Job] = {}
        self.plan = job_pb2.Plan(steps=10, rows_per_leaf=128, eligible_workers=2)
        self.watch_script: deque[job_service_pb2.WatchJobResponse | PhalanxError] = deque()
        self.events: list[job_pb2.Event] = []
        self.logs: list[job_service_pb2.ReadJobLogsResponse] = []
        self.task_results: list[task_service_pb2.TaskResult] = []
        self.points: list[job_pb2.MetricPoint] = []
        self.incomplete = ""
        self.cluster = cluster_service_pb2.GetClusterResponse(
            version="0.1.0", generation=1, leader="control-1", storage_available=True
        )
        self.datasets: dict[str, dataset_service_pb2.Dataset] = {}
        self.models: dict[str, model_service_pb2.ModelVersion] = {}
        self.blobs: dict[str, bytes] = {}
        self.journals: dict[str, list[bytes]] = defaultdict(list)
        self.garbage = storage_service_pb2.CollectGarbageResponse()
        self._listen = listen
        self._requests: dict[str, list[Message]] = defaultdict(list)
        self._failures: dict[str, deque[PhalanxError]] = defaultdict(deque)
        self._submissions: dict[str, tuple[bytes, job_service_pb2.SubmitJobResponse]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-cluster", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(GUARD_S) or not self.address:
            raise Unavailable("the scripted cluster did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all calls and free the port; harmless when repeated."""
        if self._thread.is_alive() and self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(GUARD_S)

    def fail(self, method: str, *errors: PhalanxError) -> None:
        """Let the next calls of a method fail, one error each."""
        self._failures[method].extend(errors)

    def requests(self, method: str) -> list[Any]:
        """Return all requests of a method so far, also those that failed."""
        return list(self._requests[method])

    def put_blob(self, data: bytes) -> str:
        """Store a blob; return its digest."""
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def accept(self, method: str, request: Message) -> None:
        """Note a request; raise the failure that a test has planned for it."""
        self._requests[method].append(request)
        if self._failures[method]:
            raise self._failures[method].popleft()

    def submit(
        self, request: job_service_pb2.SubmitJobRequest
    ) -> job_service_pb2.SubmitJobResponse:
        """Answer a submission, a repeated request id with the first answer."""
        spec = request.spec.SerializeToString(deterministic=True)
        known = self._submissions.get(request.request_id)
        if known is not None:
            if known[0] != spec:
                raise AlreadyExists(f"request id {request.request_id} stands for another job")
            return known[1]
        job = job_pb2.Job(
            id=f"{request.spec.name}-{len(self.jobs):08d}",
            spec=request.spec,
            state=job_pb2.Job.STATE_QUEUED,
        )
        answer = job_service_pb2.SubmitJobResponse(job=job, plan=self.plan)
        if not request.validate_only:
            self.jobs[job.id] = job
            self._submissions[request.request_id] = (spec, answer)
        return answer

    def job(self, job_id: str) -> job_pb2.Job:
        """Return a job. Raises NotFound."""
        return find(self.jobs, job_id, "job")

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = Server(
            listen=self._listen,
            metrics_listen=None,
            service_names=[f"phalanx.v1.{name}" for name in SERVICES],
        )
        raw = server.raw
        # Calls that no client makes are not scripted; gRPC answers them with UNIMPLEMENTED.
        models = _Models(self)  # type: ignore[abstract]
        store = _Storage(self)  # type: ignore[abstract]
        job_service_pb2_grpc.add_JobServiceServicer_to_server(_Jobs(self), raw)
        cluster_service_pb2_grpc.add_ClusterServiceServicer_to_server(_Cluster(self), raw)
        dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(_Datasets(self), raw)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(models, raw)
        storage_service_pb2_grpc.add_StorageServiceServicer_to_server(store, raw)
        await server.start()
        self.address = self.cluster.storage_address = server.address
        server.set_serving(True)
        self._started.set()
        await self._stop.wait()
        await server.stop(0.0)


def find(known: dict[str, MessageT], name: str, what: str) -> MessageT:
    """Return what is known under a name. Raises NotFound."""
    if name not in known:
        raise NotFound(f"there is no {what} {name}")
    return known[name]


class _Jobs(job_service_pb2_grpc.JobServiceServicer):
    def __init__(self, script: ScriptedCluster) -> None:
        self._script = script

    async def SubmitJob(
        self, request: job_service_pb2.SubmitJobRequest, context: ServicerContext
    ) -> job_service_pb2.SubmitJobResponse:
        self._script.accept("SubmitJob", request)
        return self._script.submit(request)

    async def GetJob(
        self, request: job_service_pb2.GetJobRequest, context: ServicerContext
    ) -> job_service_pb2.GetJobResponse:
        self._script.accept("GetJob", request)
        return job_service_pb2.GetJobResponse(job=self._script.job(request.job_id))

    async def ListJobs(
        self, request: job_service_pb2.ListJobsRequest, context: ServicerContext
    ) -> job_service_pb2.ListJobsResponse:
        self._script.accept("ListJobs", request)
        found = [
            job
            for job in self._script.jobs.values()
            if not request.states or job.state in request.states
        ]
        # Pages of one job each: clients must follow the token.
        index = int(request.page_token or 0)
        token = str(index + 1) if index + 1 < len(found) else ""
        return job_service_pb2.ListJobsResponse(
            jobs=found[index : index + 1],
            next_page_token=token,
            incomplete=self._script.incomplete,
        )

    async def CancelJob(
        self, request: job_service_pb2.CancelJobRequest, context: ServicerContext
    ) -> job_service_pb2.CancelJobResponse:
        job = self._change("CancelJob", request, job_pb2.Job.STATE_CANCELLED)
        return job_service_pb2.CancelJobResponse(job=job)

    async def PauseJob(
        self, request: job_service_pb2.PauseJobRequest, context: ServicerContext
    ) -> job_service_pb2.PauseJobResponse:
        job = self._change("PauseJob", request, job_pb2.Job.STATE_PAUSED)
        return job_service_pb2.PauseJobResponse(job=job)

    async def ResumeJob(
        self, request: job_service_pb2.ResumeJobRequest, context: ServicerContext
    ) -> job_service_pb2.ResumeJobResponse:
        job = self._change("ResumeJob", request, job_pb2.Job.STATE_RUNNING)
        return job_service_pb2.ResumeJobResponse(job=job)

    async def RetryJob(
        self, request: job_service_pb2.RetryJobRequest, context: ServicerContext
    ) -> job_service_pb2.RetryJobResponse:
        job = self._change("RetryJob", request, job_pb2.Job.STATE_RUNNING)
        return job_service_pb2.RetryJobResponse(job=job)

    async def DeleteJob(
        self, request: job_service_pb2.DeleteJobRequest, context: ServicerContext
    ) -> job_service_pb2.DeleteJobResponse:
        self._script.accept("DeleteJob", request)
        self._script.job(request.job_id)
        del self._script.jobs[request.job_id]
        return job_service_pb2.DeleteJobResponse()

    async def WatchJob(
        self, request: job_service_pb2.WatchJobRequest, context: ServicerContext
    ) -> AsyncIterator[job_service_pb2.WatchJobResponse]:
        self._script.accept("WatchJob", request)
        yield job_service_pb2.WatchJobResponse(job=self._script.job(request.job_id))
        while self._script.watch_script:
            item = self._script.watch_script.popleft()
            if isinstance(item, PhalanxError):
                raise item
            yield item

    async def ReadJobLogs(
        self, request: job_service_pb2.ReadJobLogsRequest, context: ServicerContext
    ) -> AsyncIterator[job_service_pb2.ReadJobLogsResponse]:
        self._script.accept("ReadJobLogs", request)
        self._script.job(request.job_id)
        for line in self._script.logs:
            if request.worker_id in ("", line.worker_id):
                yield line

    async def ReadTaskResults(
        self, request: job_service_pb2.ReadTaskResultsRequest, context: ServicerContext
    ) -> AsyncIterator[job_service_pb2.ReadTaskResultsResponse]:
        self._script.accept("ReadTaskResults", request)
        self._script.job(request.job_id)
        for result in self._script.task_results:
            if not request.tasks or result.task in request.tasks:
                yield job_service_pb2.ReadTaskResultsResponse(results=[result])

    async def ListJobMetrics(
        self, request: job_service_pb2.ListJobMetricsRequest, context: ServicerContext
    ) -> job_service_pb2.ListJobMetricsResponse:
        self._script.accept("ListJobMetrics", request)
        points = [point for point in self._script.points if point.step > request.after_step]
        return job_service_pb2.ListJobMetricsResponse(
            points=points[: request.max_points or None], incomplete=self._script.incomplete
        )

    def _change(self, method: str, request: Any, state: job_pb2.Job.State.ValueType) -> job_pb2.Job:
        self._script.accept(method, request)
        job = self._script.job(request.job_id)
        job.state = state
        return job


class _Cluster(cluster_service_pb2_grpc.ClusterServiceServicer):
    def __init__(self, script: ScriptedCluster) -> None:
        self._script = script

    async def GetCluster(
        self, request: cluster_service_pb2.GetClusterRequest, context: ServicerContext
    ) -> cluster_service_pb2.GetClusterResponse:
        self._script.accept("GetCluster", request)
        return self._script.cluster

    async def ListWorkers(
        self, request: cluster_service_pb2.ListWorkersRequest, context: ServicerContext
    ) -> cluster_service_pb2.ListWorkersResponse:
        self._script.accept("ListWorkers", request)
        return cluster_service_pb2.ListWorkersResponse(
            workers=self._script.cluster.workers, incomplete=self._script.incomplete
        )

    async def DrainWorker(
        self, request: cluster_service_pb2.DrainWorkerRequest, context: ServicerContext
    ) -> cluster_service_pb2.DrainWorkerResponse:
        self._script.accept("DrainWorker", request)
        known = {worker.id: worker for worker in self._script.cluster.workers}
        worker = find(known, request.worker_id, "worker")
        worker.state = cluster_service_pb2.Worker.STATE_LEFT
        return cluster_service_pb2.DrainWorkerResponse(worker=worker)

    async def ListEvents(
        self, request: cluster_service_pb2.ListEventsRequest, context: ServicerContext
    ) -> AsyncIterator[cluster_service_pb2.ListEventsResponse]:
        self._script.accept("ListEvents", request)
        for event in self._script.events:
            if request.job_id in ("", event.job_id) and event.sequence > request.after_sequence:
                yield cluster_service_pb2.ListEventsResponse(event=event)
        if self._script.incomplete and not request.follow:
            raise Unavailable(self._script.incomplete, reason="INCOMPLETE")


class _Datasets(dataset_service_pb2_grpc.DatasetServiceServicer):
    def __init__(self, script: ScriptedCluster) -> None:
        self._script = script

    async def CreateDataset(
        self, request: dataset_service_pb2.CreateDatasetRequest, context: ServicerContext
    ) -> dataset_service_pb2.CreateDatasetResponse:
        self._script.accept("CreateDataset", request)
        dataset = dataset_service_pb2.Dataset(
            namespace=request.namespace,
            name=request.name,
            version=1,
            manifest_digest=request.manifest_digest,
        )
        self._script.datasets[request.name] = dataset
        return dataset_service_pb2.CreateDatasetResponse(dataset=dataset)

    async def GetDataset(
        self, request: dataset_service_pb2.GetDatasetRequest, context: ServicerContext
    ) -> dataset_service_pb2.GetDatasetResponse:
        self._script.accept("GetDataset", request)
        name = request.name.partition("@")[0]
        dataset = find(self._script.datasets, name, "data set")
        return dataset_service_pb2.GetDatasetResponse(dataset=dataset)

    async def ListDatasets(
        self, request: dataset_service_pb2.ListDatasetsRequest, context: ServicerContext
    ) -> dataset_service_pb2.ListDatasetsResponse:
        self._script.accept("ListDatasets", request)
        return dataset_service_pb2.ListDatasetsResponse(datasets=self._script.datasets.values())

    async def DeleteDataset(
        self, request: dataset_service_pb2.DeleteDatasetRequest, context: ServicerContext
    ) -> dataset_service_pb2.DeleteDatasetResponse:
        self._script.accept("DeleteDataset", request)
        find(self._script.datasets, request.name, "data set")
        del self._script.datasets[request.name]
        return dataset_service_pb2.DeleteDatasetResponse()


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, script: ScriptedCluster) -> None:
        self._script = script

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: ServicerContext
    ) -> model_service_pb2.GetModelResponse:
        self._script.accept("GetModel", request)
        name = request.name.partition("@")[0]
        return model_service_pb2.GetModelResponse(model=find(self._script.models, name, "model"))

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: ServicerContext
    ) -> model_service_pb2.ListModelsResponse:
        self._script.accept("ListModels", request)
        return model_service_pb2.ListModelsResponse(models=self._script.models.values())

    async def DeleteModel(
        self, request: model_service_pb2.DeleteModelRequest, context: ServicerContext
    ) -> model_service_pb2.DeleteModelResponse:
        self._script.accept("DeleteModel", request)
        find(self._script.models, request.name, "model")
        del self._script.models[request.name]
        return model_service_pb2.DeleteModelResponse()


class _Storage(storage_service_pb2_grpc.StorageServiceServicer):
    def __init__(self, script: ScriptedCluster) -> None:
        self._script = script

    async def PutBlob(
        self,
        request_iterator: AsyncIterator[storage_service_pb2.PutBlobRequest],
        context: ServicerContext,
    ) -> storage_service_pb2.PutBlobResponse:
        data = b"".join([request.chunk async for request in request_iterator])
        self._script.accept("PutBlob", storage_service_pb2.PutBlobRequest())
        digest = self._script.put_blob(data)
        return storage_service_pb2.PutBlobResponse(digest=digest, size_bytes=len(data))

    async def GetBlob(
        self, request: storage_service_pb2.GetBlobRequest, context: ServicerContext
    ) -> AsyncIterator[storage_service_pb2.GetBlobResponse]:
        self._script.accept("GetBlob", request)
        if request.digest not in self._script.blobs:
            raise NotFound(f"there is no blob {request.digest}")
        data = self._script.blobs[request.digest]
        stop = request.offset + request.length if request.length else len(data)
        for start in _starts(request.offset, stop):
            yield storage_service_pb2.GetBlobResponse(
                chunk=data[start : min(start + _CHUNK_BYTES, stop)], size_bytes=len(data)
            )

    async def CheckBlobs(
        self, request: storage_service_pb2.CheckBlobsRequest, context: ServicerContext
    ) -> storage_service_pb2.CheckBlobsResponse:
        self._script.accept("CheckBlobs", request)
        missing = [digest for digest in request.digests if digest not in self._script.blobs]
        return storage_service_pb2.CheckBlobsResponse(missing=missing)

    async def AppendJournal(
        self, request: storage_service_pb2.AppendJournalRequest, context: ServicerContext
    ) -> storage_service_pb2.AppendJournalResponse:
        self._script.accept("AppendJournal", request)
        journal = self._script.journals[request.stream]
        journal.extend(request.records)
        return storage_service_pb2.AppendJournalResponse(next_sequence=len(journal))

    async def ReadJournal(
        self, request: storage_service_pb2.ReadJournalRequest, context: ServicerContext
    ) -> AsyncIterator[storage_service_pb2.ReadJournalResponse]:
        self._script.accept("ReadJournal", request)
        records = [
            storage_service_pb2.JournalRecord(sequence=sequence, payload=payload)
            for sequence, payload in enumerate(self._script.journals[request.stream])
        ]
        yield storage_service_pb2.ReadJournalResponse(records=records, next_sequence=len(records))

    async def SetPins(
        self, request: storage_service_pb2.SetPinsRequest, context: ServicerContext
    ) -> storage_service_pb2.SetPinsResponse:
        self._script.accept("SetPins", request)
        return storage_service_pb2.SetPinsResponse()

    async def CollectGarbage(
        self, request: storage_service_pb2.CollectGarbageRequest, context: ServicerContext
    ) -> storage_service_pb2.CollectGarbageResponse:
        self._script.accept("CollectGarbage", request)
        return self._script.garbage


def _starts(first: int, stop: int) -> Iterable[int]:
    # An empty blob is one empty chunk, so that its size is told.
    return range(first, stop, _CHUNK_BYTES) if stop > first else (first,)
