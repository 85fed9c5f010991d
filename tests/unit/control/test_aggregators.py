"""Owners of parameter ranges: lost, back, replaced; checkpoints that cannot be used."""

from __future__ import annotations

from typing import Any

from coordinator.control.core import events as ev
from coordinator.control.core.state import CoreConfig
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.training_pb2 import Layout, TensorSpec


def manifest(step: int, *, final: bool = False) -> storage_pb.CheckpointManifest:
    return storage_pb.CheckpointManifest(
        job_id="job-1", term=1, step=step, final=final, manifest_sha256=f"{step:064x}"
    )


def test_an_aggregator_that_comes_back_empty_starts_a_new_term_at_once(running: Any) -> None:
    running.checkpoints["job-1"] = [manifest(40), manifest(20)]
    running.report("job-1", 55)
    running.kill("a1")
    assert running.core.facts.jobs["job-1"].term == 1
    running.aggregator("a1", incarnation="a1-2")
    assert running.core.facts.jobs["job-1"].term == 2
    assert running.told("a1", "assign_ranges")[-1].restore.step == 40
    assert {
        each.term for each in [running.told(name, "assign_job")[-1] for name in ("w1", "w2", "w3")]
    } == {2}
    kinds = running.types()
    assert kinds.index("AGGREGATOR_LOST") < kinds.index("STEPS_REPLAYED")
    replayed = next(event for event in running.events if event.type == "STEPS_REPLAYED")
    assert replayed.details["steps"] == "15"
    running.time_s += 1
    running.report("job-1", 41)
    assert running.types()[-1] == "RECOVERED"


def test_a_worker_of_the_name_of_an_aggregator_does_not_speak_for_it(running: Any) -> None:
    aggregator = running.sessions["a1"]
    session = running.worker("a1", fingerprint="g")
    failed = pb.JobReport(job_id="job-1", term=1, outcome=pb.JobReport.OUTCOME_FAILED)
    running.say(session, job_report=failed)
    assert running.state() == "RUNNING"
    running.say(aggregator, job_report=failed)
    assert running.state() == "FAILED"


def test_an_aggregator_that_comes_back_whole_costs_nothing(running: Any) -> None:
    running.kill("a1")
    held = pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0], version=3)
    running.aggregator("a1", held_ranges=[held])
    assert running.core.facts.jobs["job-1"].term == 1
    assert "AGGREGATOR_LOST" not in running.types()


def test_a_job_that_waits_for_aggregators_starts_once_a_suspected_one_speaks(cluster: Any) -> None:
    cluster.worker("w1")
    cluster.aggregator("a1")
    cluster.heartbeats("w1", "a1")
    cluster.advance(1.25, alive=False)
    cluster.submit()
    assert cluster.job().reason == "WAITING_FOR_AGGREGATORS"
    cluster.heartbeats("a1")
    assert cluster.state() == "RUNNING"


def test_a_silent_aggregator_loses_its_ranges_to_another(running: Any) -> None:
    running.aggregator("a2")
    running.kill("a1")
    running.advance(1.5)
    assert running.core.facts.jobs["job-1"].term == 1
    running.advance(1.0)
    facts = running.core.facts.jobs["job-1"]
    assert (facts.term, facts.ranges[0].aggregator_id) == (2, "a2")
    assert "AGGREGATOR_LOST" in running.types()


def test_a_term_that_was_raised_unheard_makes_a_new_one_although_its_owner_is_back(
    running: Any,
) -> None:
    """Storage raises the term and its answer gets lost; asked again, it refuses."""
    running.kill("a1")
    running.time_s += 3.0
    running.storage_up = False
    running.aggregator("a2")
    running.terms["job-1"] = 2
    running.aggregator("a1", held_ranges=[pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0])])
    running.storage_up = True
    running.perform()
    running.run_operations()
    facts = running.core.facts.jobs["job-1"]
    assert (facts.term, facts.ranges[0].aggregator_id) == (3, "a1")
    assert running.told("a1", "assign_ranges")[-1].term == 3


def test_rule_11_an_owner_has_a_lease_to_come_back_after_a_take_over(running: Any) -> None:
    running.time_s += 100.0
    running.lead()
    running.aggregator("a2")
    running.advance(1.5)
    assert running.core.facts.jobs["job-1"].term == 1
    running.advance(1.0)
    facts = running.core.facts.jobs["job-1"]
    assert (facts.term, facts.ranges[0].aggregator_id) == (2, "a2")


def test_rule_11_no_range_is_taken_while_most_members_are_silent(running: Any) -> None:
    running.aggregator("a2")
    running.kill("a1")

    def with_a2_alone(seconds: float) -> int:
        for _ in range(int(seconds / 0.25)):
            running.time_s += 0.25
            running.heartbeats("a2")
            running.feed(ev.Tick())
        return int(running.core.facts.jobs["job-1"].term)

    assert with_a2_alone(3.0) == 1
    assert with_a2_alone(3.0) == 2, "silence that lasts is believed"


