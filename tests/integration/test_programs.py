"""Programs of tasks on real processes, and in one: what people see of them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from sklearn.ensemble import RandomForestClassifier

import phalanx
from phalanx.cli.main import run
from phalanx.errors import FailedPrecondition, NotFound
from phalanx.sdk.job import Job
from phalanx.sdk.verdict import TaskLedger
from phalanx.specs import load_yaml
from phalanx.tasks import is_program
from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import REPOSITORY, digits

FOREST: dict[str, Any] = {
    "name": "digits-forest",
    "data": {"name": "digits", "shards": 3},
    "forest": {"trees": 32, "tree": {"max_depth": 10}},
    "seed": 4,
}


@pytest.fixture(scope="module")
def forest(local: phalanx.LocalCluster) -> Job:
    job = local.submit(FOREST)
    job.wait(timeout_s=GUARD_S)
    return job


@pytest.fixture(scope="module")
def forest_alone(alone: phalanx.Cluster) -> phalanx.Result:
    return alone.submit(FOREST).wait(timeout_s=GUARD_S)


def test_a_forest_grown_by_workers_is_that_of_scikit_learn(
    local: phalanx.LocalCluster, forest: Job, forest_alone: phalanx.Result
) -> None:
    assert forest.result is not None
    features, targets = digits()
    expected = RandomForestClassifier(
        32, random_state=4, n_jobs=1, max_depth=10, oob_score=True
    ).fit(features.astype(np.float32), targets)
    model = local.models.get(forest.result.model)
    np.testing.assert_array_equal(
        model.predict_probabilities(features), expected.predict_proba(features)
    )
    assert forest.result.metrics["oob/accuracy"] == expected.oob_score_
    assert forest.result.bit_identical
    assert forest_alone.parameters_sha256 == forest.result.parameters_sha256
    assert forest_alone.steps == forest.result.steps


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


NETS = """
import numpy as np

from phalanx.models import UserModel


class Centres(UserModel):
    def __init__(self, schema):
        super().__init__(schema, {"c": (schema.classes, schema.features)})

    def initial(self, seed):
        return {"c": np.zeros(tuple(self.layout.tensors[0].shape))}

    def loss_and_gradients(self, parameters, features, targets):
        error = parameters["c"][targets] - features
        out = np.zeros_like(parameters["c"])
        np.add.at(out, targets, error)
        return float((error**2).sum() / 2), {"c": out}

    def predictions(self, parameters, features):
        far = ((features[:, None, :] - parameters["c"]) ** 2).sum(axis=2)
        near = np.exp(far.min(axis=1, keepdims=True) - far)
        return near / near.sum(axis=1, keepdims=True)
