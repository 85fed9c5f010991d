"""Every metric of every service, declared once.

A process makes one registry (``new_registry``) and one of the classes below; an attribute is named
as the metric is without its prefix and unit suffix rules added by Prometheus. Names and labels are
a contract: a test holds them.

    metrics = ControlMetrics(server.registry)
    metrics.redispatches_total.labels(cause="worker_lost").inc()

Per-job metrics go through ``PerJob``, which bounds how many jobs have series and forgets ended
ones.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics import MetricWrapperBase

MetricT = TypeVar("MetricT", bound=MetricWrapperBase)

PREFIX = "phalanx_"
JOB_SERIES_LIMIT = 100
JOB_SERIES_KEPT_S = 300.0

_FAST_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SLOW_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)
_VERSIONS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


def new_registry() -> CollectorRegistry:
    """Return a registry with ``build_info`` and the process's own metrics (memory, CPU, files)."""
    # They would double the number of series and say little.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    build = Gauge(PREFIX + "build_info", "Version of Phalanx.", ["version"], registry=registry)
    build.labels(version=_version()).set(1)
    return registry


class GrpcServerMetrics:
    """Calls answered by a gRPC server, under the names that the gRPC ecosystem uses: no prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.handled_total = Counter(
            "grpc_server_handled_total",
            "Calls finished, by status.",
            ["grpc_service", "grpc_method", "grpc_code"],
            registry=registry,
        )
        self.handling_seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from the start of a call to its status.",
            ["grpc_service", "grpc_method"],
            buckets=_FAST_S,
            registry=registry,
        )

    def observe(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count one finished call."""
        self.handled_total.labels(service, method, code).inc()
        self.handling_seconds.labels(service, method).observe(seconds)


class ControlMetrics:
    """Metrics of a control process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Maker(registry)
        self.leader = make.gauge("leader", "1 while this control process leads, else 0.")
        self.generation = make.gauge("generation", "Generation (fencing token) of this leadership.")
        self.workers = make.gauge("workers", "Workers, by state.", "state")
        self.slots = make.gauge("slots", "Slots of workers, by state.", "state")
        self.jobs = make.gauge("jobs", "Jobs, by state.", "state")
        self.job_queue_seconds = make.histogram(
            "job_queue_seconds", "Time from submission to start.", _SLOW_S
        )
        self.tasks_total = make.counter(
            "tasks_total",
            "Attempts at tasks (leaves, calls) that ended on workers, by outcome.",
            "program",
            "outcome",
        )
        self.redispatches_total = make.counter(
            "redispatches_total", "Shards given to another worker, by cause.", "cause"
        )
        self.recovery_seconds = make.histogram(
            "recovery_seconds",
            "Time from a failure to the end of each phase of its recovery.",
            _FAST_S,
            "cause",
            "phase",
        )
        self.dead_letters = make.gauge("dead_letters", "Shards that failed for good.")
        self.journal_append_seconds = make.histogram(
            "journal_append_seconds", "Time until a fact was durable.", _FAST_S
        )
        self.journal_lag_records = make.gauge(
            "journal_lag_records", "Facts waiting to become durable."
        )


class AggregatorMetrics:
    """Metrics of an aggregator; all carry ``job_id``, so use them through ``per_job``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Maker(registry)
        self.job_step = make.gauge("job_step", "Newest committed step.", "job_id")
        self.job_metric = make.gauge(
            "job_metric", "Newest value of a metric of the job.", "job_id", "metric"
        )
        self.job_examples_total = make.counter(
            "job_examples_total", "Examples in committed steps.", "job_id"
        )
        self.job_examples_lost_total = make.counter(
            "job_examples_lost_total", "Examples missing from committed steps.", "job_id"
        )
        self.job_examples_doubled_total = make.counter(
            "job_examples_doubled_total", "Examples counted twice in committed steps.", "job_id"
        )
        self.step_seconds = make.histogram(
            "step_seconds", "Time from one committed step to the next.", _FAST_S, "job_id"
        )
        self.steps_replayed_total = make.counter(
            "steps_replayed_total", "Steps computed again after a roll-back.", "job_id"
        )
        self.verified_leaves_total = make.counter(
            "verified_leaves_total", "Contributions of which enough copies were equal.", "job_id"
        )
        self.outvoted_copies_total = make.counter(
            "outvoted_copies_total",
            "Copies of contributions that differed from those of a majority.",
            "job_id",
        )
        self.staleness_versions = make.histogram(
            "staleness_versions",
            "Version at commit minus version used by a contribution.",
            _VERSIONS,
            "job_id",
        )
        self.task_round_trip_seconds = make.histogram(
            "task_round_trip_seconds",
            "Time from handing a task out until its result is durable, without its call.",
            _FAST_S,
            "job_id",
        )
        self.wire_bytes_total = make.counter(
            "wire_bytes_total", "Bytes of tensor frames.", "job_id", "direction", "encoding"
        )
        self.wire_uncompressed_bytes_total = make.counter(
            "wire_uncompressed_bytes_total",
            "Bytes that the tensor frames would have without compression.",
            "job_id",
            "direction",
        )
        self.checkpoint_seconds = make.histogram(
            "checkpoint_seconds", "Time from the copy to the durable part.", _SLOW_S, "job_id"
        )
        self.checkpoint_last_success_timestamp_seconds = make.gauge(
            "checkpoint_last_success_timestamp_seconds",
            "When the last checkpoint part became durable (Unix time).",
            "job_id",
        )
        self.per_job = PerJob(make.made)


