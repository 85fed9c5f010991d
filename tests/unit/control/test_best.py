"""Jobs that keep their best evaluation: what is told of it, and what a worker finds out."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import BestEvaluation, Result
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout

BEST = BestEvaluation(step=4, metric="test/accuracy", value=0.75)
LAYOUT = Layout(dtype="float32", element_count=640)


def keeping(metric: str = "test/accuracy") -> Any:
    def edit(spec: JobSpec) -> None:
        spec.output.best.metric = metric
        spec.output.best.at_least = 0

    return edit


@pytest.fixture
def job(cluster: Any) -> Any:
    """A running job that keeps its best evaluation."""
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit(edit=keeping())
    return cluster


def test_progress_tells_of_the_best_so_far(job: Any) -> None:
    job.report("job-1", 3, metrics={"train/loss": 0.5})
    assert not job.job().progress.HasField("best")
    job.report("job-1", 5, metrics={"train/loss": 0.5}, best=BEST)
    assert job.job().progress.best == BEST
    job.call(ev.PauseJob, "job-1")
    job.report("job-1", 6, outcome=pb.JobReport.OUTCOME_PAUSED, best=BEST)
    job.lead()
    assert job.job().progress.best == BEST, "while it is paused nobody reports"


@pytest.mark.parametrize("reported", [True, False])
def test_a_result_tells_what_was_measured_at_the_best_step(job: Any, reported: bool) -> None:
    job.finals["job-1"] = storage_pb.CheckpointManifest(job_id="job-1", step=9, final=True)
    job.written = Result(best=BEST, metrics={"test/accuracy": 0.75})
    if reported:
        told = {"test/accuracy": 0.5, "train/loss": 0.125}
        job.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED, metrics=told, best=BEST)
    else:
        job.lead()
    ended = job.job()
    assert job.state() == "SUCCEEDED"
    assert (ended.result.steps, ended.result.best) == (9, BEST)
    assert dict(ended.result.metrics) == {"test/accuracy": 0.75}, "the last step's are others"
    assert (ended.progress.step, ended.progress.best) == (9, BEST)


def test_other_results_take_what_the_report_says_besides(job: Any) -> None:
    job.finals["job-1"] = storage_pb.CheckpointManifest(job_id="job-1", step=9, final=True)
    job.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED, metrics={"train/loss": 0.125})
    ended = job.job()
    assert dict(ended.result.metrics) == {"train/loss": 0.125}
    assert not ended.result.HasField("best")
    assert not ended.progress.HasField("best")


def described(cluster: Any, evaluation_sums: list[str]) -> None:
    """Submit user code that keeps its best lift, and say what it measures."""
    cluster.auto = False
    cluster.aggregator()
    session = cluster.worker("w1")

    def edit(spec: JobSpec) -> None:
        spec.train.model.custom.entrypoint = "net:build"
        keeping("test/lift")(spec)

    cluster.submit(edit=edit)
    cluster.describe(session, "job-1", layout=LAYOUT, evaluation_sums=evaluation_sums)


def test_user_code_that_does_not_measure_it_fails_the_job(cluster: Any) -> None:
    described(cluster, ["loss", "correct"])
    assert (cluster.state(), cluster.job().reason) == ("FAILED", "METRIC_NOT_COMPUTED")
    assert "evaluations of this job give test/accuracy, test/loss" in cluster.job().message


def test_user_code_that_measures_it_runs(cluster: Any) -> None:
    described(cluster, ["lift"])
    assert cluster.state() == "RUNNING"
