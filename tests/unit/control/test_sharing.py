"""Several jobs: where they are, what each gets, and whose turn it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.control.core import events as ev
from coordinator.control.core import sharing
from coordinator.control.core.sharing import AGEING_S
from coordinator.control.core.state import CoreConfig
from phalanx.v1 import coordination_service_pb2 as pb

LIMITED = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 300), min_size=1)


@given(own=st.integers(1, 100), everywhere=st.integers(0, 500), limited=LIMITED)
def test_a_part_is_what_the_weights_say(own: int, everywhere: int, limited: dict[str, int]) -> None:
    parts = sharing.parts(own, everywhere, limited)
    assert max(parts.values()) == 1
    for one, part in parts.items():
        for other in parts:
            ratio = (own + everywhere + limited[other]) / (own + everywhere + limited[one])
            assert part / parts[other] == pytest.approx(ratio)


@given(own=st.integers(1, 100), everywhere=st.integers(0, 500), there=st.integers(0, 300))
def test_jobs_that_are_everywhere_alike_change_nothing(
    own: int, everywhere: int, there: int
) -> None:
    assert set(sharing.parts(own, everywhere, dict.fromkeys("abc", there)).values()) == {1.0}


def test_even_the_last_has_a_weight_and_its_turn() -> None:
    assert sharing.weight(0) == 1
    assert sharing.rank(0, 101 * AGEING_S) > sharing.rank(100, 0)


def one(spec: Any) -> None:
    spec.resources.max_workers = 1


def test_jobs_without_a_limit_are_on_all_workers(running: Any) -> None:
    running.submit("job-2")
    for name in ("w1", "w2", "w3"):
        assert running.shards(name, "job-1")
        assert running.shards(name, "job-2")


def test_limited_jobs_go_where_least_is_to_do(cluster: Any) -> None:
    cluster.aggregator()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)
    for number in range(3):
        cluster.submit(f"job-{number}", edit=one)
    hosts = [set(cluster.core.jobs[f"job-{number}"].hosts) for number in range(3)]
    assert hosts == [{"w1"}, {"w2"}, {"w3"}]
    cluster.call(ev.CancelJob, "job-1")
    cluster.submit("job-3", edit=one)
    assert set(cluster.core.jobs["job-3"].hosts) == {"w2"}
    cluster.submit("job-4", edit=one)
    kept = {name: set(cluster.core.jobs[name].hosts) for name in ("job-0", "job-2")}
    assert kept == {"job-0": {"w1"}, "job-2": {"w3"}}, "nobody else moves"


def test_a_heavy_job_counts_for_more_than_a_light_one(cluster: Any) -> None:
    def heavy(spec: Any) -> None:
        one(spec)
        spec.priority = 100

    cluster.aggregator()
    for name in ("w1", "w2"):
        cluster.worker(name)
    cluster.submit("job-0", edit=heavy)
    for number in (1, 2, 3):
        cluster.submit(f"job-{number}", edit=one)
    hosts = [next(iter(cluster.core.jobs[f"job-{number}"].hosts)) for number in range(4)]
    assert hosts == ["w1", "w2", "w2", "w1"]


def test_a_job_makes_room_for_a_limited_one_and_grows_again(cluster: Any) -> None:
    cluster.aggregator()
    sessions = {name: cluster.worker(name, slots=1) for name in ("w1", "w2")}
    cluster.submit("job-1")

    def go(seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            go.beat += 1
            cluster.time_s += 0.5
            cluster.heartbeats("a1")
            for name, session in sessions.items():
                told = pb.WorkerJobProgress(
                    job_id="job-1", term=1, train_leaves=9 * go.beat, train_leaf_seconds=go.beat
                )
                cluster.say(session, heartbeat=pb.Heartbeat(jobs=[told]))
                assert name in cluster.core.workers
            cluster.report("job-1", go.beat)
            cluster.feed(ev.Tick())

    go.beat = 0

    def counts() -> list[int]:
        owners = list(cluster.core.jobs["job-1"].train.owners.values())
        return [owners.count("w1"), owners.count("w2")]

    go(5.0)
    assert counts() == [8, 8]
    cluster.submit("job-2", edit=one)
    assert set(cluster.core.jobs["job-2"].hosts) == {"w1"}
    go(10.0)
    assert counts() == [5, 11]
    cluster.call(ev.CancelJob, "job-2")
    go(20.0)
    assert counts() == [8, 8]


def test_a_job_that_waited_long_enough_comes_before_a_newer_one_of_more_priority(
    make_cluster: Any,
) -> None:
    def urgent(spec: Any) -> None:
        spec.priority = 60

    cluster = make_cluster(config=CoreConfig(running_jobs_max=1))
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit("job-1")
    cluster.submit("job-2")
    cluster.time_s += 9 * AGEING_S
    cluster.heartbeats()
    cluster.submit("job-3", edit=urgent)
    cluster.call(ev.CancelJob, "job-1")
    assert cluster.state("job-3") == "RUNNING"
    cluster.time_s += 2 * AGEING_S
    cluster.heartbeats()
    cluster.submit("job-4", edit=urgent)
    cluster.call(ev.CancelJob, "job-3")
    assert cluster.state("job-2") == "RUNNING"
