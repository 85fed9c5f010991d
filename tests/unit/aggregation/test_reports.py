"""When the root tells control of a commit at once, not with the next of the regular reports."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from coordinator.aggregation import hosting
from coordinator.aggregation.core.effects import Caught, Committed, Refused
from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.gauges import JobGauges
from coordinator.aggregation.hosting import HostedJob
from phalanx import last_commit
from phalanx.errors import Unavailable
from phalanx.optimizers import build_optimizer
from phalanx.reduction import Node
from phalanx.telemetry.metrics import AggregatorMetrics, new_registry
from phalanx.testing.ranges import make_plan, parameter_ranges
from phalanx.training.decisions import RootDecider
from phalanx.v1.aggregation_service_pb2 import ExchangeHello
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord


@pytest.fixture
async def sent():
    return []


@pytest.fixture
async def job(sent, monkeypatch):
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)
    plan = make_plan(elements=10, steps=40)
    optimizer = build_optimizer(JobSpec.FromString(plan.spec).train, plan.total_steps)
    owned = parameter_ranges(plan, lambda _: "a")
    ranges = JobRanges(plan, 1, owned, optimizer, RootDecider(plan, 1))
    gauges = JobGauges(AggregatorMetrics(new_registry()), plan.job_id)
    made = HostedJob(ranges, None, gauges, sent.append)
    yield made
    await made.close()


def commit(job, version):
    job.perform([Committed(version, 8, 8)])


async def test_without_trouble_no_commit_is_told_by_itself(job, sent):
    for version in range(1, 6):
        commit(job, version)
    assert sent == []


async def test_the_first_commit_without_the_dead_is_told_at_once(job, sent):
    commit(job, 1)
    job.open_stream("a", ExchangeHello(worker_id="a"))
    job.close_stream("a")
    commit(job, 2)  # The dead may have had its part in this one.
    commit(job, 3)
    assert [message.WhichOneof("message") for message in sent] == ["job_report", "job_report"]
    for version in range(4, 20):
        commit(job, version)
    assert len(sent) == hosting.COMMITS_TOLD_AFTER_A_BREAK


def test_commits_are_measured_from_one_to_the_next_with_what_they_were_made_of():
    registry = new_registry()
    gauges = JobGauges(AggregatorMetrics(registry), "job-1")

    def value(name):
        return registry.get_sample_value(f"phalanx_{name}", {"job_id": "job-1"})

    gauges.committed(Committed(1, 8, 8, staleness=(0, 3)), now_s=10.0)
    gauges.committed(Committed(2, 6, 8, staleness=(2,)), now_s=10.5)
    gauges.committed(Committed(3, 9, 8, staleness=()), now_s=12.5)
    assert (value("step_seconds_count"), value("step_seconds_sum")) == (2, 2.5)
    assert (value("staleness_versions_count"), value("staleness_versions_sum")) == (3, 5)
    assert value("job_step") == 3
    assert value("job_examples_total") == 8 + 6 + 9
    assert (value("job_examples_lost_total"), value("job_examples_doubled_total")) == (2, 1)


async def test_who_sends_what_is_not_finite_is_told_once(job, sent):
    for version in range(1, 4):
        job.perform([Refused(version, (3, 7))])
    job.perform([Refused(4, (7,))])
    events = [message.member_event for message in sent]
    assert [event.type for event in events] == ["NON_FINITE_REFUSED"] * 2
    assert [event.details["shards"] for event in events] == ["3, 7", "7"]
    assert "left out of step 1" in events[0].message


async def test_who_is_outvoted_is_told_with_the_age_of_the_step_that_it_was_told_in(
    job, sent, monkeypatch
):
    now_s = 100.0
    clock = SimpleNamespace(monotonic=lambda: now_s, time=time.time)
    monkeypatch.setattr(hosting, "time", clock)
    monkeypatch.setattr(last_commit, "time", clock)
    commit(job, 1)
    now_s = 105.0
    train = GoRecord.ACTION_TRAIN
    caught = Caught("a", "incarnation", 1, train, Node(0, 1), "0" * 64, "1" * 64, ("b", "c"))
    sent.clear()
    job.perform([caught, Committed(2, 8, 8)])
    told = [message.job_report for message in sent if message.job_report.outvoted_workers]
    assert [report.since_commit_s for report in told] == [0.0]
    assert [each.worker_id for each in told[0].outvoted_workers] == ["a"]


async def test_a_checkpoint_that_waits_is_told_to_each_leader_until_it_is_written(
    job, sent, monkeypatch
):
    now_s = 100.0
    monkeypatch.setattr(hosting, "time", SimpleNamespace(monotonic=lambda: now_s, time=time.time))
    job._storage_away(Unavailable("no answer"), 1)
    now_s = 102.5
    job._storage_away(Unavailable("no answer"), 2)  # to the same leader: it knows
    job.session_opened()
    now_s = 103.0
    job._storage_back()
    job.session_opened()
    events = [message.member_event for message in sent if message.HasField("member_event")]
    assert [(event.type, float(event.details["waited_s"])) for event in events] == [
        ("STORAGE_UNAVAILABLE", 0.0),
        ("STORAGE_UNAVAILABLE", 2.5),
        ("STORAGE_RESTORED", 3.0),
    ]
    assert events[1].details["reason"] == "UNAVAILABLE"


async def test_reports_tell_how_old_the_commit_is_when_they_are_sent(job, sent, monkeypatch):
    """Also the last one, which is told to each leader."""
    now_s = 100.0
    clock = SimpleNamespace(monotonic=lambda: now_s, time_ns=lambda: 0, time=time.time)
    monkeypatch.setattr(hosting, "time", clock)
    monkeypatch.setattr(last_commit, "time", clock)
    job.session_opened()
    commit(job, 1)
    now_s = 100.5
    job.fail("AGGREGATION_FAILED", "it broke")
    now_s = 107.25
    job.session_opened()
    first, *later = [each.job_report for each in sent if each.HasField("job_report")]
    assert not first.HasField("since_commit_s")
    assert [each.since_commit_s for each in later] == [0.5, 7.25]
