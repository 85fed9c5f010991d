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

PROGRESS = (
    ("step",),
    ("planned_steps",),
    ("examples",),
    ("lost_examples",),
    ("doubled_examples",),
    ("loss_allowed",),
    ("metric", "metric"),
    ("workers",),
    ("waiting", "reason"),
    ("changed_timestamp_seconds",),
    ("checkpoint_step",),
    ("checkpoint_timestamp_seconds",),
)

CONTRACT = {
    ControlMetrics: {
        "phalanx_leader": (GAUGE, ()),
        "phalanx_generation": (GAUGE, ()),
        "phalanx_storage_available": (GAUGE, ()),
        "phalanx_workers": (GAUGE, ("state",)),
        "phalanx_slots": (GAUGE, ("state",)),
        "phalanx_worker_speed_ratio": (GAUGE, ("worker_id",)),
        "phalanx_aggregators": (GAUGE, ("state",)),
        "phalanx_jobs": (GAUGE, ("state",)),
        "phalanx_job_queue_oldest_seconds": (GAUGE, ()),
        "phalanx_job_queue_seconds": (HISTOGRAM, ()),
        "phalanx_tasks_total": (COUNTER, ("program", "outcome")),
        "phalanx_redispatches_total": (COUNTER, ("cause",)),
        "phalanx_recovery_seconds": (HISTOGRAM, ("cause", "phase")),
        "phalanx_incidents_open": (GAUGE, ()),
        "phalanx_events_total": (COUNTER, ("type",)),
        "phalanx_events_dropped_total": (COUNTER, ()),
        "phalanx_dead_letters": (GAUGE, ()),
        "phalanx_journal_append_seconds": (HISTOGRAM, ()),
        "phalanx_journal_lag_records": (GAUGE, ()),
        **{f"phalanx_job_progress_{name}": (GAUGE, ("job_id", *more)) for name, *more in PROGRESS},
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
        "phalanx_control_connected": (GAUGE, ()),
    },
    WorkerMetrics: {
        "phalanx_leaf_seconds": (HISTOGRAM, ("program", "outcome")),
        "phalanx_leaf_examples_total": (COUNTER, ()),
        "phalanx_control_connected": (GAUGE, ()),
        "phalanx_cache_bytes": (GAUGE, ()),
        "phalanx_cache_requests_total": (COUNTER, ("outcome",)),
        "phalanx_member_bytes_total": (COUNTER, ()),
    },
    StorageMetrics: {
        "phalanx_storage_operation_seconds": (HISTOGRAM, ("operation", "backend", "outcome")),
        "phalanx_storage_bytes": (GAUGE, ("kind",)),
        "phalanx_storage_corruptions_total": (COUNTER, ()),
        "phalanx_storage_scrub_corrupt_records": (GAUGE, ()),
        "phalanx_storage_scrub_timestamp_seconds": (GAUGE, ()),
        "phalanx_storage_disk_size_bytes": (GAUGE, ()),
        "phalanx_storage_disk_free_bytes": (GAUGE, ()),
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
        owner = metrics
        if attribute.startswith("job_progress_"):
            owner, attribute = metrics.progress, attribute.removeprefix("job_progress_")
        assert isinstance(getattr(owner, attribute), MetricWrapperBase)


UNIT_SUFFIXES = ("_seconds", "_bytes", "_ratio", "_info", "_total")
COUNTED = ("leader", "generation", "available", "connected", "allowed", "waiting", "metric")


@pytest.mark.parametrize("service", CONTRACT)
def test_names_end_with_a_base_unit_or_with_what_is_counted(service: type) -> None:
    things = "workers|slots|jobs|step|steps|examples|aggregators|versions|records|letters|open"
    endings = (*UNIT_SUFFIXES, *COUNTED, *things.split("|"))
    for name, (kind, _) in CONTRACT[service].items():
        assert name.endswith(endings), name
        assert name.endswith("_total") == (kind == COUNTER), name
        assert not any(unit in name for unit in ("_ms", "milli", "_mb", "kilo", "percent")), name


@pytest.mark.parametrize("service", CONTRACT)
def test_every_metric_says_in_a_sentence_what_it_is(service: type) -> None:
    registry = CollectorRegistry(auto_describe=True)
    service(registry)
    for family in registry.collect():
        assert family.documentation[:1].isupper() or family.documentation[:1].isdigit()
        assert family.documentation.endswith(".")


def test_a_process_says_who_it_is() -> None:
    text = generate_latest(new_registry("worker", "worker-7")).decode()
    assert 'phalanx_process_info{member_id="worker-7",role="worker"} 1.0' in text
    assert "phalanx_process_info" not in generate_latest(new_registry()).decode()


def test_services_have_no_name_twice_and_all_can_share_the_process_metrics() -> None:
    registry = new_registry()
    for service in CONTRACT:
        if service is not WorkerMetrics:  # has one name in common with aggregators
            service(registry)
    common = CONTRACT[WorkerMetrics].keys() & CONTRACT[AggregatorMetrics].keys()
    assert common == {"phalanx_control_connected"}
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


def test_series_of_jobs_that_are_not_kept_go_at_once() -> None:
    registry = CollectorRegistry()
    metrics = ControlMetrics(registry).progress
    for job_id in ("a", "b"):
        assert metrics.per_job.admits(job_id)
        metrics.metric.labels(job_id=job_id, metric="train/loss").set(1)
    metrics.per_job.keep_only({"b", "c"})
    text = generate_latest(registry).decode()
    assert 'job_id="a"' not in text
    assert 'job_id="b"' in text


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
