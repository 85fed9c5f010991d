"""The story of jobs and members, told to the core event by event."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import Failure, Result

ALL = set(range(16))


def manifest(step: int, *, final: bool = False) -> storage_pb.CheckpointManifest:
    return storage_pb.CheckpointManifest(
        job_id="job-1", term=1, step=step, final=final, manifest_sha256=f"{step:064x}"
    )


def test_a_job_goes_from_submission_to_success(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    token = cluster.submit()
    assert cluster.answers[token].job.id == "job-1"
    assert cluster.answers[token].plan.steps > 0
    assert cluster.told("w1", "describe_job")[0].plan.job_id == "job-1"
    assert cluster.shards("w1") == ALL
    assign = cluster.told("a1", "assign_ranges")[0]
    assert assign.term == 1
    assert assign.plan.layout.element_count == 640
    assert list(assign.plan.evaluation_sums) == ["loss", "correct"]
    cluster.report("job-1", 5, metrics={"train/loss": 0.5}, examples_lost=0)
    assert cluster.job().progress.step == 5
    cluster.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED, reason="STOP_EPOCHS")
    job = cluster.job()
    assert cluster.state() == "SUCCEEDED"
    assert job.reason == "STOP_EPOCHS"
    assert job.result.model == "job-1@1"
    assert job.result.bit_identical
    assert cluster.told("a1", "release_ranges")
    assert cluster.told("w1", "revoke_job")
    wanted = ["JOB_QUEUED", "JOB_STARTED", "MODEL_REGISTERED", "JOB_SUCCEEDED"]
    assert [each for each in cluster.types() if each in wanted] == wanted


def test_a_job_waits_for_members_and_says_why(cluster: Any) -> None:
    cluster.submit()
    assert (cluster.state(), cluster.job().reason) == ("QUEUED", "WAITING_FOR_WORKERS")
    cluster.worker("w1")
    assert cluster.job().reason == "WAITING_FOR_AGGREGATORS"
    cluster.aggregator()
    assert cluster.state() == "RUNNING"
    assert cluster.job().reason == ""


def test_min_workers_are_waited_for(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")

    def two(spec: Any) -> None:
        spec.resources.min_workers = 2

    cluster.submit(edit=two)
    assert cluster.job().message == "1 of 2 workers are there"
    cluster.worker("w2")
    assert cluster.state() == "RUNNING"


def test_a_killed_worker_moves_only_its_own_shards(running: Any) -> None:
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    assert set().union(*before.values()) == ALL
    running.time_s += 1.0
    running.kill("w2")
    assert running.shards("w1") >= before["w1"]
    assert running.shards("w3") >= before["w3"]
    assert running.shards("w1") | running.shards("w3") == ALL
    assert not running.shards("w1") & running.shards("w3")
    lost = next(event for event in running.events if event.type == "WORKER_LOST")
    moved = next(event for event in running.events if event.type == "SHARDS_MOVED")
    assert lost.incident_id == moved.incident_id != ""
    running.time_s += 0.1
    running.report("job-1", 3)
    recovered = running.events[-1]
    assert (recovered.type, recovered.incident_id) == ("RECOVERED", lost.incident_id)
    assert recovered.details["commit_s"].startswith("0.1")
    assert not running.core.incidents
    phases = {dict(each.labels)["phase"] for each in running.observed if "recovery" in each.metric}
    assert phases == {"detect", "commit", "total"}
    redispatched = [each for each in running.observed if each.metric == "redispatches_total"]
    assert sum(each.value for each in redispatched) == len(before["w2"])


def test_a_commit_from_before_the_death_recovers_nothing(running: Any) -> None:
    committed = running.now.unix_nanos
    running.time_s += 1.0
    running.kill("w2")
    running.report("job-1", 3, last_commit_unix_nanos=committed)
    assert "RECOVERED" not in running.types()


def test_the_last_worker_dies_and_another_comes(running: Any) -> None:
    for name in ("w1", "w2", "w3"):
        running.kill(name)
    assert (running.state(), running.job().reason) == ("RUNNING", "WAITING_FOR_WORKERS")
    assert "JOB_WAITING" in running.types()
    running.worker("w4")
    assert running.shards("w4") == ALL
    assert running.job().reason == ""


def test_a_silent_worker_is_suspected_then_lost(running: Any) -> None:
    for _ in range(5):
        running.time_s += 0.5
        running.heartbeats("w1", "w3", "a1")
        running.feed(ev.Tick())
    kinds = running.types()
    assert kinds.index("WORKER_SUSPECTED") < kinds.index("WORKER_LOST")
    assert running.shards("w1") | running.shards("w3") == ALL
    assert running.sessions["w2"] in running.closed


def test_a_suspected_worker_that_speaks_again_is_ready(running: Any) -> None:
    running.time_s += 0.6
    running.feed(ev.Tick())
    running.time_s += 0.6
    running.heartbeats("w1", "w3", "a1")
    running.feed(ev.Tick())
    assert "WORKER_SUSPECTED" in running.types()
    running.heartbeats("w2")
    running.time_s += 0.1
    running.feed(ev.Tick())
    assert "WORKER_LOST" not in running.types()


def test_mass_silence_makes_control_suspect_itself(running: Any) -> None:
    running.advance(2.25, alive=False)
    assert "WORKER_LOST" not in running.types()
    running.heartbeats()
    running.advance(1.0)
    assert "WORKER_LOST" not in running.types()


def test_mass_silence_that_lasts_is_believed(running: Any) -> None:
    running.advance(4.5, alive=False)
    assert running.types().count("WORKER_LOST") == 3


def test_broken_streams_are_believed_even_in_a_mass(running: Any) -> None:
    for name in ("w1", "w2", "w3"):
        running.kill(name)
    assert running.types().count("WORKER_LOST") == 3


def test_a_pause_of_control_itself_blames_nobody(running: Any) -> None:
    running.feed(ev.Tick())
    running.time_s += 60.0
    running.feed(ev.Tick())
    assert "WORKER_LOST" not in running.types()
    assert "AGGREGATOR_LOST" not in running.types()


def test_a_new_worker_loads_first_and_then_takes_its_share(running: Any) -> None:
    running.auto = False
    running.worker("w4")
    assert running.told("w4", "assign_job")[-1].train_nodes == []
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    running.say(running.sessions["w4"], worker_job_ready=pb.WorkerJobReady(job_id="job-1", term=1))
    taken = running.shards("w4")
    assert len(taken) == 4
    kept = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    assert kept == before, "the old hosts keep the shards until the new one works"
    placements = [each.placement for each in running.told("w4", "assign_job")]
    assert placements == sorted(set(placements))
    running.report("job-1", 1)
    running.report("job-1", 2)
    for name in ("w1", "w2", "w3"):
        assert running.shards(name) == before[name] - taken


def test_keepers_go_after_a_lease_even_without_steps(running: Any) -> None:
    running.worker("w4")
    taken = running.shards("w4")
    running.advance(2.5)
    for name in ("w1", "w2", "w3"):
        assert not running.shards(name) & taken


def test_a_shard_goes_back_to_its_keeper_when_the_new_host_dies(running: Any) -> None:
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    running.worker("w4")
    running.kill("w4")
    assert {name: running.shards(name) for name in ("w1", "w2", "w3")} == before


def test_more_slots_get_more_shards(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("big", slots=6)
    cluster.worker("small", slots=2)
    cluster.submit()
    assert len(cluster.shards("big")) == 12
    assert len(cluster.shards("small")) == 4


def test_max_workers_and_labels_are_respected(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", labels={"zone": "a"})
    cluster.worker("w2", labels={"zone": "a"})
    cluster.worker("w3", labels={"zone": "b"}, slots=8)

    def pick(spec: Any) -> None:
        spec.resources.max_workers = 1
        spec.resources.worker_labels["zone"] = "a"

    cluster.submit(edit=pick)
    assert cluster.shards("w1") == ALL
    assert not cluster.told("w2", "assign_job")
    assert not cluster.told("w3", "assign_job")
    cluster.kill("w1")
    assert cluster.shards("w2") == ALL


def test_the_largest_fingerprint_group_is_chosen_and_journalled(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("odd", fingerprint="g", slots=3)
    cluster.worker("w1")
    cluster.worker("w2")
    cluster.submit()
    assert cluster.core.facts.jobs["job-1"].fingerprint == "f"
    assert not cluster.told("odd", "assign_job")
    event = next(each for each in cluster.events if each.type == "WORKER_INELIGIBLE")
    assert event.worker_id == "odd"
    cluster.kill("w1")
    cluster.kill("w2")
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    cluster.advance(600, tick_s=1.0)
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    cluster.worker("w3")
    assert cluster.shards("w3") == ALL


def test_fall_back_gives_bit_identity_up(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", slots=4)
    cluster.worker("odd", fingerprint="g")

    def fall_back(spec: Any) -> None:
        spec.reproducibility.bitwise.fall_back_after.seconds = 30

    cluster.submit(edit=fall_back)
    cluster.kill("w1")
    cluster.advance(29, tick_s=1.0)
    assert not cluster.told("odd", "assign_job")
    cluster.advance(3, tick_s=1.0)
    assert cluster.shards("odd") == ALL
    assert "BIT_IDENTITY_LOST" in cluster.types()
    cluster.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED)
    assert not cluster.job().result.bit_identical


def test_tolerant_takes_everyone(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    cluster.worker("odd", fingerprint="g")
    cluster.submit(edit=lambda spec: spec.reproducibility.tolerant.SetInParent())
    assert cluster.shards("w1")
    assert cluster.shards("odd")


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


def test_an_aggregator_that_comes_back_whole_costs_nothing(running: Any) -> None:
    running.kill("a1")
    held = pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0], version=3)
    running.aggregator("a1", held_ranges=[held])
    assert running.core.facts.jobs["job-1"].term == 1
    assert "AGGREGATOR_LOST" not in running.types()


def test_a_silent_aggregator_loses_its_ranges_to_another(running: Any) -> None:
    running.aggregator("a2")
    running.kill("a1")
    running.advance(1.5)
    assert running.core.facts.jobs["job-1"].term == 1
    running.advance(1.0)
    facts = running.core.facts.jobs["job-1"]
    assert (facts.term, facts.ranges[0].aggregator_id) == (2, "a2")
    assert "AGGREGATOR_LOST" in running.types()


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


def test_pause_and_resume_go_through_a_checkpoint(running: Any) -> None:
    token = running.call(ev.PauseJob, "job-1")
    assert running.answers[token].job.reason == "PAUSING"
    assert running.told("a1", "job_command")[-1].kind == pb.JobCommand.KIND_PAUSE
    too_early = running.call(ev.ResumeJob, "job-1")
    assert running.answers[too_early].reason == "STILL_PAUSING"
    running.report("job-1", 30, outcome=pb.JobReport.OUTCOME_PAUSED, checkpoint_step=30)
    assert running.state() == "PAUSED"
    assert running.told("a1", "release_ranges")
    assert running.told("w1", "revoke_job")
    running.checkpoints["job-1"] = [manifest(30)]
    running.call(ev.ResumeJob, "job-1")
    assert running.state() == "RUNNING"
    assert running.core.facts.jobs["job-1"].term == 2
    assert running.told("a1", "assign_ranges")[-1].restore.step == 30
    assert "JOB_RESUMED" in running.types()
    assert "AGGREGATOR_LOST" not in running.types()


def test_a_pause_survives_a_new_term(running: Any) -> None:
    running.call(ev.PauseJob, "job-1")
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    command = running.told("a1", "job_command")[-1]
    assert (command.kind, command.term) == (pb.JobCommand.KIND_PAUSE, 2)


def test_cancel_is_fenced_then_journalled_then_answered(running: Any) -> None:
    running.storage_up = False
    token = running.call(ev.CancelJob, "job-1", reason="enough")
    assert token not in running.answers
    assert running.state() == "RUNNING"
    running.storage_up = True
    running.run_operations()
    assert running.terms["job-1"] == 2
    assert running.answers[token].job.reason == "CANCELLED"
    assert running.state() == "CANCELLED"
    assert running.told("w1", "revoke_job")


def test_a_cancel_after_the_final_checkpoint_is_refused(running: Any) -> None:
    running.finals["job-1"] = manifest(99, final=True)
    token = running.call(ev.CancelJob, "job-1")
    assert running.answers[token].reason == "FINAL_CHECKPOINT"
    assert running.state() == "SUCCEEDED"


def test_a_queued_job_can_be_cancelled(cluster: Any) -> None:
    cluster.submit()
    cluster.call(ev.CancelJob, "job-1")
    assert cluster.state() == "CANCELLED"
    again = cluster.call(ev.CancelJob, "job-1")
    assert cluster.answers[again].reason == "WRONG_STATE"


def test_a_job_whose_code_fails_is_failed_with_the_traceback(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    session = cluster.worker("w1")
    cluster.submit()
    failure = Failure(code="CODE_FAILED", message="no module net", traceback="Traceback …")
    cluster.describe(session, "job-1", failure=failure)
    job = cluster.job()
    assert (cluster.state(), job.reason) == ("FAILED", "CODE_FAILED")
    assert job.failures[0].traceback == "Traceback …"


def test_another_worker_describes_when_the_first_dies(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    cluster.worker("w1")
    cluster.worker("w2")
    cluster.submit()
    assert cluster.told("w1", "describe_job")
    cluster.kill("w1")
    assert cluster.told("w2", "describe_job")
    cluster.describe(cluster.sessions["w2"], "job-1")
    assert cluster.state() == "RUNNING"


def leaf_failure(cluster: Any, worker: str, kind: Any, shard: int = 3, step: int = 7) -> None:
    failed = pb.LeafFailed(
        job_id="job-1",
        term=1,
        step=step,
        shard=shard,
        kind=kind,
        message="ZeroDivisionError",
        traceback="Traceback (most recent call last)",
        first_row=100,
        row_count=64,
    )
    cluster.say(cluster.sessions[worker], leaf_failed=failed)


def host_of(cluster: Any, shard: int) -> str:
    hosts = [name for name in ("w1", "w2", "w3") if shard in cluster.shards(name)]
    assert len(hosts) == 1
    return hosts[0]


def test_a_leaf_that_fails_on_two_workers_fails_the_job(running: Any) -> None:
    first = host_of(running, 3)
    leaf_failure(running, first, pb.LeafFailed.KIND_RAISED)
    second = host_of(running, 3)
    assert second != first
    assert running.state() == "RUNNING"
    leaf_failure(running, second, pb.LeafFailed.KIND_CRASHED)
    job = running.job()
    assert (running.state(), job.reason) == ("FAILED", "POISON_SHARD")
    failure = job.failures[0]
    assert (failure.shard, failure.first_row, failure.row_count, failure.attempts) == (
        3,
        100,
        64,
        2,
    )
    assert sorted(failure.worker_ids) == sorted((first, second))
    assert failure.traceback.startswith("Traceback")
    assert "rows 100 to 163" in failure.message
    assert "POISON_SHARD" in running.types()


def test_a_lone_worker_gets_three_attempts(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit()
    for attempt in range(3):
        placements = [each.placement for each in cluster.told("w1", "assign_job")]
        leaf_failure(cluster, "w1", pb.LeafFailed.KIND_HUNG)
        if attempt < 2:
            assert cluster.told("w1", "assign_job")[-1].placement > placements[-1]
            assert 3 in cluster.shards("w1")
    assert cluster.job().reason == "POISON_SHARD"


def test_failures_at_different_steps_do_not_add_up(running: Any) -> None:
    for step in range(7, 12):
        leaf_failure(running, host_of(running, 3), pb.LeafFailed.KIND_RAISED, step=step)
    assert running.state() == "RUNNING"


def test_deaths_of_workers_never_count_against_a_shard(running: Any) -> None:
    for turn in range(20):
        running.kill("w2")
        running.worker("w2", incarnation=f"w2-{turn + 2}")
    assert running.state() == "RUNNING"
    assert running.shards("w1") | running.shards("w2") | running.shards("w3") == ALL


def test_a_non_finite_leaf_is_confirmed_elsewhere_and_fails_the_job(running: Any) -> None:
    first = host_of(running, 3)
    leaf_failure(running, first, pb.LeafFailed.KIND_NON_FINITE)
    second = host_of(running, 3)
    assert second != first
    leaf_failure(running, second, pb.LeafFailed.KIND_NON_FINITE)
    assert running.job().reason == "NON_FINITE"


def test_a_non_finite_leaf_is_skipped_where_the_job_says_so(cluster: Any) -> None:
    cluster.aggregator()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)

    def skip(spec: Any) -> None:
        spec.train.on_nonfinite.skip.max_steps = 1

    cluster.submit(edit=skip)
    for _ in range(2):
        leaf_failure(cluster, host_of(cluster, 3), pb.LeafFailed.KIND_NON_FINITE)
    absent = cluster.told(host_of(cluster, 3), "absent_shards")[-1]
    assert (list(absent.shards), absent.step) == ([3], 7)
    assert "NON_FINITE_REFUSED" in cluster.types()
    assert cluster.state() == "RUNNING"
    for _ in range(2):
        leaf_failure(cluster, host_of(cluster, 5), pb.LeafFailed.KIND_NON_FINITE, shard=5, step=8)
    assert cluster.job().reason == "NON_FINITE"


def test_retry_goes_on_from_the_last_checkpoint(running: Any) -> None:
    for _ in range(2):
        leaf_failure(running, host_of(running, 3), pb.LeafFailed.KIND_RAISED)
    assert running.state() == "FAILED"
    running.checkpoints["job-1"] = [manifest(5)]
    running.call(ev.RetryJob, "job-1")
    assert running.state() == "RUNNING"
    assert running.core.facts.jobs["job-1"].term == 3, "one term ended the job, one began it again"
    assert running.told("a1", "assign_ranges")[-1].restore.step == 5


def test_drain_moves_shards_then_lets_the_worker_leave(running: Any) -> None:
    token = running.call(ev.DrainWorker, "w2")
    assert running.answers[token].worker.state == 3
    assert not running.told("w2", "drain")
    assert running.shards("w1") | running.shards("w3") == ALL
    running.report("job-1", 1)
    running.report("job-1", 2)
    assert running.told("w2", "revoke_job")
    assert running.told("w2", "drain")
    running.kill("w2")
    assert "WORKER_LEFT" in running.types()
    assert "WORKER_LOST" not in running.types()
    assert not running.core.facts.drains


def test_the_only_worker_may_leave_at_once(cluster: Any) -> None:
    cluster.aggregator()
    session = cluster.worker("w1")
    cluster.submit()
    cluster.say(session, drain_requested=pb.DrainRequested())
    assert cluster.told("w1", "drain")
    assert cluster.job().reason == "WAITING_FOR_WORKERS"


def test_a_worker_of_the_same_name_replaces_the_old_one(running: Any) -> None:
    old = running.sessions["w2"]
    running.worker("w2", incarnation="w2-2")
    assert old in running.closed
    assert running.types().count("WORKER_LOST") == 1
    running.feed(ev.SessionBroken(old))
    assert running.types().count("WORKER_LOST") == 1


def test_a_hello_of_a_higher_generation_is_not_served(cluster: Any) -> None:
    session = cluster.worker("w1", generation=99)
    assert cluster.closed[session].reason == "STALE_GENERATION"
    assert not cluster.core.workers


@pytest.mark.parametrize("hello", [{"slots": 0}, {"incarnation": ""}])
def test_a_hello_that_makes_no_sense_is_refused(cluster: Any, hello: dict[str, Any]) -> None:
    session = cluster.worker("w1", **hello)
    assert session in cluster.closed
    assert not cluster.core.workers


def test_a_job_larger_than_every_worker_is_refused(cluster: Any) -> None:
    cluster.worker("w1", memory_bytes=1000)
    token = cluster.submit()
    error = cluster.answers[token]
    assert error.reason == "JOB_TOO_LARGE"
    assert "1000" in error.message
    assert not cluster.core.facts.jobs


def test_a_large_job_waits_where_no_worker_is_known(cluster: Any) -> None:
    cluster.aggregator()
    cluster.submit()
    cluster.worker("w1", memory_bytes=1000)
    assert cluster.job().reason == "WAITING_FOR_WORKERS"
    assert "bytes of memory" in cluster.job().message


def test_several_jobs_share_the_workers(running: Any) -> None:
    running.submit("job-2")
    assert running.state("job-2") == "RUNNING"
    shares = [running.shards(name, "job-2") for name in ("w1", "w2", "w3")]
    assert set().union(*shares) == ALL
    running.kill("w1")
    for job_id in ("job-1", "job-2"):
        assert running.shards("w2", job_id) | running.shards("w3", job_id) == ALL


def test_large_vectors_are_cut_into_ranges_over_aggregators(make_cluster: Any) -> None:
    from coordinator.control.core.state import CoreConfig

    cluster = make_cluster(config=CoreConfig(range_min_bytes=65536 * 4))
    cluster.auto = False
    cluster.aggregator("a1")
    cluster.aggregator("a2")
    session = cluster.worker("w1")
    cluster.submit()
    from phalanx.v1.training_pb2 import Layout

    layout = Layout(dtype="float32", element_count=5 * 65536)
    cluster.describe(session, "job-1", layout=layout)
    ranges = cluster.core.facts.jobs["job-1"].ranges
    assert [each.aggregator_id for each in ranges] == ["a1", "a2"]
    assert sum(each.element_count for each in ranges) == 5 * 65536
    assert cluster.told("a2", "assign_ranges")


def test_a_job_succeeds_with_what_the_model_writer_found(running: Any) -> None:
    running.report("job-1", 8, metrics={"test/accuracy": 0.9, "train/loss": 0.1}, examples_lost=2)
    running.report(
        "job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED, metrics={"test/accuracy": 0.91}
    )
    assert running.job().result.metrics == {"test/accuracy": 0.91}
    assert isinstance(running.job().result, Result)
