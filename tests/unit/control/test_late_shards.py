"""Shards that come late: told, counted, one incident; a worker that hangs loses what it has."""

from __future__ import annotations

from typing import Any

from coordinator.control.core import events as ev
from coordinator.control.core.hosting import SET_ASIDE_LEASES
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
    contributed = running.now.unix_nanos - 1_000_000
    running.report("job-1", step, late_workers=late, last_contribution_unix_nanos=contributed)


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


def test_a_worker_that_beats_and_delivers_nothing_loses_its_shards(running: Any) -> None:
    started(running)
    report(running, 8, w2=1.9)
    assert running.shards("w2")
    report(running, 9, w2=2.1)
    assert running.shards("w1") | running.shards("w3") == ALL
    suspected = of_type(running, "WORKER_SUSPECTED")[-1]
    moved = of_type(running, "SHARDS_MOVED")[-1]
    assert moved.details["cause"] == "hang"
    assert moved.incident_id == suspected.incident_id != ""
    assert "WORKER_LOST" not in running.types()


def test_a_worker_set_aside_is_tried_again_after_a_while(running: Any) -> None:
    report(running, 8, w2=2.5)
    for step in range(9, 14):
        running.time_s += 0.1
        report(running, step)
    assert "w2" not in running.core.jobs["job-1"].hosts
    running.advance(SET_ASIDE_LEASES * 2.0)
    assert running.shards("w2")
    assert running.shards("w1") | running.shards("w2") | running.shards("w3") == ALL


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
