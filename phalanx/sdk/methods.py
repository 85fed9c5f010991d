"""The calls of the public services, as values: path, request and response of each."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from phalanx.v1 import (
    cluster_service_pb2 as cluster,
)
from phalanx.v1 import (
    dataset_service_pb2 as dataset,
)
from phalanx.v1 import (
    job_service_pb2 as job,
)
from phalanx.v1 import (
    model_service_pb2 as model,
)
from phalanx.v1 import (
    storage_service_pb2 as storage,
)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True)
class Method(Generic[RequestT, ResponseT]):
    """One call of a service; ``service`` is its full name (``phalanx.v1.JobService``)."""

    service: str
    name: str
    request: type[RequestT]
    response: type[ResponseT]

    @property
    def path(self) -> str:
        """The path of the call on the wire."""
        return f"/{self.service}/{self.name}"


_JOB = "phalanx.v1.JobService"
SUBMIT_JOB = Method(_JOB, "SubmitJob", job.SubmitJobRequest, job.SubmitJobResponse)
GET_JOB = Method(_JOB, "GetJob", job.GetJobRequest, job.GetJobResponse)
LIST_JOBS = Method(_JOB, "ListJobs", job.ListJobsRequest, job.ListJobsResponse)
CANCEL_JOB = Method(_JOB, "CancelJob", job.CancelJobRequest, job.CancelJobResponse)
PAUSE_JOB = Method(_JOB, "PauseJob", job.PauseJobRequest, job.PauseJobResponse)
RESUME_JOB = Method(_JOB, "ResumeJob", job.ResumeJobRequest, job.ResumeJobResponse)
RETRY_JOB = Method(_JOB, "RetryJob", job.RetryJobRequest, job.RetryJobResponse)
DELETE_JOB = Method(_JOB, "DeleteJob", job.DeleteJobRequest, job.DeleteJobResponse)
WATCH_JOB = Method(_JOB, "WatchJob", job.WatchJobRequest, job.WatchJobResponse)
READ_JOB_LOGS = Method(_JOB, "ReadJobLogs", job.ReadJobLogsRequest, job.ReadJobLogsResponse)
READ_TASK_RESULTS = Method(
    _JOB, "ReadTaskResults", job.ReadTaskResultsRequest, job.ReadTaskResultsResponse
)
LIST_JOB_METRICS = Method(
    _JOB, "ListJobMetrics", job.ListJobMetricsRequest, job.ListJobMetricsResponse
)

_CLUSTER = "phalanx.v1.ClusterService"
GET_CLUSTER = Method(_CLUSTER, "GetCluster", cluster.GetClusterRequest, cluster.GetClusterResponse)
LIST_WORKERS = Method(
    _CLUSTER, "ListWorkers", cluster.ListWorkersRequest, cluster.ListWorkersResponse
)
DRAIN_WORKER = Method(
    _CLUSTER, "DrainWorker", cluster.DrainWorkerRequest, cluster.DrainWorkerResponse
)
LIST_EVENTS = Method(_CLUSTER, "ListEvents", cluster.ListEventsRequest, cluster.ListEventsResponse)

_DATASET = "phalanx.v1.DatasetService"
CREATE_DATASET = Method(
    _DATASET, "CreateDataset", dataset.CreateDatasetRequest, dataset.CreateDatasetResponse
)
GET_DATASET = Method(_DATASET, "GetDataset", dataset.GetDatasetRequest, dataset.GetDatasetResponse)
LIST_DATASETS = Method(
    _DATASET, "ListDatasets", dataset.ListDatasetsRequest, dataset.ListDatasetsResponse
)
DELETE_DATASET = Method(
    _DATASET, "DeleteDataset", dataset.DeleteDatasetRequest, dataset.DeleteDatasetResponse
)

_MODEL = "phalanx.v1.ModelService"
GET_MODEL = Method(_MODEL, "GetModel", model.GetModelRequest, model.GetModelResponse)
LIST_MODELS = Method(_MODEL, "ListModels", model.ListModelsRequest, model.ListModelsResponse)
DELETE_MODEL = Method(_MODEL, "DeleteModel", model.DeleteModelRequest, model.DeleteModelResponse)

_STORAGE = "phalanx.v1.StorageService"
COLLECT_GARBAGE = Method(
    _STORAGE, "CollectGarbage", storage.CollectGarbageRequest, storage.CollectGarbageResponse
)
READ_SNAPSHOT = Method(
    _STORAGE, "ReadSnapshot", storage.ReadSnapshotRequest, storage.ReadSnapshotResponse
)
SCRUB = Method(_STORAGE, "Scrub", storage.ScrubRequest, storage.ScrubResponse)
APPEND_JOURNAL = Method(
    _STORAGE, "AppendJournal", storage.AppendJournalRequest, storage.AppendJournalResponse
)
READ_JOURNAL = Method(
    _STORAGE, "ReadJournal", storage.ReadJournalRequest, storage.ReadJournalResponse
)
LIST_CHECKPOINTS = Method(
    _STORAGE, "ListCheckpoints", storage.ListCheckpointsRequest, storage.ListCheckpointsResponse
)
SET_PINS = Method(_STORAGE, "SetPins", storage.SetPinsRequest, storage.SetPinsResponse)

STORAGE_SERVICES = frozenset({_DATASET, _MODEL, _STORAGE})
"""Services that the storage process answers; the others are control's."""
