"""What control shows at /metrics is what is the case."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from coordinator.control import core as control_core
from coordinator.control import gauges as control_gauges
from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts
from coordinator.control.core.speeds import Speed
from coordinator.control.gauges import Gauges
from coordinator.control.journal import JournalWriter
from coordinator.control.labels import KNOWN
from phalanx.telemetry.metrics import ControlMetrics, new_registry
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import ControlRecord, WorkerDrained


@pytest.fixture
def registry() -> CollectorRegistry:
    return new_registry()


@pytest.fixture
def gauges(registry: CollectorRegistry) -> Gauges:
    return Gauges(ControlMetrics(registry))


def poison(cluster: Any, shard: int) -> None:
    """A leaf fails on every worker that has its shard, until the job has failed."""
    for name in ("w1", "w2", "w3"):
        failed = pb.LeafFailed(
            job_id="job-1", term=1, step=7, shard=shard, kind=pb.LeafFailed.KIND_RAISED
        )
        cluster.say(cluster.sessions[name], leaf_failed=failed)
    assert cluster.state() == "FAILED"


def test_the_time_in_the_queue_goes_from_submission_to_start(
    cluster: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    cluster.aggregator()
    cluster.submit()
    cluster.advance(7.0)
    assert cluster.state() == "QUEUED"
    cluster.worker("w1")
    cluster.advance(5.0)
    assert cluster.state() == "RUNNING"
    for effect in cluster.observed:
        gauges.observe(effect)
    assert registry.get_sample_value("phalanx_job_queue_seconds_count") == 1
    assert registry.get_sample_value("phalanx_job_queue_seconds_sum") == pytest.approx(7.0)


def test_a_job_that_starts_again_has_not_been_in_the_queue(running: Any) -> None:
    before = [each for each in running.observed if each.metric == "job_queue_seconds"]
    assert [each.value for each in before] == [0.0]
    running.kill("a1")
    running.advance(5.0)
    running.aggregator(incarnation="a1-2")
    assert running.core.facts.jobs["job-1"].term == 2
    after = [each for each in running.observed if each.metric == "job_queue_seconds"]
    assert after == before


def test_dead_letters_are_the_shards_that_failed_jobs_name(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    def dead_letters() -> float | None:
        gauges.show(running.core, running.durable, 0)
        return registry.get_sample_value("phalanx_dead_letters")

    assert dead_letters() == 0
    poison(running, shard=3)
    assert dead_letters() == len(running.job().failures) == 1
    running.call(ev.DeleteJob, "job-1")
    assert dead_letters() == 0


class SlowStore:
    """Takes a batch when it is let."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(0)

    async def append_exactly(
        self, _stream: str, first: int, records: list[bytes], _owners: Any
    ) -> int:
        await self.turns.acquire()
        return first + len(records)