"""


@pytest.fixture(scope="module")
def centres(local: phalanx.LocalCluster, alone: phalanx.Cluster) -> str:
    """A model with code of its own, the same in both clusters."""
    document = {
        "name": "centres",
        "data": {"name": "digits"},
        "code": {"files": {"nets.py": NETS}},
        "train": {
            "model": {"custom": {"entrypoint": "nets:Centres"}, "standardise": False},
            "optimizer": {"sgd": {"learning_rate": 0.5}},
            "stop": {"steps": 15},
        },
    }
    results = [each.submit(document).wait(timeout_s=GUARD_S) for each in (local, alone)]
    assert results[0].parameters_sha256 == results[1].parameters_sha256
    return results[0].model


@pytest.mark.parametrize("model", ["digits-forest", "centres"])
def test_predictions_of_workers_have_the_bytes_of_those_in_one_process(
    local: phalanx.LocalCluster,
    alone: phalanx.Cluster,
    forest: Job,
    forest_alone: phalanx.Result,
    centres: str,
    model: str,
    tmp_path: Path,
) -> None:
    for program in ("evaluate", "predict"):
        document = {
            "name": f"{program}-{model}",
            "data": {"name": "digits", "shards": 4},
            program: {"model": model},
        }
        jobs = [cluster.submit(document) for cluster in (local, alone)]
        results = [job.wait(timeout_s=GUARD_S) for job in jobs]
        assert results[0].files == results[1].files
        assert results[0].model == ""
        jobs[0].save(tmp_path / program)
        saved = (tmp_path / program).read_bytes()
        assert hashlib.sha256(saved).hexdigest() == results[0].files[0].digest
        assert local.verify(jobs[0]).equal
    table = pyarrow.parquet.read_table(tmp_path / "predict")
    features, targets = digits()
    loaded = local.models.get(model, allow_code=True)
    assert table["prediction"].to_pylist() == loaded.predict(features).tolist()
    evaluation = json.loads((tmp_path / "evaluate").read_text())
    accuracy = np.mean(loaded.predict(features) == targets)
    assert evaluation["metrics"]["accuracy"] == accuracy


def test_files_of_programs_are_listed_and_written_by_a_command(
    local: phalanx.LocalCluster,
    forest: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PHALANX_ADDRESS", local.address)
    document = {"name": "rows", "data": {"name": "digits"}, "predict": {"model": "digits-forest"}}
    (tmp_path / "job.json").write_text(json.dumps(document))
    assert run(["submit", str(tmp_path / "job.json"), "--wait"]) == 0
    shown = capsys.readouterr()
    assert "files" in shown.out
    assert "predictions.parquet" in shown.out
    assert " tasks · " in shown.err
    assert "per leaf" not in shown.err
    job = local.jobs()[0]
    assert run(["results", job.id]) == 0
    assert capsys.readouterr().out.startswith("predictions.parquet\t")
    assert run(["results", job.id, "-o", str(tmp_path / "out.parquet")]) == 0
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == len(digits()[1])
    with pytest.raises(FailedPrecondition, match="no results of their own"):
        job.results()


def test_a_model_that_rows_go_through_is_kept(local: phalanx.LocalCluster, forest: Job) -> None:
    document = {"name": "score", "data": {"name": "digits"}, "evaluate": {"model": "digits-forest"}}
    local.submit(document).wait(timeout_s=GUARD_S)
    with pytest.raises(FailedPrecondition):
        local.models.delete("digits-forest")


def test_a_model_that_is_not_there_is_named(local: phalanx.LocalCluster) -> None:
    with pytest.raises(NotFound) as caught:
        local.submit({"name": "no", "data": {"name": "digits"}, "evaluate": {"model": "none"}})
    assert caught.value.violations[0].field == "evaluate.model"


def test_the_jobs_of_the_documents_run(alone: phalanx.Cluster) -> None:
    text = (REPOSITORY / "docs" / "ALGORITHMS.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    documents = [load_yaml(block) for block in blocks]
    programs = [each for each in documents if is_program(each)]
    names = ["forest", "cascade", "sweep", "evaluate", "predict"]
    assert [each.WhichOneof("program") for each in programs] == names
    alone.data.add("fashion", *digits(), test=0.2)
    for spec in programs:
        assert alone.submit(spec).wait(timeout_s=GUARD_S).metrics


@pytest.mark.soak
def test_the_winner_of_a_sweep_may_be_large(
    local: phalanx.LocalCluster, alone: phalanx.Cluster
) -> None:
    """A network of some 80 MB is one result of a task: from its leaf process into storage."""
    sweep = {
        "base": {"train": {"model": {"mlp": {"hidden": [280_000]}}, "stop": {"steps": 1}}},
        "grid": {"train.batch_size": [8]},
        "folds": 2,
    }
    document = {"name": "large", "data": {"name": "digits"}, "sweep": sweep}
    result = local.submit(document).wait(timeout_s=GUARD_S)
    assert sum(each.size_bytes for each in local.models.describe(result.model).files) > 80 * 10**6
    assert result.parameters_sha256 == alone.submit(document).wait(GUARD_S).parameters_sha256
