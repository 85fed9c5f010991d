"""A job that keeps its best evaluation, as a user of the SDK sees it, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.errors import InvalidArgument
from phalanx.sdk.job import JobFailed
from phalanx.sdk.values import BestEvaluation
from tests.unit.sdk.nets import net

NET = net("""
error = features @ parameters["w"] - np.eye(self.schema.classes, dtype=np.float32)[targets]
return float((error**2).sum()), {"w": features.T @ error}
""")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path))
    generator = np.random.default_rng(7)
    features = generator.normal(size=(400, 3))
    noisy = features[:, 0] + generator.normal(size=400) > 0
    with phalanx.LocalCluster(workers=0) as local:
        local.data.add("toy", features, np.where(noisy, "yes", "no"), test=0.25)
        yield local


def spec(best: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    # So high a rate that the loss goes up and down.
    return {
        "name": "toy",
        "data": {"name": "toy", "shards": 4},
        "output": {} if best is None else {"best": best},
        "train": {
            "model": {"mlp": {"hidden": [8]}},
            "optimizer": {"adam": {"learning_rate": 3.0}},
            "batch_size": 64,
            "stop": {"steps": 12},
            "evaluation": {"every_steps": 1},
            **train,
        },
    }


def best_of(job: Any, metric: str) -> tuple[int, float]:
    points = {point.step: point.value for point in job.metrics([metric])}
    step = min(points, key=lambda each: (points[each], each))
    return step, points[step]


def test_the_model_the_result_and_the_updates_tell_which_step_it_is(cluster: Any) -> None:
    job = cluster.submit(spec({"metric": "test/loss"}))
    updates = list(job.watch())
    result = job.wait(60)
    step, loss = best_of(job, "test/loss")
    assert 1 < step < 12, "the best is the first or the last, which shows nothing"
    assert result.best == BestEvaluation(step, "test/loss", loss)
    assert (result.steps, result.metrics["test/loss"]) == (12, loss)
    assert updates[-1].best == result.best
    whole = cluster.submit(spec(stop={"steps": step})).wait(60)
    assert result.parameters_sha256 == whole.parameters_sha256
    model = cluster.models.get(result.model)
    assert model.parameters_sha256 == result.parameters_sha256
    folder = cluster.models.cached(result.model)
    document = json.loads((folder / "model.json").read_text())
    assert (document["steps"], document["job_steps"]) == (step, 12)
    assert document["best"]["step"] == step
    assert document["spec"]["output"]["best"] == {"metric": "test/loss"}
    readme = (folder / "README.md").read_text()
    assert f"the parameters of step {step} of 12" in readme
    assert f"in {step} steps" in readme


def test_other_results_say_nothing_of_it(cluster: Any) -> None:
    job = cluster.submit(spec())
    result = job.wait(60)
    assert result.best is None
    assert job.progress.best is None
    folder = cluster.models.cached(result.model)
    assert json.loads((folder / "model.json").read_text())["best"] is None
    assert "parameters of" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("ends", ["by its steps", "by a clock"])
def test_it_is_verified(cluster: Any, ends: str) -> None:
    job = cluster.submit(spec({"metric": "test/loss"}))
    result = job.wait(60)
    if ends == "by a clock":
        stored = cluster.backend._jobs._jobs[job.id].job
        stored.spec.train.stop.wall_time.nanos = 1
    verdict = cluster.verify(job.id)
    assert verdict.equal
    assert verdict.steps == (12 if ends == "by its steps" else result.best.step)


@pytest.mark.parametrize("mode", [{"asynchronous": {}}, {"stale": {"bound": 2}}])
def test_contributions_that_commit_one_by_one(cluster: Any, mode: dict[str, Any]) -> None:
    job = cluster.submit(spec({"metric": "test/loss"}, **mode))
    result = job.wait(60)
    assert (result.best.step, result.best.value) == best_of(job, "test/loss")
    assert cluster.verify(job.id).equal


def test_early_stopping_leaves_the_best_and_not_the_last(cluster: Any) -> None:
    plateau = {"metric": "test/loss", "evaluations": 3}
    job = cluster.submit(spec({"metric": "test/loss"}, stop={"steps": 100, "plateau": plateau}))
    result = job.wait(60)
    assert job.reason == "STOP_PLATEAU"
    assert result.best.step == result.steps - 3
    assert (result.best.step, result.best.value) == best_of(job, "test/loss")


def test_a_retry_begins_without_it(cluster: Any) -> None:
    job = cluster.submit(spec({"metric": "test/loss"}))
    result = job.wait(60)
    run = cluster.backend._jobs._jobs[job.id]
    run.restart()
    assert not run.job.progress.HasField("best")
    assert result.best is not None


def test_user_code_that_does_not_measure_it_fails_the_job(cluster: Any) -> None:
    custom = spec(
        {"metric": "test/lift", "at_least": 0}, model={"custom": {"entrypoint": "net:Net"}}
    )
    job = cluster.submit({**custom, "code": {"files": {"net.py": NET}}})
    with pytest.raises(JobFailed, match="test/lift"):
        job.wait(60)
    assert job.reason == "METRIC_NOT_COMPUTED"


def test_a_wrong_metric_is_named_with_its_path(cluster: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        cluster.submit(spec({"metric": "test/f1"}))
    assert [each.field for each in caught.value.violations] == ["output.best.metric"]
