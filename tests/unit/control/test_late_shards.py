"""Shards that come late: told, counted, one incident; a worker that hangs loses what it has."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from coordinator.control.core.hosting import SET_ASIDE_LEASES, SET_ASIDE_LEASES_MAX
from coordinator.control.core.incidents import OPEN_MAX
from coordinator.control.core.state import EPISODES_MAX
from coordinator.control.core.told import NAME_MAX
from phalanx.v1 import coordination_service_pb2 as pb

ALL = set(range(16))


def started(running: Any, worker_id: str = "w2", cause: str = "late", step: int = 7) -> None:
    """Let the root say that a worker's shards are copied."""
    message = pb.CopiesStarted(
        job_id="job-1",
        term=1,
        step=step,
        worker_id=worker_id,
        cause=cause,
        shards=sorted(running.shards("w2")),
        copied_to=["w1", "w3"],
        waited_s=0.13,
        patience_s=0.12,
    )
    running.say(running.sessions["a1"], copies_started=message)


def report(running: Any, step: int, **late_s: float) -> None:
    late = [pb.LateWorker(worker_id=key, late_s=value) for key, value in late_s.items()]
    running.report("job-1", step, late_workers=late, since_contribution_s=0.001)


def of_type(running: Any, kind: str) -> list[Any]:
    return [event for event in running.events if event.type == kind]


def test_copies_are_told_and_counted(running: Any) -> None:
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    started(running)
    (event,) = of_type(running, "SPECULATION_STARTED")
    assert (event.worker_id, event.job_id, event.step) == ("w2", "job-1", 7)
    assert event.details["workers"] == "w1, w3"
    redispatched = [e for e in running.observed if e.metric == "redispatches_total"]
    assert [(each.value, dict(each.labels)) for each in redispatched] == [
        (len(before["w2"]), {"cause": "late"})
    ]
    assert {name: running.shards(name) for name in before} == before, "nobody's nodes are split"


def test_a_late_worker_that_is_then_lost_is_one_incident(running: Any) -> None:
    running.time_s += 0.13
    started(running)
    running.time_s += 0.1
    report(running, 8, w2=0.2)
    for _ in range(5):
        running.time_s += 0.5
        running.heartbeats("w1", "w3", "a1")
        report(running, 8, w2=1.0)
        running.feed(ev.Tick())
    running.time_s += 0.1
    report(running, 9)
    story = [
        each.type
        for each in running.events
        if each.incident_id and each.incident_id == of_type(running, "WORKER_LOST")[0].incident_id
    ]
    assert story == [
        "SPECULATION_STARTED",
        "RECOVERED",
        "WORKER_SUSPECTED",
        "WORKER_LOST",
        "SHARDS_MOVED",
        "RECOVERED",
    ]
    details = of_type(running, "RECOVERED")[-1].details
    line = [float(details[f"{phase}_after_s"]) for phase in ("suspected", "fenced", "recomputed")]
    assert line == sorted(line)
    assert float(details["committed_after_s"]) >= line[-1]
    phases = {
        dict(each.labels)["phase"]
        for each in running.observed
        if each.metric == "recovery_seconds" and dict(each.labels)["cause"] == "worker_silent"
    }
    assert phases == {"detect", "suspect", "redispatch", "recompute", "commit", "total"}


def test_another_time_is_another_incident(running: Any) -> None:
    started(running)
    running.time_s += 0.1
    report(running, 8, w2=0.2)
    report(running, 9)
    running.time_s += 60
    running.heartbeats()
    started(running, step=900)
    first, second = of_type(running, "SPECULATION_STARTED")
    assert first.incident_id != second.incident_id


def test_it_is_another_one_also_where_the_shards_came_before_the_next_report(running: Any) -> None:
    started(running)
    running.time_s += 0.1
    report(running, 9)
    running.kill("w2")
    (first,), (lost,) = of_type(running, "SPECULATION_STARTED"), of_type(running, "WORKER_LOST")
    assert first.incident_id != lost.incident_id


def test_a_worker_that_beats_and_delivers_nothing_loses_its_shards(running: Any) -> None:
    started(running)
    running.advance(1.9)
    report(running, 8, w2=1.9)
    assert running.shards("w2")
    running.advance(0.2)
    report(running, 9, w2=2.1)
    assert running.shards("w1") | running.shards("w3") == ALL
    suspected = of_type(running, "WORKER_SUSPECTED")[-1]
    moved = of_type(running, "SHARDS_MOVED")[-1]
    assert moved.details["cause"] == "hang"
    assert moved.incident_id == suspected.incident_id != ""
    assert "WORKER_LOST" not in running.types()