class WorkerMetrics:
    """Metrics of a worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Maker(registry)
        self.leaf_seconds = make.histogram(
            "leaf_seconds", "Time of one leaf in its process.", _FAST_S, "program", "outcome"
        )
        self.cache_bytes = make.gauge("cache_bytes", "Size of the disk cache of chunks.")
        self.cache_requests_total = make.counter(
            "cache_requests_total", "Chunks asked of the disk cache.", "outcome"
        )
        self.member_bytes_total = make.counter(
            "member_bytes_total",
            "Bytes sent to other workers in jobs whose workers own the parameters.",
        )


class StorageMetrics:
    """Metrics of the storage service."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Maker(registry)
        self.storage_operation_seconds = make.histogram(
            "storage_operation_seconds",
            "Time of one operation of a back end.",
            _FAST_S,
            "operation",
            "backend",
            "outcome",
        )
        self.storage_bytes = make.gauge("storage_bytes", "Bytes stored, by kind.", "kind")
        self.storage_corruptions_total = make.counter(
            "storage_corruptions_total", "Stored objects whose checksum did not match."
        )


class PerJob:
    """Bounds the series of per-job metrics.

    At most JOB_SERIES_LIMIT jobs have series at once; those of an ended job go after
    JOB_SERIES_KEPT_S, or when a job that runs needs the place. Ask ``admits`` before touching a
    metric of a job; call ``expire`` now and then. Times are monotonic seconds.
    """

    def __init__(self, metrics: Iterable[MetricWrapperBase], limit: int = JOB_SERIES_LIMIT) -> None:
        self._metrics = tuple(metrics)
        self._limit = limit
        self._jobs: set[str] = set()
        self._ended: dict[str, float] = {}

    def admits(self, job_id: str) -> bool:
        """Return whether this job may have series, taking a free place for it if there is one."""
        if job_id in self._jobs:
            return True
        if len(self._jobs) >= self._limit:
            if not self._ended:
                return False
            self._drop(next(iter(self._ended)))
        self._jobs.add(job_id)
        return True

    def end(self, job_id: str, now_s: float) -> None:
        """Note that the job ended (or left this process) at ``now_s``."""
        if job_id in self._jobs:
            self._ended.setdefault(job_id, now_s)

    def resume(self, job_id: str) -> None:
        """Note that an ended job is back."""
        self._ended.pop(job_id, None)

    def expire(self, now_s: float) -> None:
        """Drop the series of jobs that ended JOB_SERIES_KEPT_S ago."""
        for job_id, ended_s in list(self._ended.items()):
            if now_s - ended_s >= JOB_SERIES_KEPT_S:
                self._drop(job_id)

    def _drop(self, job_id: str) -> None:
        for metric in self._metrics:
            metric.remove_by_labels({"job_id": job_id})
        del self._ended[job_id]
        self._jobs.discard(job_id)


class _Maker:
    """Makes metrics with the prefix in one registry and remembers them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.made: list[MetricWrapperBase] = []

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return self._kept(Gauge(PREFIX + name, help, labels, registry=self._registry))

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        return self._kept(Counter(PREFIX + name, help, labels, registry=self._registry))

    def histogram(
        self, name: str, help: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        metric = Histogram(PREFIX + name, help, labels, buckets=buckets, registry=self._registry)
        return self._kept(metric)

    def _kept(self, metric: MetricT) -> MetricT:
        self.made.append(metric)
        return metric


def _version() -> str:
    try:
        return version("phalanx")
    except PackageNotFoundError:
        return "unknown"
