"""The life of jobs, told to the core event by event."""

from __future__ import annotations

from typing import Any

from coordinator.control.core import events as ev
from coordinator.control.core.state import CoreConfig
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import Failure, Result
from phalanx.v1.training_pb2 import Layout, TensorSpec

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
    cluster.finals["job-1"] = manifest(9, final=True)
    cluster.finals["job-1"].root_state = '{"stop_reason": "STOP_EPOCHS"}'
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


def test_a_root_that_was_loading_hears_of_the_pause_when_it_is_ready(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    cluster.auto = False
    cluster.submit()
    cluster.describe(cluster.sessions["w1"], "job-1")
    cluster.call(ev.PauseJob, "job-1")
    before = len(cluster.told("a1", "job_command"))
    cluster.say(cluster.sessions["a1"], ranges_ready=pb.RangesReady(job_id="job-1", term=1))
    assert len(cluster.told("a1", "job_command")) == before + 1


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


def test_a_pause_without_workers_says_what_it_waits_for(running: Any) -> None:
    for name in ("w1", "w2", "w3"):
        running.kill(name)
    running.call(ev.PauseJob, "job-1")
    running.advance(3.0)
    assert (running.state(), running.job().reason) == ("RUNNING", "WAITING_FOR_WORKERS")
    assert "it pauses at its next step" in running.job().message
    running.worker("w4")
    assert running.shards("w4") == ALL
    running.report("job-1", 4, outcome=pb.JobReport.OUTCOME_PAUSED)
    assert running.state() == "PAUSED"
    # And resumed while nobody is there, it waits again, also across a take-over.
    running.kill("w4")
    running.call(ev.ResumeJob, "job-1")
    running.lead()
    running.aggregator()
    running.advance(5.0)
    assert (running.state(), running.job().reason) == ("RUNNING", "WAITING_FOR_WORKERS")
    running.worker("w5")
    running.advance(1.0)
    assert running.shards("w5") == ALL


def custom(spec: Any) -> None:
    spec.train.model.custom.entrypoint = "net:build"


def described(elements: int) -> dict[str, Any]:
    tensors = [TensorSpec(name="w", shape=[elements])]
    layout = Layout(tensors=tensors, dtype="float32", element_count=elements)
    return {"layout": layout, "evaluation_sums": ["loss"]}


def test_a_model_that_turns_out_too_large_fails_its_job(cluster: Any) -> None:
    cluster.auto = False
    cluster.worker("w1", memory_bytes=10**9)
    cluster.aggregator()
    cluster.submit(edit=custom)
    cluster.describe(cluster.sessions["w1"], "job-1", **described(10**8))
    assert (cluster.state(), cluster.job().reason) == ("FAILED", "JOB_TOO_LARGE")
    assert "the largest of 1 worker has 1000000000" in cluster.job().message


def test_a_model_that_fits_some_workers_runs_on_those(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    cluster.worker("small", memory_bytes=10**9, slots=9)
    cluster.worker("large", memory_bytes=10**10)
    cluster.submit(edit=custom)
    cluster.describe(cluster.sessions["small"], "job-1", **described(10**8))
    assert cluster.state() == "RUNNING"
    cluster.auto = True
    owner = cluster.told("a1", "assign_ranges")[-1]
    ready = pb.RangesReady(job_id="job-1", term=owner.term)
    cluster.say(cluster.sessions["a1"], ranges_ready=ready)
    assert cluster.shards("large") == ALL
    assert not cluster.shards("small")
    # The same after a take-over, from the journal alone.
    cluster.lead()
    cluster.aggregator()
    cluster.worker("small", memory_bytes=10**9, slots=9)
    cluster.advance(10.0)
    assert cluster.job().reason == "WAITING_FOR_WORKERS"
    assert "small is left out" in cluster.job().message


def test_several_jobs_share_the_workers(running: Any) -> None:
    running.submit("job-2")
    assert running.state("job-2") == "RUNNING"
    shares = [running.shards(name, "job-2") for name in ("w1", "w2", "w3")]
    assert set().union(*shares) == ALL
    running.kill("w1")
    for job_id in ("job-1", "job-2"):
        assert running.shards("w2", job_id) | running.shards("w3", job_id) == ALL


def test_large_vectors_are_cut_into_ranges_over_aggregators(make_cluster: Any) -> None:
    cluster = make_cluster(config=CoreConfig(range_min_bytes=65536 * 4))
    cluster.auto = False
    cluster.aggregator("a1")
    cluster.aggregator("a2")
    session = cluster.worker("w1")
    cluster.submit()
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