def test_one_whose_shards_nobody_asks_for_loses_them_after_a_lease(running: Any) -> None:
    wanted = sorted(running.shards("w2"))
    owner = running.core.jobs["job-1"].hosts["w2"]
    unasked = [pb.LateWorker(late_s=60.0, shards=wanted)]
    running.report("job-1", 8, late_workers=unasked)
    running.time_s += 1.9
    running.heartbeats()
    running.report("job-1", 8, late_workers=unasked)
    assert running.shards("w2") == set(wanted), "whoever had them before may have lost that time"
    owner.ready = False
    running.time_s += 0.2
    running.report("job-1", 8, late_workers=unasked)
    assert running.shards("w2") == set(wanted), "it still loads code and data"
    owner.ready = True
    for _ in range(2):
        running.report("job-1", 8, late_workers=unasked)
        running.time_s += 1.0
        running.heartbeats()
    running.report("job-1", 8, late_workers=unasked)
    assert running.shards("w1") | running.shards("w3") == ALL
    assert of_type(running, "SHARDS_MOVED")[-1].details["cause"] == "hang"


def test_one_whose_shards_are_asked_for_again_is_well(running: Any) -> None:
    unasked = [pb.LateWorker(late_s=60.0, shards=sorted(running.shards("w2")))]
    for late in (unasked, [], unasked):
        running.report("job-1", 8, late_workers=late)
        running.time_s += 1.5
        running.heartbeats()
    assert running.shards("w2")


def test_silence_is_no_hang(running: Any) -> None:
    running.time_s += 1.5
    running.heartbeats("w1", "w3", "a1")
    running.feed(ev.Tick())
    suspected = of_type(running, "WORKER_SUSPECTED")
    report(running, 9, w2=2.1)
    assert running.shards("w2"), "its lease is not over"
    assert of_type(running, "WORKER_SUSPECTED") == suspected


def test_one_that_is_back_is_not_late_for_what_others_have_done_meanwhile(running: Any) -> None:
    report(running, 8)
    told = running.told("w2", "assign_job")[-1]
    held = pb.HeldWorkerJob(
        job_id="job-1",
        term=told.term,
        placement=told.placement,
        train_nodes=told.train_nodes,
        evaluation_nodes=told.evaluation_nodes,
        ready=True,
    )
    running.kill("w2")
    running.time_s += 0.1
    running.worker("w2", held_jobs=[held])
    running.say(running.sessions["w2"], worker_job_ready=pb.WorkerJobReady(job_id="job-1", term=1))
    assert running.shards("w2")
    report(running, 9, w2=2.5)
    assert "hang" not in [each.details.get("cause") for each in running.events]
    running.advance(2.0)
    report(running, 10, w2=4.5)
    assert "hang" in [each.details.get("cause") for each in running.events]


LEASE_S = 2.0


def set_aside(running: Any) -> float:
    """A worker delivers nothing for a lease, and is set aside; for how long."""
    step = running.core.jobs["job-1"].step
    running.advance(LEASE_S)
    report(running, step + 1, w2=2.5)
    for further in range(2, 7):
        running.time_s += 0.1
        report(running, step + further)
    assert "w2" not in running.core.jobs["job-1"].hosts
    return float(running.core.jobs["job-1"].set_aside["w2"] - running.time_s + 0.5)


def test_a_worker_set_aside_is_tried_again_after_a_while(running: Any) -> None:
    assert set_aside(running) == pytest.approx(SET_ASIDE_LEASES * LEASE_S)
    running.advance(SET_ASIDE_LEASES * LEASE_S)
    assert running.shards("w2")
    assert running.shards("w1") | running.shards("w2") | running.shards("w3") == ALL


def test_one_that_is_tried_again_has_a_lease_whatever_is_still_waited_for(running: Any) -> None:
    set_aside(running)
    while running.core.jobs["job-1"].set_aside:
        running.advance(0.25)
    step = running.core.jobs["job-1"].step
    assert running.shards("w2")
    report(running, step, w2=7.0)
    running.advance(LEASE_S - 0.1)
    report(running, step, w2=9.0)
    assert running.core.jobs["job-1"].set_aside == {}, "that long it could not deliver"
    running.advance(0.2)
    report(running, step, w2=9.2)
    assert "w2" in running.core.jobs["job-1"].set_aside


def test_one_that_is_tried_again_while_it_still_keeps_shards_has_a_lease(running: Any) -> None:
    running.advance(LEASE_S)
    report(running, 8, w2=2.5)
    running.time_s += LEASE_S
    running.core.jobs["job-1"].keep_until_s = running.time_s + 1.0
    running.heartbeats()
    running.feed(ev.Tick())
    assert running.core.jobs["job-1"].set_aside == {}
    report(running, 8, w2=4.5)
    assert running.core.jobs["job-1"].set_aside == {}


