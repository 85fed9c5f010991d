"""What control shows at /metrics is what is the case."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts
from coordinator.control.gauges import Gauges
from coordinator.control.journal import JournalWriter
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

    async def append_exactly(self, _stream: str, first: int, records: list[bytes]) -> int:
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
