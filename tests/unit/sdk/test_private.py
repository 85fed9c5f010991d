"""Private jobs as their users meet them."""

import json
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.cli.verdict_view import print_verdict
from phalanx.sdk.in_process_jobs import InProcessJobs
from phalanx.testing.datasets import classification

JOB: dict[str, Any] = {
    "name": "private",
    "data": {"name": "data", "shards": 3},
    "train": {
        "model": {"logistic_regression": {}},
        "batch_size": 30,
        "stop": {"steps": 6},
        "privacy": {"clip_norm": 1, "noise_multiplier": 2.0, "delta": 1e-4},
    },
}


@pytest.fixture
def alone() -> Any:
    with phalanx.LocalCluster(workers=0) as cluster:
        features, targets = classification(400, 5, 2)
        cluster.data.add("data", features, targets, test=0.25)
        yield cluster


def test_the_model_says_what_was_spent(alone: Any) -> None:
    told = alone.plan(JOB).plan
    job = alone.submit(JOB)
    result = job.wait()
    assert job.refresh().progress.metrics["train/epsilon"] == told.epsilon > 0
    assert result.metrics["train/epsilon"] == told.epsilon
    folder = alone.models.cached(result.model)
    described = json.loads((folder / "model.json").read_text())
    assert described["privacy"] == {
        "epsilon": told.epsilon,
        "delta": 1e-4,
        "clip_norm": 1,
        "noise_multiplier": 2,
        "sampling_rate": 0.1,
    }
    readme = (folder / "README.md").read_text()
    assert f"ε = {told.epsilon:.4g} at δ = 0.0001" in readme
    assert "each has noise of its own" in readme
    assert set(described["metrics"]) == {"train/epsilon", "test/loss", "test/accuracy"}


def test_a_job_that_is_not_private_says_nothing_of_it(alone: Any) -> None:
    train = {name: value for name, value in JOB["train"].items() if name != "privacy"}
    result = alone.submit({**JOB, "train": train}).wait()
    described = json.loads((alone.models.cached(result.model) / "model.json").read_text())
    assert described["privacy"] is None


def test_verifying_says_why_it_does_not_compute_it_again(
    alone: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job = alone.submit(JOB)
    job.wait()
    verdict = alone.verify(job)
    assert not verdict.wrong
    assert "by a secret" in verdict.not_compared
    assert verdict.to_json()["ledger"] is None
    print_verdict(verdict)
    shown = capsys.readouterr().out
    assert "not counted" in shown
    assert "not compared: the job is private" in shown


def test_two_jobs_of_one_spec_have_noise_of_their_own(alone: Any) -> None:
    first, second = (alone.submit(JOB).wait().parameters_sha256 for _ in range(2))
    assert first != second


def test_a_second_attempt_repeats_the_noise_of_the_first(
    alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    jobs: InProcessJobs = alone.backend._jobs
    train = jobs._train

    def failing(plan: Any, on_progress: Any, secret: bytes) -> Any:
        seen.append(secret)
        if len(seen) == 1:
            raise phalanx.errors.Unavailable("once")
        return train(plan, on_progress, secret)

    monkeypatch.setattr(jobs, "_train", failing)
    job = alone.submit(JOB)
    with pytest.raises(phalanx.errors.PhalanxError):
        job.wait()
    job.retry()
    job.wait()
    assert seen[0] == seen[1]
    assert len(seen[0]) == 32
    assert np.frombuffer(seen[0], np.uint8).any()