def test_one_that_still_loads_is_not_late(running: Any) -> None:
    running.auto = False
    running.advance(set_aside(running))
    assert not running.core.jobs["job-1"].hosts["w2"].ready
    running.advance(10.0)
    report(running, 20, w2=12.0)
    assert running.core.jobs["job-1"].set_aside == {}
    running.say(running.sessions["w2"], worker_job_ready=pb.WorkerJobReady(job_id="job-1", term=1))
    report(running, 20, w2=12.0)
    assert running.shards("w2")
    running.advance(LEASE_S)
    report(running, 20, w2=14.0)
    assert "w2" in running.core.jobs["job-1"].set_aside


def test_one_that_is_set_aside_again_and_again_waits_longer_each_time(running: Any) -> None:
    waits_s = []
    for _ in range(5):
        waits_s.append(set_aside(running))
        running.advance(waits_s[-1])
    assert waits_s == pytest.approx([LEASE_S * leases for leases in (1, 2, 4, 8, 8)])
    running.advance(SET_ASIDE_LEASES_MAX * LEASE_S)
    assert set_aside(running) == pytest.approx(LEASE_S * SET_ASIDE_LEASES), "it was well for long"


def test_the_only_worker_left_keeps_its_shards(running: Any) -> None:
    running.kill("w1")
    running.kill("w3")
    report(running, 8, w2=5.0)
    assert running.shards("w2") == ALL


def test_copies_while_control_was_away_are_told_afterwards(running: Any) -> None:
    started(running, cause="lost")
    (event,) = of_type(running, "SPECULATION_STARTED")
    assert event.incident_id
    assert not running.core.incidents, "what is over for long opens nothing"
    redispatched = [e for e in running.observed if e.metric == "redispatches_total"]
    assert dict(redispatched[0].labels) == {"cause": "lost"}


def test_copies_of_an_old_term_are_not_told(running: Any) -> None:
    message = pb.CopiesStarted(job_id="job-1", term=9, worker_id="w2", cause="late")
    running.say(running.sessions["a1"], copies_started=message)
    assert not of_type(running, "SPECULATION_STARTED")


def test_a_lost_aggregator_is_one_story(running: Any) -> None:
    report(running, 12)
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    running.time_s += 0.2
    report(running, 3)
    lost = of_type(running, "AGGREGATOR_LOST")[0]
    story = [each.type for each in running.events if each.incident_id == lost.incident_id]
    assert story == ["AGGREGATOR_LOST", "STEPS_REPLAYED", "RECOVERED"]
    replayed = of_type(running, "STEPS_REPLAYED")[0]
    assert replayed.details["steps"] == "12"
    assert running.told("a1", "assign_ranges")[-1].reached_step == 12


def test_what_a_lying_member_tells_of_copies_has_an_end(running: Any) -> None:
    for number in range(2 * EPISODES_MAX):
        worker_id, cause = f"{number}" + "x" * 10_000, f"late {number}" if number % 2 else "late"
        message = pb.CopiesStarted(job_id="job-1", term=1, worker_id=worker_id, cause=cause)
        if number < 4:
            message.shards.extend(range(100_000))
            message.copied_to.extend(["y" * 1000] * 2000)
        running.say(running.sessions["a1"], copies_started=message)
    assert len(running.core.incidents) == OPEN_MAX
    assert len(running.core.episodes) == EPISODES_MAX
    assert max(map(len, running.core.episodes)) <= NAME_MAX
    redispatched = [e for e in running.observed if e.metric == "redispatches_total"]
    assert {dict(each.labels)["cause"] for each in redispatched} == {"late", "other"}
    told = of_type(running, "SPECULATION_STARTED")
    assert max(each.ByteSize() for each in told) < 2**20


def test_a_job_that_waits_while_workers_come_and_go_follows_so_many_only(running: Any) -> None:
    report(running, 5)
    for number in range(OPEN_MAX + 20):
        running.kill("w2")
        running.worker("w2", incarnation=f"w2-{number}")
        running.time_s += 0.1
    assert len(running.core.incidents) == OPEN_MAX
    lost = [event.incident_id for event in of_type(running, "WORKER_LOST")]
    assert list(running.core.incidents) == lost[-OPEN_MAX:]
    running.time_s += 0.1
    report(running, 6)
    assert not running.core.incidents
    assert len(of_type(running, "RECOVERED")) == OPEN_MAX
