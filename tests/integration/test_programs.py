"""Programs of tasks on real processes, and in one: what people see of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

import phalanx
from phalanx.cli.main import run
from phalanx.sdk.job import Job
from phalanx.sdk.verdict import TaskLedger
from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import digits

FOREST: dict[str, Any] = {
    "name": "digits-forest",
    "data": {"name": "digits", "shards": 3},
    "forest": {"trees": 20, "tree": {"max_depth": 10}},
    "seed": 4,
}


@pytest.fixture(scope="module")
def local() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=2, slots=1) as cluster:
        cluster.data.add("digits", *digits())
        yield cluster


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        cluster.data.add("digits", *digits())
        yield cluster


@pytest.fixture(scope="module")
def forest(local: phalanx.LocalCluster) -> Job:
    job = local.submit(FOREST)
    job.wait(timeout_s=GUARD_S)
    return job


def test_a_forest_grown_by_workers_is_that_of_scikit_learn(
    local: phalanx.LocalCluster, alone: phalanx.Cluster, forest: Job
) -> None:
    assert forest.result is not None
    features, targets = digits()
    expected = RandomForestClassifier(
        20, random_state=4, n_jobs=1, max_depth=10, oob_score=True
    ).fit(features.astype(np.float32), targets)
    model = local.models.get(forest.result.model)
    np.testing.assert_array_equal(
        model.predict_probabilities(features), expected.predict_proba(features)
    )
    assert forest.result.metrics["oob/accuracy"] == expected.oob_score_
    assert forest.result.bit_identical
    in_process = alone.submit(FOREST).wait(timeout_s=GUARD_S)
    assert in_process.parameters_sha256 == forest.result.parameters_sha256
    assert in_process.steps == forest.result.steps


def test_a_forest_is_verified_task_by_task(local: phalanx.LocalCluster, forest: Job) -> None:
    verdict = local.verify(forest)
    tasks = forest.message.progress.total_steps
    assert verdict.equal
    assert verdict.compared
    assert verdict.tasks == TaskLedger(tasks=tasks, done=tasks)


def test_the_commands_show_a_program_as_tasks_with_a_model(
    local: phalanx.LocalCluster,
    forest: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PHALANX_ADDRESS", local.address)
    assert run(["verify", forest.id]) == 0
    assert "equal" in capsys.readouterr().out
    assert run(["models", "show", "digits-forest"]) == 0
    assert "oob/accuracy" in capsys.readouterr().out
    events = [each.type for each in local.events() if each.job_id == forest.id]
    assert "MODEL_REGISTERED" in events
    assert "model digits-forest@1" in forest.refresh().message.message


def test_a_task_that_fails_fails_the_program_and_names_its_cause(
    alone: phalanx.Cluster, local: phalanx.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.programs.work.RESULT_BYTES_MAX", 10)
    job = alone.submit(FOREST)
    with pytest.raises(phalanx.JobFailed, match="at most 10 are taken"):
        job.wait(timeout_s=GUARD_S)
