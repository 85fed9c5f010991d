"""Storage that is away is one incident, whoever notices it first and whoever waits longest."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from coordinator.control.core.clock import NANOS
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2
from phalanx.v1.job_pb2 import Event, Failure


def lose(cluster: Any, silence_s: float = 0.0) -> None:
    cluster.feed(ev.StorageLost(cluster.time_s - silence_s))


def bring_back(cluster: Any, lost_s: float = 0.0, dropped: int = 0) -> None:
    cluster.feed(ev.StorageReturned(lost_s, dropped))


def tell(cluster: Any, kind: str, name: str = "a1", job_id: str = "job-1", **fields: Any) -> None:
    message = pb.MemberEvent(type=kind, job_id=job_id, message="told", **fields)
    cluster.say(cluster.sessions[name], member_event=message)


def told(cluster: Any) -> list[Event]:
    return [each for each in cluster.events if each.type.startswith("STORAGE_")]


def measured(cluster: Any) -> dict[str, float]:
    found = {}
    for each in cluster.observed:
        labels = dict(each.labels)
        if each.metric == "recovery_seconds" and labels["cause"] == "storage_lost":
            assert labels["phase"] not in found, "each phase is measured once"
            found[labels["phase"]] = each.value
    return found


def test_an_outage_is_an_incident_from_the_last_answer_to_the_next(running: Any) -> None:
    lost_s = running.time_s
    lose(running, silence_s=0.5)
    running.time_s += 3.0
    bring_back(running, lost_s, dropped=7)
    away, back = told(running)
    assert away.type == "STORAGE_UNAVAILABLE"
    assert back.type == "STORAGE_RESTORED"
    assert away.incident_id == back.incident_id != ""
    assert away.details["cause"] == "storage_lost"
    assert away.details["suspected_after_s"] == "0.500000"
    assert "restored_after_s" not in away.details
    assert (back.details["restored_after_s"], back.details["dropped_events"]) == ("3.500000", "7")
    assert back.message == "storage answers again after 3.0 s"
    assert measured(running) == pytest.approx({"detect": 0.5, "total": 3.5})
    assert running.core.outage is None


def test_it_lasts_as_long_as_a_checkpoint_waits(running: Any) -> None:
    lose(running)
    running.time_s += 1.0
    tell(running, "STORAGE_UNAVAILABLE", step=30, details={"reason": "UNREACHABLE"})
    running.time_s += 1.0
    bring_back(running)
    assert running.core.outage is not None
    running.time_s += 1.0
    tell(running, "STORAGE_RESTORED", step=47)
    assert len({each.incident_id for each in told(running)}) == 1
    waits, back = told(running)[1], told(running)[-1]
    assert (waits.job_id, waits.step, waits.details["member"]) == ("job-1", 30, "a1")
    assert waits.details["reason"] == "UNREACHABLE"
    assert back.details["restored_after_s"] == "3.000000"
    assert measured(running)["total"] == pytest.approx(3.0)
    assert running.core.outage is None


def test_who_notices_it_first_opens_it(running: Any) -> None:
    """Only the aggregator may be cut off, or control may have nothing to ask storage for."""
    tell(running, "STORAGE_UNAVAILABLE")
    running.time_s += 0.5
    lose(running)
    running.time_s += 0.5
    tell(running, "STORAGE_RESTORED")
    assert running.core.outage is not None, "control still waits"
    bring_back(running)
    assert len({each.incident_id for each in told(running)}) == 1
    assert measured(running) == pytest.approx({"detect": 0.0, "total": 1.0})


def test_steps_do_not_end_it_and_it_ends_no_other(running: Any) -> None:
    lose(running)
    running.kill("w1")
    running.time_s += 0.2
    running.report("job-1", 9)
    recovered = next(each for each in running.events if each.type == "RECOVERED")
    assert recovered.incident_id != told(running)[0].incident_id
    assert running.core.outage is not None
    assert not running.core.incidents


def test_another_outage_is_another_incident(running: Any) -> None:
    for _ in range(2):
        lose(running)
        bring_back(running)
    ids = [each.incident_id for each in told(running)]
    assert ids[0] == ids[1] != ids[2] == ids[3]


@pytest.mark.parametrize("how", ["it is there anew", "its job is over", "its term is over"])
def test_who_can_say_no_more_is_not_waited_for(running: Any, how: str) -> None:
    lose(running)
    tell(running, "STORAGE_UNAVAILABLE")
    if how == "its job is over":
        running.call(ev.CancelJob, "job-1")
    elif how == "its term is over":
        running.aggregator("a2")
        running.kill("a1")
        running.advance(10.0)
        assert running.core.facts.jobs["job-1"].term == 2
    else:
        running.core.aggregators["a1"].hello.incarnation = "a1-2"
    bring_back(running)
    assert running.core.outage is None


def test_who_can_say_no_more_keeps_no_outage_open(running: Any) -> None:
    tell(running, "STORAGE_UNAVAILABLE")
    running.call(ev.CancelJob, "job-1")
    lose(running)
    bring_back(running)
    first, second, third = told(running)
    assert first.incident_id != second.incident_id == third.incident_id
    assert running.core.outage is None


def test_an_outage_that_another_leadership_saw_begin_is_told_again_from_its_true_beginning(
    running: Any,
) -> None:
    """Who waits for storage says so to whoever leads; once is enough for one leadership."""
    began_s = running.now.unix_nanos / NANOS - 2.5
    for waited_s in ("2.5", "2.75"):
        tell(running, "STORAGE_UNAVAILABLE", details={"waited_s": waited_s})
    running.time_s += 1.0
    tell(running, "STORAGE_RESTORED", details={"waited_s": "3.5"})
    away, back = told(running)
    assert away.incident_id == back.incident_id != ""
    for each in (away, back):
        assert float(each.details["began_unix_s"]) == pytest.approx(began_s)
    assert back.details["restored_after_s"] == "3.500000"
    assert running.core.outage is None


def test_the_end_of_an_outage_that_nobody_told_this_leadership_of_is_an_incident_too(
    running: Any,
) -> None:
    """It was over before who had waited for it found the new leader."""
    ended_s = running.now.unix_nanos / NANOS
    tell(running, "STORAGE_RESTORED", details={"waited_s": "3.5"})
    (back,) = told(running)
    assert back.incident_id != ""
    assert back.details["restored_after_s"] == "3.500000"
    assert float(back.details["began_unix_s"]) == pytest.approx(ended_s - 3.5)
    assert measured(running) == pytest.approx({"total": 3.5})
    assert running.core.outage is None


def test_it_is_part_of_the_one_that_others_wait_in(running: Any) -> None:
    lose(running)
    tell(running, "STORAGE_RESTORED", details={"waited_s": "3.5"})
    assert running.core.outage is not None
    bring_back(running)
    assert len({each.incident_id for each in told(running)}) == 1
    assert [("restored_after_s" in each.details) for each in told(running)] == [False, False, True]


@pytest.mark.parametrize("waited", ["", "soon", "-1", "nan", "inf"])
def test_who_does_not_say_for_how_long_it_waited_has_waited_from_now_on(
    running: Any, waited: str
) -> None:
    tell(running, "STORAGE_RESTORED", details={"waited_s": waited})
    (back,) = told(running)
    assert back.incident_id != ""
    assert back.details["restored_after_s"] == "0.000000"


def test_members_write_only_what_is_theirs_to_tell(running: Any) -> None:
    tell(running, "WORKER_LOST", name="w1")
    assert "WORKER_LOST" not in running.types()
    tell(running, "NON_FINITE_REFUSED", shard=0, details={"shards": "0"})
    event = running.events[-1]
    assert (event.type, event.incident_id, event.details["member"]) == (
        "NON_FINITE_REFUSED",
        "",
        "a1",
    )
    assert event.HasField("shard")


def test_a_checkpoint_that_is_passed_over_belongs_to_the_loss_that_it_was_read_for(
    running: Any,
) -> None:
    manifests = [
        storage_service_pb2.CheckpointManifest(job_id="job-1", step=step, manifest_sha256=f"{step}")
        for step in (20, 10)
    ]
    running.checkpoints["job-1"] = manifests
    running.report("job-1", 25, checkpoint_step=20)
    running.auto = False
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    failure = Failure(code="CHECKPOINT_CORRUPT", message="bad checksum")
    term = running.core.facts.jobs["job-1"].term
    ready = pb.RangesReady(job_id="job-1", term=term, failure=failure)
    running.say(running.sessions["a1"], ranges_ready=ready)
    lost = next(each for each in running.events if each.type == "AGGREGATOR_LOST")
    corrupt = next(each for each in running.events if each.type == "CHECKPOINT_CORRUPT")
    assert corrupt.incident_id == lost.incident_id != ""
    replayed = [each for each in running.events if each.type == "STEPS_REPLAYED"]
    assert {each.incident_id for each in replayed} == {lost.incident_id}


def test_a_checkpoint_that_is_not_there_any_more_belongs_to_it_as_well(running: Any) -> None:
    running.report("job-1", 25, checkpoint_step=20)
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    lost = next(each for each in running.events if each.type == "AGGREGATOR_LOST")
    corrupt = next(each for each in running.events if each.type == "CHECKPOINT_CORRUPT")
    assert corrupt.incident_id == lost.incident_id != ""


def test_the_end_is_of_no_incident_whose_waiters_are_gone(running: Any) -> None:
    tell(running, "STORAGE_UNAVAILABLE")
    running.core.aggregators["a1"].hello.incarnation = "a1-2"
    tell(running, "STORAGE_RESTORED", details={"waited_s": "1.0"})
    first, second = told(running)
    assert first.incident_id != second.incident_id != ""
    assert second.details["restored_after_s"] == "1.000000"