async def test_the_lag_is_what_is_decided_and_not_yet_durable(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    store, durable = SlowStore(), asyncio.Queue[int]()
    journal = JournalWriter(
        store,  # type: ignore[arg-type]
        generation=1,
        next_sequence=0,
        records_read=0,
        durable=Facts(),
        snapshot_every=1000,
        on_durable=lambda index, _: durable.put_nowait(index),
        observe_append_s=gauges.observe_append,
    )

    def lag() -> float | None:
        gauges.show(running.core, running.durable, journal.lag)
        return registry.get_sample_value("phalanx_journal_lag_records")

    writing = asyncio.create_task(journal.run())
    drained = ControlRecord(worker_drained=WorkerDrained(worker_id="w1", incarnation="w1-1"))
    journal.append(1, drained)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    journal.append(2, drained)  # the first is on its way already
    journal.append(3, drained)
    assert lag() == 3
    store.turns.release()
    assert await durable.get() == 1
    assert lag() == 2
    store.turns.release()
    await journal.drained()
    assert lag() == 0
    assert registry.get_sample_value("phalanx_journal_append_seconds_count") == 2
    writing.cancel()


def test_members_and_jobs_are_counted_by_state(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    running.worker("w4", slots=5)
    running.submit("job-2", request_id="second")
    running.kill("w1")
    gauges.show(running.core, running.durable, 4)

    def value(name: str, state: str) -> float | None:
        return registry.get_sample_value(f"phalanx_{name}", {"state": state})

    assert (value("workers", "ready"), value("workers", "lost")) == (3, 1)
    assert (value("slots", "ready"), value("slots", "lost")) == (9, 2)
    assert (value("jobs", "running"), value("jobs", "failed")) == (2, 0)
    assert registry.get_sample_value("phalanx_journal_lag_records") == 4


def show(cluster: Any, gauges: Gauges) -> None:
    gauges.show(cluster.core, cluster.durable, 0)


def test_a_job_that_runs_shows_how_far_it_is_and_one_that_ended_does_not(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    def value(name: str, **labels: str) -> float | None:
        full = f"phalanx_job_progress_{name}"
        return registry.get_sample_value(full, {"job_id": "job-1", **labels})

    show(running, gauges)
    assert value("workers") == 3
    assert value("step") is None, "nothing was reported yet"
    began_s = value("changed_timestamp_seconds")
    running.advance(5.0)
    show(running, gauges)
    assert value("changed_timestamp_seconds") == began_s
    metrics = {"train/loss": 0.25, "test/loss": float("nan")}
    counts = {"examples": 700, "examples_lost": 3, "checkpoint_step": 5}
    running.report("job-1", 7, metrics=metrics, **counts)
    show(running, gauges)
    assert (value("step"), value("examples"), value("lost_examples")) == (7, 700, 3)
    assert (value("checkpoint_step"), value("doubled_examples")) == (5, 0)
    assert value("metric", metric="train/loss") == 0.25
    assert value("metric", metric="test/loss") is None, "there is none yet"
    moved_s = value("changed_timestamp_seconds")
    assert moved_s is not None
    assert began_s is not None
    assert moved_s > began_s
    assert value("checkpoint_timestamp_seconds") == moved_s
    poison(running, shard=3)
    show(running, gauges)
    assert value("step") is None
    assert value("workers") is None


def test_a_job_that_waits_says_for_what(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    labels = {"job_id": "job-1", "reason": "WAITING_FOR_WORKERS"}
    show(running, gauges)
    assert registry.get_sample_value("phalanx_job_progress_waiting", labels) is None
    for name in ("w1", "w2", "w3"):
        running.kill(name)
    running.advance(5.0)
    show(running, gauges)
    assert registry.get_sample_value("phalanx_job_progress_waiting", labels) == 1
    running.worker("w9")
    running.advance(1.0)
    show(running, gauges)
    assert registry.get_sample_value("phalanx_job_progress_waiting", labels) is None


def test_the_oldest_queued_job_is_known(
    cluster: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    cluster.submit()
    cluster.advance(7.0)
    show(cluster, gauges)
    assert registry.get_sample_value("phalanx_job_queue_oldest_seconds") == pytest.approx(7.0)


def test_who_does_not_lead_any_more_tells_nothing_of_the_cluster(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    gauges.leads(3)
    show(running, gauges)
    assert registry.get_sample_value("phalanx_workers", {"state": "ready"}) == 3
    gauges.leads(0)
    assert registry.get_sample_value("phalanx_leader") == 0
    for name in ("workers", "slots", "jobs", "aggregators"):
        series = [s for f in registry.collect() if f.name == f"phalanx_{name}" for s in f.samples]
        assert not series, name
    assert registry.get_sample_value("phalanx_job_progress_workers", {"job_id": "job-1"}) is None


def test_a_worker_that_is_slower_than_the_others_is_named(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    job = running.core.jobs["job-1"]
    for name, leaf_s in (("w1", 0.1), ("w2", 0.1), ("w3", 0.4)):
        job.speeds[name] = Speed(leaves=10, seconds=10 * leaf_s, leaf_s=leaf_s)
        job.speeds[name].changed_s = running.core.now.monotonic_s
    show(running, gauges)

    def ratio(worker_id: str) -> float | None:
        labels = {"worker_id": worker_id}
        return registry.get_sample_value("phalanx_worker_speed_ratio", labels)

    assert (ratio("w1"), ratio("w2"), ratio("w3")) == (1.0, 1.0, 0.25)
    running.kill("w3")
    show(running, gauges)
    assert ratio("w3") is None


def test_of_many_workers_only_the_slowest_have_series(
    running: Any, gauges: Gauges, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_gauges, "SLOW_WORKERS_SHOWN", 2)
    show(running, gauges)
    (family,) = (each for each in registry.collect() if each.name == "phalanx_worker_speed_ratio")
    assert len(family.samples) == 2


def test_what_can_be_counted_is_counted_from_zero(gauges: Gauges, registry: Any) -> None:
    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"phalanx_{name}", labels)

    assert value("events_total", type="WORKER_LOST") == 0
    assert value("redispatches_total", cause="worker_lost") == 0
    assert value("recovery_seconds_count", cause="worker_lost", phase="total") == 0
    assert value("tasks_total", program="train", outcome="done") == 0
    gauges.told("WORKER_LOST")
    assert value("events_total", type="WORKER_LOST") == 1


def test_what_a_member_makes_up_is_no_series_of_its_own(gauges: Gauges, registry: Any) -> None:
    gauges.observe(fx.Observe("redispatches_total", 1, (("cause", "made-up-1"),)))
    gauges.observe(fx.Observe("redispatches_total", 2, (("cause", "made-up-2"),)))
    found = registry.get_sample_value("phalanx_redispatches_total", {"cause": "other"})
    assert found == 3
    assert not registry.get_sample_value("phalanx_redispatches_total", {"cause": "made-up-1"})


def test_events_that_were_dropped_are_counted_over_leaderships(
    running: Any, gauges: Gauges, registry: CollectorRegistry
) -> None:
    gauges.leads(1)
    gauges.show(running.core, running.durable, 0, events_dropped=5)
    gauges.show(running.core, running.durable, 0, events_dropped=7)
    gauges.leads(0)
    gauges.leads(2)
    gauges.show(running.core, running.durable, 0, events_dropped=1)
    assert registry.get_sample_value("phalanx_events_dropped_total") == 8


def test_every_cause_that_the_core_names_is_known() -> None:
    causes = {cause for each in KNOWN["redispatches_total"] for cause in each.values()}
    folder = Path(control_core.__file__).parent
    named = set[str]()
    for path in folder.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call):
                named |= {
                    each.value.value
                    for each in call.keywords
                    if each.arg == "cause" and isinstance(each.value, ast.Constant)
                }
    assert len(named) >= 5, "this finds the calls"
    assert named <= causes
