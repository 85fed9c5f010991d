"""Names and labels of metrics are a contract; here it is, once more and by hand."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from phalanx.telemetry.metrics import (
    JOB_SERIES_KEPT_S,
    AggregatorMetrics,
    ControlMetrics,
    GrpcServerMetrics,
    PerJob,
    StorageMetrics,
    WorkerMetrics,
    new_registry,
)

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

CONTRACT = {
    ControlMetrics: {
        "phalanx_leader": (GAUGE, ()),
        "phalanx_generation": (GAUGE, ()),
        "phalanx_workers": (GAUGE, ("state",)),
        "phalanx_slots": (GAUGE, ("state",)),
        "phalanx_jobs": (GAUGE, ("state",)),
        "phalanx_job_queue_seconds": (HISTOGRAM, ()),
        "phalanx_tasks_total": (COUNTER, ("program", "outcome")),
        "phalanx_redispatches_total": (COUNTER, ("cause",)),
        "phalanx_recovery_seconds": (HISTOGRAM, ("cause", "phase")),
        "phalanx_dead_letters": (GAUGE, ()),
        "phalanx_journal_append_seconds": (HISTOGRAM, ()),
        "phalanx_journal_lag_records": (GAUGE, ()),
    },
    AggregatorMetrics: {
        "phalanx_job_step": (GAUGE, ("job_id",)),
        "phalanx_job_metric": (GAUGE, ("job_id", "metric")),
        "phalanx_job_examples_total": (COUNTER, ("job_id",)),
        "phalanx_job_examples_lost_total": (COUNTER, ("job_id",)),
        "phalanx_job_examples_doubled_total": (COUNTER, ("job_id",)),
        "phalanx_step_seconds": (HISTOGRAM, ("job_id",)),
        "phalanx_steps_replayed_total": (COUNTER, ("job_id",)),
        "phalanx_staleness_versions": (HISTOGRAM, ("job_id",)),
        "phalanx_task_round_trip_seconds": (HISTOGRAM, ("job_id",)),
        "phalanx_verified_leaves_total": (COUNTER, ("job_id",)),
        "phalanx_outvoted_copies_total": (COUNTER, ("job_id",)),
        "phalanx_wire_bytes_total": (COUNTER, ("job_id", "direction", "encoding")),
        "phalanx_wire_uncompressed_bytes_total": (COUNTER, ("job_id", "direction")),
        "phalanx_checkpoint_seconds": (HISTOGRAM, ("job_id",)),
        "phalanx_checkpoint_last_success_timestamp_seconds": (GAUGE, ("job_id",)),
    },
    WorkerMetrics: {
        "phalanx_leaf_seconds": (HISTOGRAM, ("program", "outcome")),
        "phalanx_cache_bytes": (GAUGE, ()),
        "phalanx_cache_requests_total": (COUNTER, ("outcome",)),
        "phalanx_member_bytes_total": (COUNTER, ()),
    },
    StorageMetrics: {
        "phalanx_storage_operation_seconds": (HISTOGRAM, ("operation", "backend", "outcome")),
        "phalanx_storage_bytes": (GAUGE, ("kind",)),
        "phalanx_storage_corruptions_total": (COUNTER, ()),
    },
    GrpcServerMetrics: {
        "grpc_server_handled_total": (COUNTER, ("grpc_service", "grpc_method", "grpc_code")),
        "grpc_server_handling_seconds": (HISTOGRAM, ("grpc_service", "grpc_method")),
    },
}


def _declared(registry: CollectorRegistry) -> dict[str, tuple[str, tuple[str, ...]]]:
    found = {}
    for family in registry.collect():
        name = family.name + ("_total" if family.type == COUNTER else "")
        collector = registry._names_to_collectors[family.name]
        assert isinstance(collector, MetricWrapperBase)
        found[name] = (family.type, tuple(collector._labelnames))
    return found


@pytest.mark.parametrize("service", CONTRACT)
def test_names_types_and_labels_are_those_of_the_contract(service: type) -> None:
    registry = CollectorRegistry(auto_describe=True)
    service(registry)
    assert _declared(registry) == CONTRACT[service]


@pytest.mark.parametrize("service", CONTRACT)
def test_every_attribute_is_named_as_its_metric(service: type) -> None:
    metrics = service(CollectorRegistry())
    for metric in CONTRACT[service]:
        attribute = metric.removeprefix("phalanx_").removeprefix("grpc_server_")
        assert isinstance(getattr(metrics, attribute), MetricWrapperBase)


def test_all_services_can_share_one_registry_with_the_process_metrics() -> None:
    registry = new_registry()
    for service in CONTRACT:
        service(registry)
    text = generate_latest(registry).decode()
    assert 'phalanx_build_info{version="' in text
    assert "process_resident_memory_bytes" in text
    assert "_created" not in text
    # "job" would become "exported_job" when scraped.
    assert 'job="' not in text


def test_series_of_a_job_are_bounded_and_go_after_its_end() -> None:
    registry = CollectorRegistry()
    metrics = AggregatorMetrics(registry)
    per_job = PerJob([metrics.job_step, metrics.job_metric], limit=2)
    for job_id in ("a", "b"):
        assert per_job.admits(job_id)
        metrics.job_step.labels(job_id=job_id).set(1)
        metrics.job_metric.labels(job_id=job_id, metric="train/loss").set(0.5)
    assert not per_job.admits("c")
    assert per_job.admits("a")

    per_job.end("a", now_s=100.0)
    per_job.expire(now_s=100.0 + JOB_SERIES_KEPT_S - 1)
    assert 'phalanx_job_step{job_id="a"}' in generate_latest(registry).decode()
    per_job.expire(now_s=100.0 + JOB_SERIES_KEPT_S)
    text = generate_latest(registry).decode()
    assert 'job_id="a"' not in text
    assert 'phalanx_job_metric{job_id="b",metric="train/loss"} 0.5' in text
    assert per_job.admits("c")


def test_jobs_that_ended_make_room_for_one_that_runs_the_oldest_first() -> None:
    registry = CollectorRegistry()
    metrics = AggregatorMetrics(registry)
    per_job = PerJob([metrics.job_step], limit=3)
    for job_id in ("a", "b", "c"):
        assert per_job.admits(job_id)
        metrics.job_step.labels(job_id=job_id).set(1)
    per_job.end("b", now_s=1.0)
    per_job.end("a", now_s=2.0)
    assert per_job.admits("d")
    text = generate_latest(registry).decode()
    assert [job_id in text for job_id in ('job_id="a"', 'job_id="b"', 'job_id="c"')] == [1, 0, 1]
    assert per_job.admits("e")
    assert not per_job.admits("f"), "c, d and e run"


def test_a_job_that_comes_back_keeps_its_series() -> None:
    registry = CollectorRegistry()
    metrics = AggregatorMetrics(registry)
    per_job = metrics.per_job
    assert per_job.admits("a")
    metrics.job_step.labels(job_id="a").set(7)
    per_job.end("a", now_s=0.0)
    per_job.resume("a")
    per_job.expire(now_s=10 * JOB_SERIES_KEPT_S)
    assert 'phalanx_job_step{job_id="a"} 7.0' in generate_latest(registry).decode()


def test_ten_thousand_jobs_add_no_more_series_than_the_limit() -> None:
    registry = CollectorRegistry()
    metrics = AggregatorMetrics(registry)
    for number in range(10_000):
        job_id = f"job-{number}"
        if metrics.per_job.admits(job_id):
            metrics.job_step.labels(job_id=job_id).set(number)
    assert generate_latest(registry).decode().count("phalanx_job_step{") == 100
