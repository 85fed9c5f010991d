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


def new_registry(role: str = "", member_id: str = "") -> CollectorRegistry:
    """Return a registry with ``build_info`` and the process's own metrics (memory, CPU, files).

    With a role ``process_info`` names the process: Prometheus knows it by its address only.
    """
    # They would double the number of series and say little.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    build = Gauge(PREFIX + "build_info", "Version of Phalanx.", ["version"], registry=registry)
    build.labels(version=_version()).set(1)
    if role:
        info = Gauge(
            PREFIX + "process_info",
            "Who this process is: its part in the cluster and its stable name.",
            ["role", "member_id"],
            registry=registry,
        )
        info.labels(role=role, member_id=member_id).set(1)
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


class TraceMetrics:
    """What becomes of the spans of a process that traces."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.spans_total = Counter(
            PREFIX + "trace_spans_total",
            "Spans that were sampled, by what became of them: sent or dropped.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("sent", "dropped"):
            self.spans_total.labels(outcome)

    def count(self, outcome: str, spans: int) -> None:
        """Add spans that were sent or dropped."""
        self.spans_total.labels(outcome).inc(spans)


class ControlMetrics:
    """Metrics of a control process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Maker(registry)
        self.leader = make.gauge("leader", "1 while this control process leads, else 0.")
        self.generation = make.gauge("generation", "Generation (fencing token) of this leadership.")
        self.storage_available = make.gauge(
            "storage_available", "1 while storage answers this control process, else 0."
        )
        self.workers = make.gauge("workers", "Workers, by state.", "state")
        self.slots = make.gauge("slots", "Slots of workers, by state.", "state")
        self.worker_speed_ratio = make.gauge(
            "worker_speed_ratio",
            "How many times as fast as usual a worker computes leaves, in the job where it is "
            "slowest; of the slowest workers only.",
            "worker_id",
        )
        self.aggregators = make.gauge("aggregators", "Aggregators, by state.", "state")
        self.jobs = make.gauge("jobs", "Jobs, by state.", "state")
        self.job_queue_oldest_seconds = make.gauge(
            "job_queue_oldest_seconds", "How long the oldest queued job has waited; 0 for none."
        )
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
        self.incidents_open = make.gauge(
            "incidents_open", "Failures from which the cluster has not recovered yet."
        )
        self.events_total = make.counter("events_total", "Events, by type.", "type")
        self.events_dropped_total = make.counter(
            "events_dropped_total", "Events lost to people because storage was away for too long."
        )
        self.dead_letters = make.gauge("dead_letters", "Shards that failed for good.")
        self.journal_append_seconds = make.histogram(
            "journal_append_seconds", "Time until a fact was durable.", _FAST_S
        )
        self.journal_lag_records = make.gauge(
            "journal_lag_records", "Facts waiting to become durable."
        )
        self.progress = JobProgressMetrics(registry)


class JobProgressMetrics:
    """What the leader knows of each job that runs, whatever kind it is and whoever owns its ranges.

    A job that does not run has none of these series: that a job has some says that it runs. Values
    are those of the history that counts, so they go back when a job is rolled back.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Maker(registry, PREFIX + "job_progress_")
        self.step = make.gauge("step", "Newest step that the leader heard of.", "job_id")
        self.planned_steps = make.gauge(
            "planned_steps", "Steps after which the job ends at the latest; 0: not known.", "job_id"
        )
        self.examples = make.gauge("examples", "Examples in the committed steps.", "job_id")
        self.lost_examples = make.gauge(
            "lost_examples", "Examples missing from the committed steps.", "job_id"
        )
        self.doubled_examples = make.gauge(
            "doubled_examples", "Examples counted twice in the committed steps.", "job_id"
        )
        self.loss_allowed = make.gauge(
            "loss_allowed",
            "1 where the job's own spec lets steps go on without examples.",
            "job_id",
        )
        self.metric = make.gauge(
            "metric", "Newest value of a metric of the job.", "job_id", "metric"
        )
        self.workers = make.gauge("workers", "Workers that host shards of the job.", "job_id")
        self.waiting = make.gauge(
            "waiting", "1 while the job cannot go on, with what it waits for.", "job_id", "reason"
        )
        self.changed_timestamp_seconds = make.gauge(
            "changed_timestamp_seconds",
            "When the step changed, or the job was first seen to run by this leader (Unix time).",
            "job_id",
        )
        self.checkpoint_step = make.gauge(
            "checkpoint_step", "Step of the newest complete checkpoint.", "job_id"
        )
        self.checkpoint_timestamp_seconds = make.gauge(
            "checkpoint_timestamp_seconds",
            "When that checkpoint was complete, or the job was first seen to run by this leader "
            "(Unix time).",
            "job_id",
        )
        self.per_job = PerJob(make.made)


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
        self.per_job = PerJob(tuple(make.made))
        self.control_connected = make.gauge(
            "control_connected", "1 while there is a session with control, else 0."
        )


class WorkerMetrics:
    """Metrics of a worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make = _Maker(registry)
        self.leaf_seconds = make.histogram(
            "leaf_seconds", "Time of one leaf in its process.", _FAST_S, "program", "outcome"
        )
        self.leaf_examples_total = make.counter(
            "leaf_examples_total",
            "Examples in training leaves that were computed, whether or not they came to count.",
        )
        self.control_connected = make.gauge(
            "control_connected", "1 while there is a session with control, else 0."
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
        self.storage_scrub_corrupt_records = make.gauge(
            "storage_scrub_corrupt_records", "Damaged rows and blobs that the last scrub found."
        )
        self.storage_scrub_timestamp_seconds = make.gauge(
            "storage_scrub_timestamp_seconds", "When the last scrub of everything ended; 0: none."
        )
        self.storage_disk_size_bytes = make.gauge(
            "storage_disk_size_bytes", "Size of the disk of the state folder."
        )
        self.storage_disk_free_bytes = make.gauge(
            "storage_disk_free_bytes", "Room on that disk for what storage writes."
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

    def keep_only(self, job_ids: Iterable[str]) -> None:
        """Drop the series of all other jobs at once."""
        for job_id in self._jobs.difference(job_ids):
            self._drop(job_id)

    def _drop(self, job_id: str) -> None:
        for metric in self._metrics:
            metric.remove_by_labels({"job_id": job_id})
        self._ended.pop(job_id, None)
        self._jobs.discard(job_id)


class _Maker:
    """Makes metrics with the prefix in one registry and remembers them."""

    def __init__(self, registry: CollectorRegistry, prefix: str = PREFIX) -> None:
        self._registry = registry
        self._prefix = prefix
        self.made: list[MetricWrapperBase] = []

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return self._kept(Gauge(self._prefix + name, help, labels, registry=self._registry))

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        return self._kept(Counter(self._prefix + name, help, labels, registry=self._registry))

    def histogram(
        self, name: str, help: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        metric = Histogram(
            self._prefix + name, help, labels, buckets=buckets, registry=self._registry
        )
        return self._kept(metric)

    def _kept(self, metric: MetricT) -> MetricT:
        self.made.append(metric)
        return metric


def _version() -> str:
    try:
        return version("phalanx")
    except PackageNotFoundError:
        return "unknown"
