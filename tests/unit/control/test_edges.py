"""The rarer turns: storage disagrees, members lie or are late, callers come at the wrong time."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core.views import cluster_view, worker_view
from phalanx.errors import FailedPrecondition, NotFound
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.training_pb2 import Layout


def test_a_term_that_storage_raised_before_is_caught_up_with(cluster: Any) -> None:
    """The leader before raised the term and died before it could journal the start."""
    cluster.aggregator()
    cluster.worker("w1")
    cluster.terms["job-1"] = 1
    cluster.submit()
    assert cluster.core.facts.jobs["job-1"].term == 2
    assert cluster.state() == "RUNNING"


def test_a_raised_term_without_owners_is_started_again_after_a_take_over(running: Any) -> None:
    running.terms["job-1"] = 2
    running.lead()
    running.aggregator("a1", held_ranges=[pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0])])
    assert running.core.facts.jobs["job-1"].term == 3


def test_a_final_checkpoint_found_after_a_take_over_is_success(running: Any) -> None:
    running.finals["job-1"] = storage_pb.CheckpointManifest(
        job_id="job-1", step=9, final=True, root_state='{"stop_reason": "STOP_STEPS"}'
    )
    running.lead()
    assert running.state() == "SUCCEEDED"
    assert running.job().reason == "STOP_STEPS", "no report has said so"


def test_a_pause_survives_a_take_over(running: Any) -> None:
    running.call(ev.PauseJob, "job-1")
    running.lead()
    held = pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0])
    running.aggregator("a1", held_ranges=[held])
    assert running.told("a1", "job_command")[-1].kind == pb.JobCommand.KIND_PAUSE


def test_a_resume_survives_a_take_over(running: Any) -> None:
    running.call(ev.PauseJob, "job-1")
    running.report("job-1", 5, outcome=pb.JobReport.OUTCOME_PAUSED)
    running.kill("a1")
    running.call(ev.ResumeJob, "job-1")
    assert running.job().reason == "WAITING_FOR_AGGREGATORS"
    running.lead()
    running.aggregator()
    running.worker("w1")
    assert running.core.facts.jobs["job-1"].term == 2
    assert running.shards("w1") == set(range(16))
    assert "AGGREGATOR_LOST" not in running.types()


def test_a_drain_survives_a_take_over_but_not_a_new_start(running: Any) -> None:
    running.call(ev.DrainWorker, "w2")
    running.lead()
    running.worker("w2")
    assert running.core.workers["w2"].state == Worker.STATE_DRAINING
    running.worker("w2", incarnation="w2-2")
    assert running.core.workers["w2"].state == Worker.STATE_READY
    assert not running.core.facts.drains


def test_workers_keep_their_shards_over_a_take_over(running: Any) -> None:
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    held = {name: running.told(name, "assign_job")[-1] for name in before}
    running.lead()
    running.aggregator("a1", held_ranges=[pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0])])
    for name in ("w1", "w2"):
        assign = held[name]
        kept = pb.HeldWorkerJob(
            job_id="job-1",
            term=1,
            placement=assign.placement,
            train_nodes=assign.train_nodes,
            evaluation_nodes=assign.evaluation_nodes,
            ready=True,
        )
        running.worker(name, held_jobs=[kept])
        assert not running.told(name, "assign_job"), "it is not even told: it has what it needs"
    running.advance(1.5)
    assert not running.told("w1", "assign_job"), "w3 may still come back with its shards"
    running.advance(1.0)
    assert running.shards("w1") | running.shards("w2") == set(range(16))
    assert running.shards("w1") >= before["w1"]
    placements = [each.placement for each in running.told("w1", "assign_job")]
    assert min(placements) > max(assign.placement for assign in held.values())


def test_a_worker_with_a_job_that_ended_lets_it_go(running: Any) -> None:
    running.call(ev.CancelJob, "job-1")
    held = pb.HeldWorkerJob(job_id="job-1", term=1, ready=True)
    running.worker("w4", held_jobs=[held])
    assert running.told("w4", "revoke_job")[-1].term == 1
    ranges = pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0])
    running.aggregator("a9", held_ranges=[ranges])
    assert running.told("a9", "release_ranges")[-1].term == 1


def test_reports_of_another_term_or_owner_are_not_believed(running: Any) -> None:
    running.aggregator("a2")
    before = running.core.facts.digest()
    running.report("job-1", 9, term=7, outcome=pb.JobReport.OUTCOME_STOPPED)
    running.report("job-1", 9, owner="a2", outcome=pb.JobReport.OUTCOME_STOPPED)
    running.report("job-1", 9, outcome=pb.JobReport.OUTCOME_PAUSED)
    assert running.core.facts.digest() == before
    assert running.told("a2", "release_ranges")


def test_the_root_may_fail_the_job(running: Any) -> None:
    failure = Failure(code="PARAMETERS_NON_FINITE", message="the update overflowed", step=4)
    running.report(
        "job-1",
        4,
        outcome=pb.JobReport.OUTCOME_FAILED,
        reason="PARAMETERS_NON_FINITE",
        message="the update overflowed",
        failure=failure,
    )
    job = running.job()
    assert (running.state(), job.reason) == ("FAILED", "PARAMETERS_NON_FINITE")
    assert job.failures[0] == failure
    assert job.progress.step == 4


def test_ranges_that_cannot_be_held_at_all_fail_the_job(cluster: Any) -> None:
    cluster.auto = False
    session = cluster.aggregator()
    cluster.describe(cluster.worker("w1"), "nothing")
    cluster.submit()
    cluster.describe(cluster.sessions["w1"], "job-1")
    failure = Failure(code="OUT_OF_MEMORY", message="no room for the parameters")
    ready = pb.RangesReady(job_id="job-1", term=1, failure=failure)
    cluster.say(session, ranges_ready=ready)
    assert cluster.job().reason == "OUT_OF_MEMORY"
    assert "no room" in cluster.job().message


def test_storage_that_cannot_write_the_model_fails_the_job(running: Any) -> None:
    running.storage_up = False
    running.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED)
    write = running.operations.pop()
    assert isinstance(write, fx.WriteModel)
    running.storage_up = True
    running.feed(
        ev.OperationFailed("job-1", write.operation, "BLOB_CORRUPT", "a part does not match")
    )
    assert (running.state(), running.job().reason) == ("FAILED", "BLOB_CORRUPT")


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dtype="float16", element_count=5)],
)
def test_a_description_that_makes_no_sense_fails_the_job(cluster: Any, layout: Layout) -> None:
    cluster.auto = False
    cluster.aggregator()
    session = cluster.worker("w1")
    cluster.submit()
    cluster.describe(session, "job-1", layout=layout)
    assert cluster.job().reason == "DESCRIBE_FAILED"


def test_workers_that_never_describe_fail_the_job(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    cluster.worker("w1")
    cluster.worker("w2")
    cluster.submit()
    cluster.advance(1000, tick_s=1.0)
    assert cluster.job().reason == "DESCRIBE_TIMEOUT"
    asked = len(cluster.told("w1", "describe_job")) + len(cluster.told("w2", "describe_job"))
    assert asked == 4, "three were late, and the fourth was asked besides the third"


def test_a_job_without_aggregators_waits_and_goes_on(running: Any) -> None:
    running.kill("a1")
    running.advance(3.0)
    assert running.job().reason == "WAITING_FOR_AGGREGATORS"
    running.aggregator("a2")
    assert running.core.facts.jobs["job-1"].ranges[0].aggregator_id == "a2"
    assert running.job().reason == ""


def test_aggregators_with_other_bits_are_waited_past_only_if_allowed(cluster: Any) -> None:
    def fall_back(spec: Any) -> None:
        spec.reproducibility.bitwise.fall_back_after.seconds = 5

    cluster.aggregator("a1")
    cluster.worker("w1")
    cluster.submit("job-1")
    cluster.submit("job-2", edit=fall_back)
    cluster.kill("a1")
    cluster.aggregator("odd", fingerprint="g")
    cluster.advance(4.0)
    for job_id in ("job-1", "job-2"):
        assert cluster.job(job_id).reason == "WAITING_FOR_FINGERPRINT"
        assert cluster.core.facts.jobs[job_id].bit_identical
    cluster.storage_up = False
    cluster.advance(4.0)
    cluster.storage_up = True
    cluster.perform()
    cluster.run_operations()
    cluster.advance(1.0)
    assert cluster.job("job-1").reason == "WAITING_FOR_FINGERPRINT"
    assert cluster.core.facts.jobs["job-2"].ranges[0].aggregator_id == "odd"
    assert not cluster.core.facts.jobs["job-2"].bit_identical
    cluster.aggregator("a3")
    cluster.advance(1.0)
    assert cluster.core.facts.jobs["job-1"].ranges[0].aggregator_id == "a3"


def test_callers_at_the_wrong_time_are_told_so(running: Any) -> None:
    running.storage_up = False
    running.call(ev.CancelJob, "job-1")
    second = running.call(ev.CancelJob, "job-1")
    for kind in (ev.PauseJob, ev.DeleteJob, ev.RetryJob, ev.ResumeJob):
        token = running.call(kind, "job-1")
        assert isinstance(running.answers[token], FailedPrecondition)
    running.storage_up = True
    running.perform()
    running.run_operations()
    assert running.answers[second].job.reason == "CANCELLED", "both get the one answer"
    for kind in (ev.CancelJob, ev.PauseJob, ev.DeleteJob):
        assert isinstance(running.answers[running.call(kind, "ghost")], NotFound)
    assert isinstance(running.answers[running.call(ev.DrainWorker, "ghost")], NotFound)
    running.kill("w3")
    assert isinstance(running.answers[running.call(ev.DrainWorker, "w3")], FailedPrecondition)


def test_a_cancel_while_the_job_fails_is_refused(running: Any) -> None:
    running.storage_up = False
    running.report("job-1", 4, outcome=pb.JobReport.OUTCOME_FAILED, reason="BROKEN")
    token = running.call(ev.CancelJob, "job-1")
    assert running.answers[token].reason == "WRONG_STATE"


def test_hellos_that_make_no_sense_are_refused(cluster: Any) -> None:
    for hello in ({"incarnation": ""}, {"generation": 5}):
        session = cluster.aggregator("a1", **hello)
        assert session in cluster.closed
    assert not cluster.core.aggregators
    first, second = cluster.aggregator("a1"), cluster.aggregator("a1")
    assert first in cluster.closed
    assert second not in cluster.closed
    cluster.say(first, heartbeat=pb.Heartbeat())  # too late: that session is gone


def test_ranges_told_on_a_session_that_broke_are_told_again(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    session = cluster.worker("w1")
    cluster.submit()
    cluster.describe(session, "job-1")
    assert len(cluster.told("a1", "assign_ranges")) == 1
    cluster.kill("a1")
    cluster.aggregator("a1")
    assert cluster.told("a1", "assign_ranges")[0].term == 1
    assert cluster.core.facts.jobs["job-1"].term == 1


def test_the_queue_is_served_by_priority(cluster: Any) -> None:
    def urgent(spec: Any) -> None:
        spec.priority = 90

    cluster.submit("job-1")
    cluster.submit("job-2", edit=urgent)
    cluster.worker("w1")
    cluster.aggregator()
    started = [event.job_id for event in cluster.events if event.type == "JOB_STARTED"]
    assert started == ["job-2", "job-1"]


def test_jobs_above_the_limit_wait_for_a_place(make_cluster: Any) -> None:
    from coordinator.control.core.state import CoreConfig

    cluster = make_cluster(config=CoreConfig(running_jobs_max=1))
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit("job-1")
    cluster.submit("job-2")
    assert cluster.job("job-2").reason == "QUEUED_BEHIND_OTHERS"
    cluster.call(ev.CancelJob, "job-1")
    assert cluster.state("job-2") == "RUNNING"


def test_operators_see_who_does_what(running: Any) -> None:
    running.worker("odd", fingerprint="g")
    progress = pb.WorkerJobProgress(
        job_id="job-1", term=1, step=3, leaves_done=9, examples_per_second=100.0
    )
    beat = pb.Heartbeat(jobs=[progress], resident_bytes=5, cpu_fraction=0.5)
    running.say(running.sessions["w1"], heartbeat=beat)
    running.kill("w3")
    view = cluster_view(running.core)
    states = {worker.id: worker.state for worker in view.workers}
    assert states == {
        "w1": Worker.STATE_READY,
        "w2": Worker.STATE_READY,
        "w3": Worker.STATE_LOST,
        "odd": Worker.STATE_INELIGIBLE,
    }
    assert dict(view.jobs) == {"RUNNING": 1}
    assert list(view.aggregators[0].job_ids) == ["job-1"]
    assert view.aggregators[0].connected
    first = worker_view(running.core, running.core.workers["w1"])
    assert (first.resident_bytes, first.cpu_fraction) == (5, 0.5)
    assert (first.jobs[0].step, first.jobs[0].examples_per_second) == (3, 100.0)
    shards = sum(each.count for each in first.jobs[0].shards)
    assert shards == len(running.shards("w1"))
    running.report("job-1", 3)
    assert {each.worker_id for each in running.job().progress.workers} == {"w1", "w2"}


def test_a_checkpoint_is_told_once(running: Any) -> None:
    for step in (10, 12, 14):
        running.report("job-1", step, checkpoint_step=10)
    running.report("job-1", 20, checkpoint_step=20)
    told = [event.step for event in running.events if event.type == "CHECKPOINT_COMMITTED"]
    assert told == [10, 20]


def test_a_question_that_got_lost_with_a_session_is_asked_again(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit()
    cluster.worker("w1")
    assert len(cluster.told("w1", "describe_job")) == 1
    cluster.describe(cluster.sessions["w1"], "job-1")
    assert cluster.state() == "RUNNING"


def test_the_fingerprint_is_kept_even_if_its_group_dies_before_the_start(cluster: Any) -> None:
    cluster.aggregator()
    cluster.storage_up = False
    cluster.auto = False
    session = cluster.worker("w1")
    cluster.submit()
    cluster.storage_up = True
    cluster.perform()
    cluster.storage_up = False
    cluster.describe(session, "job-1")
    cluster.kill("w1")
    cluster.storage_up = True
    cluster.perform()
    cluster.run_operations()
    assert cluster.core.facts.jobs["job-1"].fingerprint == "f"
    cluster.worker("odd", fingerprint="g")
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