def test_an_owner_with_which_workers_make_progress_is_not_lost(running: Any) -> None:
    running.aggregator("a2")
    running.kill("a1")
    for step in range(20):
        running.time_s += 0.5
        progress = pb.WorkerJobProgress(job_id="job-1", term=1, step=step + 1, leaves_done=step)
        running.say(running.sessions["w1"], heartbeat=pb.Heartbeat(jobs=[progress]))
        running.heartbeats("w2", "w3", "a2")
        running.feed(ev.Tick())
    assert running.core.facts.jobs["job-1"].term == 1


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(running: Any) -> None:
    running.checkpoints["job-1"] = [manifest(40), manifest(20)]
    running.auto = False
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    failure = Failure(code="CHECKPOINT_CORRUPT", message="bad checksum")
    ready = pb.RangesReady(job_id="job-1", term=2, failure=failure)
    running.say(running.sessions["a1"], ranges_ready=ready)
    assert "CHECKPOINT_CORRUPT" in running.types()
    restores = [each.restore.step for each in running.told("a1", "assign_ranges")]
    assert restores == [40, 20]
    assert running.core.facts.jobs["job-1"].term == 3


def test_a_new_leader_finds_out_which_checkpoint_is_corrupt(running: Any) -> None:
    """It hears of what the leader before it ordered, and does not know from which checkpoint."""
    running.checkpoints["job-1"] = [manifest(0)]
    running.auto = False
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    running.lead()
    held = pb.HeldRanges(job_id="job-1", term=2, range_indexes=[0])
    running.aggregator("a1", incarnation="a1-2", held_ranges=[held])
    failure = Failure(code="BLOB_CORRUPT", message="a blob is damaged")

    def refuse(term: int) -> None:
        ready = pb.RangesReady(job_id="job-1", term=term, failure=failure)
        running.say(running.sessions["a1"], ranges_ready=ready)

    refuse(2)
    refuse(3)
    told = running.told("a1", "assign_ranges")
    assert [(each.term, each.HasField("restore")) for each in told] == [(3, True), (4, False)]
    assert running.state() == "RUNNING"
    refuse(4)
    assert running.state() == "FAILED", "it cannot even begin"


def test_memory_that_is_short_somewhere_says_nothing_of_the_checkpoint(running: Any) -> None:
    running.checkpoints["job-1"] = [manifest(40), manifest(20)]
    running.auto = False
    running.aggregator("a2")
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")

    def refuse(aggregator: str, term: int) -> None:
        failure = Failure(code="AGGREGATOR_MEMORY", message="has not enough memory")
        ready = pb.RangesReady(job_id="job-1", term=term, failure=failure)
        running.say(running.sessions[aggregator], ranges_ready=ready)

    refuse("a1", 2)
    told = running.told("a2", "assign_ranges")
    assert [(each.term, each.restore.step) for each in told] == [(3, 40)]
    assert "CHECKPOINT_CORRUPT" not in running.types()
    refuse("a2", 3)
    assert running.state() == "FAILED"
    assert running.job().failures[0].code == "AGGREGATOR_MEMORY"


def test_a_checkpoint_that_storage_lists_no_more_is_told(running: Any) -> None:
    """Its manifest rotted, so storage leaves it out; nobody would see that a step was given up."""
    running.checkpoints["job-1"] = [manifest(20)]
    running.report("job-1", 45, checkpoint_step=40)
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    corrupt = [event for event in running.events if event.type == "CHECKPOINT_CORRUPT"]
    assert [(each.step, each.details["taken_step"]) for each in corrupt] == [(40, "20")]


def test_a_checkpoint_that_is_there_is_not_told_as_damaged(running: Any) -> None:
    running.checkpoints["job-1"] = [manifest(40), manifest(20)]
    running.report("job-1", 45, checkpoint_step=40)
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    assert "CHECKPOINT_CORRUPT" not in running.types()


def test_a_failure_in_any_range_fails_the_job_and_nothing_else_of_it_is_believed(
    make_cluster: Any,
) -> None:
    cluster = make_cluster(config=CoreConfig(range_min_bytes=64 * 1024 * 4))
    cluster.auto = False
    for name in ("a1", "a2"):
        cluster.aggregator(name)
    worker = cluster.worker("w1")
    cluster.submit()
    layout = Layout(
        tensors=[TensorSpec(name="w", shape=[65536, 4])],
        dtype="float32",
        element_count=65536 * 4,
    )
    cluster.describe(worker, "job-1", layout=layout, evaluation_sums=["loss"])
    assert [each.aggregator_id for each in cluster.core.facts.jobs["job-1"].ranges] == ["a1", "a2"]
    cluster.report("job-1", 7)
    for outcome in (pb.JobReport.OUTCOME_RUNNING, pb.JobReport.OUTCOME_STOPPED):
        cluster.report("job-1", 9, owner="a2", outcome=outcome)
        assert (cluster.state(), cluster.job().progress.step) == ("RUNNING", 7)
    cluster.report(
        "job-1",
        8,
        owner="a2",
        outcome=pb.JobReport.OUTCOME_FAILED,
        reason="PARAMETERS_NON_FINITE",
        message="at version 8",
        failure=Failure(code="PARAMETERS_NON_FINITE", message="at version 8", step=8),
    )
    assert cluster.state() == "FAILED"
    job = cluster.job()
    assert (job.reason, job.failures[0].step) == ("PARAMETERS_NON_FINITE", 8)
    assert cluster.told("a1", "release_ranges")


def test_waiting_for_an_aggregator_with_the_right_bits_raises_no_terms(running: Any) -> None:
    running.kill("a1")
    other = {"incarnation": "a1-2", "fingerprint": "g"}
    running.aggregator("a1", **other)
    running.advance(10)
    assert running.terms["job-1"] == 1
    assert running.job().reason == "WAITING_FOR_FINGERPRINT"
    assert running.types().count("JOB_WAITING") == 1
    running.aggregator("a2", fingerprint="f")
    assert running.core.facts.jobs["job-1"].ranges[0].aggregator_id == "a2"
    assert running.terms["job-1"] == 2
