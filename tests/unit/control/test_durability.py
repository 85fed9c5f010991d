"""Facts: durable before anybody hears of them, the same after a replay, remembered for a day."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core import verbs
from coordinator.control.core.clock import Instant
from coordinator.control.core.facts import Facts
from coordinator.control.core.lifecycle import ENDED, NEXT, Verb, next_state
from coordinator.control.core.machine import handle
from coordinator.control.core.requests import REMEMBERED_NANOS, RequestMemory
from coordinator.control.core.state import CoreConfig
from phalanx.errors import AlreadyExists, DataLoss, FailedPrecondition, NotFound, Unavailable
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import (
    ControlRecord,
    JobChanged,
    RememberedRequest,
    SnapshotBegin,
)
from phalanx.v1.job_pb2 import Job


def replay(records: list[ControlRecord]) -> Facts:
    facts = Facts()
    for record in records:
        facts.apply(ControlRecord.FromString(record.SerializeToString()))
    return facts


def test_nothing_is_answered_or_commanded_before_it_is_durable(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    cluster.storage_up = False
    token = cluster.submit()
    assert token not in cluster.answers
    assert not cluster.told("w1", "describe_job")
    assert "JOB_QUEUED" not in cluster.types()
    cluster.storage_up = True
    cluster.perform()
    cluster.run_operations()
    assert cluster.answers[token].job.id == "job-1"
    assert cluster.told("w1", "assign_job")


def test_every_effect_of_a_new_fact_names_its_record(cluster: Any) -> None:
    """What depends on a record comes after it and says so."""
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit()
    request = RememberedRequest(method="PauseJob")
    effects = handle(cluster.core, ev.PauseJob(99, "job-1", request), cluster.now)
    first, *rest = effects
    assert isinstance(first, fx.Persist)
    assert rest
    assert all(effect.after == first.index for effect in rest)
    cluster.waiting.extend(effects)
    cluster.perform()


def test_shards_move_while_storage_is_away(running: Any) -> None:
    running.storage_up = False
    running.kill("w2")
    assert running.shards("w1") | running.shards("w3") == set(range(16))
    pausing = running.call(ev.PauseJob, "job-1")
    running.kill("w3")
    assert running.shards("w1") == set(range(16)), "a fact that waits holds back nothing else"
    assert pausing not in running.answers
    running.storage_up = True
    running.perform()
    assert pausing in running.answers


def test_a_crash_before_a_fact_is_durable_leaves_no_trace(running: Any) -> None:
    running.storage_up = False
    token = running.submit("job-2", "r2")
    assert token not in running.answers
    running.storage_up = True
    running.lead()
    assert "job-2" not in running.core.facts.jobs
    again = running.submit("job-2", "r2")
    assert running.answers[again].job.id == "job-2"


def test_a_replay_gives_the_same_state(running: Any) -> None:
    running.submit("job-2", "r2")
    running.call(ev.PauseJob, "job-1", "p1")
    running.report("job-1", 8, outcome=pb.JobReport.OUTCOME_PAUSED, checkpoint_step=8)
    running.call(ev.CancelJob, "job-2", "c2")
    running.call(ev.DrainWorker, "w3", "d3")
    assert replay(running.journal).digest() == running.core.facts.digest()


def test_a_snapshot_stands_for_all_records_before_it(running: Any) -> None:
    running.submit("job-2", "r2")
    running.call(ev.CancelJob, "job-2", "c2")
    running.call(ev.DrainWorker, "w3", "d3")
    whole = replay(running.journal)
    snapshot = [ControlRecord.FromString(each.SerializeToString()) for each in whole.snapshot()]
    assert replay(snapshot).digest() == whole.digest()
    assert replay([*running.journal, *snapshot]).digest() == whole.digest()
    assert len(snapshot) < len(running.journal)


def test_half_a_snapshot_counts_for_nothing(running: Any) -> None:
    whole = replay(running.journal)
    *half, _ = whole.snapshot()
    assert replay([*running.journal, *half]).digest() == whole.digest()
    later = ControlRecord(
        job_changed=JobChanged(job_id="job-1", state=Job.STATE_RUNNING, reason="PAUSING")
    )
    expected = replay([*running.journal, later]).digest()
    begin = ControlRecord(snapshot_begin=SnapshotBegin())
    assert replay([*running.journal, begin, *half[1:2], later]).digest() == expected


def test_a_record_about_an_unknown_job_is_data_loss() -> None:
    record = ControlRecord(job_changed=JobChanged(job_id="ghost", state=Job.STATE_RUNNING))
    with pytest.raises(DataLoss, match="ghost"):
        Facts().apply(record)


def test_the_first_answer_is_given_again_whatever_happened_since(running: Any) -> None:
    first = running.submit("job-2", "r2")
    running.call(ev.CancelJob, "job-2", "c2")
    again = running.submit("job-3", "r2")
    assert running.answers[again] == running.answers[first]
    assert "job-3" not in running.core.facts.jobs
    cancelled = running.call(ev.CancelJob, "job-2", "c2")
    assert running.answers[cancelled].job.state == Job.STATE_CANCELLED
    other = running.call(ev.CancelJob, "job-1", "c2")
    assert isinstance(running.answers[other], AlreadyExists)
    running.call(ev.DeleteJob, "job-2", "x2")
    assert isinstance(running.answers[running.submit("job-4", "r2")], NotFound)
    assert not isinstance(running.answers[running.call(ev.DeleteJob, "job-2", "x2")], Exception)


def cancel_twice(running: Any, first_id: str) -> list[int]:
    """Cancel a job, and again with the id `c2` before the first call could be carried out."""
    running.storage_up = False
    tokens = [running.call(ev.CancelJob, "job-1", each) for each in (first_id, "c2")]
    assert not running.answers.keys() & set(tokens)
    return tokens


def let_it_end(running: Any) -> None:
    running.storage_up = True
    running.perform()
    running.run_operations()
    assert running.state() == "CANCELLED"


@pytest.mark.parametrize("first_id", ["c1", ""])
def test_a_cancel_of_a_job_that_is_being_cancelled_is_remembered_too(
    running: Any, first_id: str
) -> None:
    tokens = cancel_twice(running, first_id)
    let_it_end(running)
    first, second = (running.answers[each] for each in tokens)
    assert first == second
    for request_id in filter(None, (first_id, "c2")):
        again = running.call(ev.CancelJob, "job-1", request_id)
        assert running.answers[again] == first, request_id
    assert running.answers[running.call(ev.CancelJob, "job-1", "c3")].reason == "WRONG_STATE"
    facts = replay(running.journal)
    assert facts.digest() == running.core.facts.digest()
    assert {each.request_id for each in facts.requests} == {first_id, "c2"} - {""}


def test_a_call_that_is_repeated_before_it_is_carried_out_is_one(running: Any) -> None:
    cancel_twice(running, "c1")
    again = running.call(ev.CancelJob, "job-1", "c2")
    token = 1000
    other = running.request("CancelJob", "c2", "of another reason")
    running.feed(ev.CancelJob(token, "job-1", other, reason="another reason"))
    let_it_end(running)
    assert running.answers[again].job.state == Job.STATE_CANCELLED
    assert running.answers[token].reason == "REQUEST_ID_REUSED"
    assert [each.request_id for each in running.core.facts.requests] == ["c1", "c2"]


def test_the_calls_that_one_record_remembers_are_bounded(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "REQUESTS_PER_RECORD", 2)
    cancel_twice(running, "c1")
    third = running.call(ev.CancelJob, "job-1", "c3")
    running.call(ev.CancelJob, "job-1", "c2")
    let_it_end(running)
    assert isinstance(running.answers[third], Unavailable)
    assert [each.request_id for each in running.core.facts.requests] == ["c1", "c2"]


def test_requests_are_remembered_over_a_restart_and_for_a_day() -> None:
    assert REMEMBERED_NANOS == 86_400 * 1_000_000_000
    memory = RequestMemory()
    for number in range(3):
        request = RememberedRequest(
            request_id=f"r{number}", method="SubmitJob", digest="d", time_unix_nanos=number
        )
        memory.remember(request, number)
    wanted = RememberedRequest(request_id="r1", method="SubmitJob", digest="d")
    assert memory.find(wanted, REMEMBERED_NANOS) is not None
    assert memory.find(wanted, REMEMBERED_NANOS + 2) is None
    newest = RememberedRequest(request_id="r9", time_unix_nanos=REMEMBERED_NANOS + 2)
    memory.remember(newest, REMEMBERED_NANOS + 2)
    assert [each.request_id for each in memory] == ["r2", "r9"]
    assert memory.find(RememberedRequest(method="SubmitJob"), 0) is None


def test_of_too_many_requests_the_oldest_are_forgotten(monkeypatch: Any) -> None:
    monkeypatch.setattr("coordinator.control.core.requests.REQUESTS_MAX", 3)
    memory = RequestMemory()
    for number in range(5):
        memory.remember(RememberedRequest(request_id=f"r{number}", time_unix_nanos=number), number)
    assert [each.request_id for each in memory] == ["r2", "r3", "r4"]


def test_ended_jobs_are_forgotten_after_their_time(cluster: Any) -> None:
    def short(spec: Any) -> None:
        spec.retain.seconds = 60

    cluster.submit("job-1", edit=short)
    cluster.submit("job-2")
    for job_id in ("job-1", "job-2"):
        cluster.call(ev.CancelJob, job_id)
    cluster.advance(50, tick_s=5)
    assert set(cluster.core.facts.jobs) == {"job-1", "job-2"}
    cluster.advance(30, tick_s=5)
    assert set(cluster.core.facts.jobs) == {"job-2"}
    assert cluster.removed == ["job-1"]


def test_no_more_ended_jobs_are_kept_than_may_be(make_cluster: Any) -> None:
    cluster = make_cluster(CoreConfig(ended_jobs_max=3))
    cluster.submit("waiting")
    for number in range(8):
        cluster.submit(f"job-{number}")
        cluster.call(ev.CancelJob, f"job-{number}")
        cluster.advance(15, tick_s=5)
    assert set(cluster.core.facts.jobs) == {"waiting", "job-5", "job-6", "job-7"}
    assert cluster.removed == [f"job-{number}" for number in range(5)]


def test_the_life_cycle_is_that_of_the_design() -> None:
    assert next_state("j", Job.STATE_RUNNING, Verb.SUCCEED) == Job.STATE_SUCCEEDED
    for state in ENDED - {Job.STATE_FAILED}:
        assert not [pair for pair in NEXT if pair[0] == state], "an end is an end"
    for verb in Verb:
        with pytest.raises(FailedPrecondition, match="SUCCEEDED and cannot"):
            next_state("j", Job.STATE_SUCCEEDED, verb)


def test_late_answers_of_storage_are_ignored(running: Any) -> None:
    before = running.core.facts.digest()
    running.feed(ev.TermRaised("job-1", operation=12345, term=7))
    running.feed(ev.RowRead("ghost", operation=1, term=7))
    assert running.core.facts.digest() == before


def test_time_that_stands_still_breaks_nothing(running: Any) -> None:
    moment = Instant(running.time_s, running.now.unix_nanos)
    for _ in range(3):
        handle(running.core, ev.Tick(), moment)
    assert running.state() == "RUNNING"
