"""Evaluations and predictions of whole splits: the figures of scikit-learn, the rows in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

import phalanx
from phalanx.errors import FailedPrecondition, InvalidArgument, NotFound
from phalanx.programs import arrays
from phalanx.scoring.measures import (
    area,
    class_metrics,
    class_part,
    confusion,
    number_metrics,
    number_part,
)
from phalanx.sdk.job import Job
from phalanx.testing.datasets import classification, regression


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        yield cluster


def trained(
    cluster: phalanx.Cluster, data: tuple[Any, Any], kind: str, *, model: str = "", **more: Any
) -> str:
    name = model or kind.replace("_", "-")
    cluster.data.add(name, *data, test=0.3)
    document = {
        "name": name,
        "data": {"name": name},
        "train": {"model": {kind: more}, "stop": {"epochs": 3}},
    }
    return cluster.submit(document).wait(timeout_s=60).model


def scored(cluster: phalanx.Cluster, data: str, model: str, shards: int = 4, **more: Any) -> Job:
    document = {
        "name": "score",
        "data": {"name": data, "shards": shards},
        "evaluate": {"model": model, **more},
    }
    job = cluster.submit(document)
    job.wait(timeout_s=60)
    return job


def held_out_rows(cluster: phalanx.Cluster, name: str) -> tuple[Any, Any]:
    """The rows of the test split as they are stored."""
    from phalanx.data.reader import ChunkReader
    from phalanx.training.sampler import rows_in_order, shard_rows

    backend: Any = cluster.backend
    manifest = backend._manifest(cluster.data.get(name).manifest_digest)
    reader = ChunkReader(manifest, "test", backend._blob_path, dtype="float64")
    batch = reader.rows(rows_in_order(shard_rows(0, 1, reader.chunk_rows)))
    return batch.features, batch.targets


@pytest.mark.parametrize(
    ("kind", "classes"), [("logistic_regression", 2), ("softmax_regression", 4)]
)
def test_an_evaluation_of_classes_is_that_of_scikit_learn(
    alone: phalanx.Cluster, kind: str, classes: int, tmp_path: Path
) -> None:
    model = trained(alone, classification(rows=900, classes=classes), kind)
    name = model.partition("@")[0]
    job = scored(alone, name, model, metrics=["accuracy", "f1", "auc", "log_loss"])
    features, targets = held_out_rows(alone, name)
    loaded = alone.models.get(model)
    probabilities = loaded.predict_probabilities(features).astype(np.float64)
    guesses = probabilities.argmax(axis=1)
    average = "binary" if classes == 2 else "macro"
    ranked = probabilities[:, 1] if classes == 2 else probabilities
    rows = probabilities / probabilities.sum(axis=1, keepdims=True)
    expected = {
        "test/accuracy": metrics.accuracy_score(targets, guesses),
        "test/f1": metrics.f1_score(targets, guesses, average=average),
        "test/log_loss": metrics.log_loss(targets, rows),
    }
    assert job.result is not None
    found = job.result.metrics
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, rel=2e-7 if "loss" in metric else 1e-12)
    if classes == 2:
        assert found["test/auc"] == pytest.approx(metrics.roc_auc_score(targets, ranked), rel=1e-12)
    job.save(tmp_path / "evaluation.json")
    document = json.loads((tmp_path / "evaluation.json").read_text())
    matrix = metrics.confusion_matrix(targets, guesses).tolist()
    assert document["confusion_matrix"] == matrix
    assert document["classes"] == list(range(classes))
    assert document["rows"] == len(targets)
    assert {f"test/{key}": value for key, value in document["metrics"].items()} == {
        key: value for key, value in found.items() if key.startswith("test/")
    }


def test_an_evaluation_of_numbers_is_that_of_scikit_learn(alone: phalanx.Cluster) -> None:
    model = trained(alone, regression(rows=600), "linear_regression")
    job = scored(alone, "linear-regression", model, shards=7)
    features, targets = held_out_rows(alone, "linear-regression")
    guesses = alone.models.get(model).predict(features).astype(np.float64)
    assert job.result is not None
    found = job.result.metrics
    assert found["test/r2"] == pytest.approx(metrics.r2_score(targets, guesses), rel=1e-12)
    rmse = metrics.root_mean_squared_error(targets, guesses)
    assert found["test/rmse"] == pytest.approx(rmse, rel=1e-12)
    assert found["test/mae"] == pytest.approx(metrics.mean_absolute_error(targets, guesses))


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(2, 4),
    rows=st.integers(6, 60),
    parts=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_measures_are_those_of_scikit_learn_however_rows_are_cut(
    classes: int, rows: int, parts: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    # Few different scores, so that there are ties, and every class at least once.
    raw = generator.integers(1, 6, (rows, classes)).astype(float)
    probabilities = raw / raw.sum(axis=1, keepdims=True)
    targets = np.concatenate([np.arange(classes), generator.integers(0, classes, rows - classes)])
    cuts = [range(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)]
    kept = [
        arrays.unpack(
            arrays.pack(
                class_part(targets[list(cut)], probabilities[list(cut)], classes, scores=True)
            )
        )
        for cut in cuts
    ]
    found = class_metrics(kept, ["accuracy", "f1", "auc", "log_loss"])
    guesses = probabilities.argmax(axis=1)
    average = "binary" if classes == 2 else "macro"
    ranked = probabilities[:, 1] if classes == 2 else probabilities
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, guesses), rel=1e-12)
    f1 = metrics.f1_score(targets, guesses, average=average, zero_division=0.0)
    assert found["f1"] == pytest.approx(f1, rel=1e-12)
    assert found["log_loss"] == pytest.approx(metrics.log_loss(targets, probabilities), rel=1e-12)
    auc = metrics.roc_auc_score(targets, ranked, multi_class="ovr")
    assert found["auc"] == pytest.approx(auc, rel=1e-12)
    np.testing.assert_array_equal(confusion(kept), metrics.confusion_matrix(targets, guesses))


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(2, 60), parts=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_measures_of_numbers_are_those_of_scikit_learn_however_rows_are_cut(
    rows: int, parts: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    targets = 1e6 + generator.normal(size=rows)
    guesses = targets + generator.normal(size=rows)
    cuts = [slice(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)]
    kept = [number_part(targets[cut], guesses[cut]) for cut in cuts]
    found = number_metrics(kept, ["r2", "rmse", "mae"])
    assert found["r2"] == pytest.approx(metrics.r2_score(targets, guesses), rel=1e-12, abs=1e-12)
    rmse = metrics.root_mean_squared_error(targets, guesses)
    assert found["rmse"] == pytest.approx(rmse, rel=1e-12)


def test_what_is_not_defined_for_some_rows_is_left_out() -> None:
    assert area(np.array([True, True]), np.array([0.1, 0.2])) is None
    part = class_part(np.array([1, 1]), np.array([[0.2, 0.8], [0.6, 0.4]]), 2, scores=True)
    assert class_metrics([part], ["accuracy", "auc"]) == {"accuracy": 0.5}
    same = number_part(np.ones(3), np.ones(3))
    assert number_metrics([same], ["r2", "rmse"]) == {"rmse": 0.0}


@pytest.mark.parametrize("guess", [1e200, 1.2e154])
def test_what_a_model_without_bounds_says_is_beyond_all_numbers(guess: float) -> None:
    far = [number_part(np.arange(4.0), np.full(4, guess)) for _ in range(2)]
    assert number_metrics(far, ["r2", "rmse", "mae"]) == {"mae": pytest.approx(guess)}
    nothing = class_part(np.array([0, 1]), np.full((2, 2), np.nan), 2, scores=False)
    assert class_metrics([nothing], ["accuracy", "log_loss"]) == {"accuracy": 0.5}
    ranked = class_part(np.array([0, 1]), np.array([[0.5, 0.5], [np.nan] * 2]), 2, scores=True)
    assert "auc" not in class_metrics([ranked], ["auc"])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_targets_beyond_all_sums_leave_what_is_a_number(parts: int) -> None:
    """Each may be stored, so an evaluation may meet them."""
    for targets, known in (
        (np.full(4, 1e308), {}),
        (np.array([1e308, -1e308] * 2), {}),
        (np.array([1e200, -1e200] * 2), {"mae": 1e200}),
    ):
        each = [number_part(some, np.arange(len(some))) for some in np.split(targets, parts)]
        found = number_metrics(each, ["r2", "rmse", "mae"])
        assert found == {name: pytest.approx(value) for name, value in known.items()}


def predicted(cluster: phalanx.Cluster, data: str, model: str, **more: Any) -> Job:
    document = {"name": "rows", "data": {"name": data, **more}, "predict": {"model": model}}
    job = cluster.submit(document)
    job.wait(timeout_s=60)
    return job


@pytest.mark.parametrize("kind", ["classes", "words", "numbers", "sparse", "forest", "clusters"])
def test_predictions_are_those_of_the_model_in_the_order_of_the_rows(
    alone: phalanx.Cluster, kind: str, tmp_path: Path
) -> None:
    features, targets = classification(rows=700, classes=3)
    if kind == "words":
        words = np.array(["ash", "birch", "cedar"])[targets]
        model = trained(alone, (features, words), "softmax_regression", model="words")
    elif kind == "numbers":
        model = trained(alone, regression(rows=500), "linear_regression", model="numbers")
    elif kind == "sparse":
        thin = scipy.sparse.csr_array(np.where(features > 0.5, features, 0))
        model = trained(alone, (thin, targets), "softmax_regression", model="sparse")
    elif kind == "forest":
        alone.data.add("forest", features, targets, test=0.3)
        forest = {"name": "forest", "data": {"name": "forest"}, "forest": {"trees": 5}}
        model = alone.submit(forest).wait(timeout_s=60).model
    elif kind == "clusters":
        model = trained(alone, (features, targets), "k_means", model="clusters", clusters=3)
    else:
        model = trained(alone, (features, targets), "softmax_regression", model="classes")
    job = predicted(alone, kind, model, shards=3)
    job.save(tmp_path / "out.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    rows, _ = held_out_rows(alone, kind)
    loaded = alone.models.get(model)
    assert table["prediction"] == loaded.predict(rows).tolist()
    for index, label in enumerate(loaded.classes.tolist()):
        expected = loaded.predict_probabilities(rows)[:, index].astype(np.float64).tolist()
        assert table[f"probability of {label}"] == expected
    assert alone.verify(job).equal


def test_many_predictions_are_several_files_that_are_saved_as_one(
    alone: phalanx.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(alone, classification(rows=400), "softmax_regression", model="many")
    whole = predicted(alone, "many", model, shards=5)
    monkeypatch.setattr("phalanx.programs.predict.ROWS_OF_A_FILE", 30)
    parts = predicted(alone, "many", model, shards=5)
    assert parts.result is not None
    assert [file.name for file in parts.result.files] == [
        f"predictions-{number:05}-of-00004.parquet" for number in range(1, 5)
    ]
    whole.save(tmp_path / "whole.parquet")
    parts.save(tmp_path / "joined.parquet")
    read = pyarrow.parquet.read_table
    assert read(tmp_path / "joined.parquet").equals(read(tmp_path / "whole.parquet"))
    parts.save(tmp_path / "second.parquet", "predictions-00002-of-00004.parquet")
    assert read(tmp_path / "second.parquet").num_rows < 60
    with pytest.raises(NotFound, match="left no file 'none'"):
        parts.save(tmp_path / "none", "none")


def test_a_model_that_does_not_fit_the_data_is_refused(alone: phalanx.Cluster) -> None:
    features, targets = classification(rows=200, features=6, classes=3)
    model = trained(alone, (features, targets), "softmax_regression", model="fits")
    alone.data.add("narrow", features[:, :4], targets)
    alone.data.add("others", features, targets + 1)
    alone.data.add("numbers-only", features, features[:, 0] * 1.5, task="regression")
    for data, program, message in (
        ("narrow", "predict", "takes 6 features, and the data set has 4"),
        ("others", "evaluate", "it tells 0, 1, 2 apart, and the data set has the classes 1, 2, 3"),
        ("numbers-only", "evaluate", "it is for classification"),
    ):
        with pytest.raises(InvalidArgument, match=message) as caught:
            alone.submit({"name": "no", "data": {"name": data}, program: {"model": model}})
        assert caught.value.reason == "MODEL_MISFIT"
        assert caught.value.violations[0].field == f"{program}.model"
    # Other labels do not matter to who only predicts.
    assert predicted(alone, "others", model).state == "SUCCEEDED"


def test_chosen_columns_are_those_of_the_model(alone: phalanx.Cluster) -> None:
    features, targets = classification(rows=300, features=6)
    alone.data.add("choice", features, targets, test=0.3)
    document = {
        "name": "choice",
        "data": {"name": "choice", "features": ["x5", "x2"]},
        "train": {"model": {"softmax_regression": {}}, "stop": {"epochs": 2}},
    }
    model = alone.submit(document).wait(timeout_s=60).model
    job = scored(alone, "choice", model)
    rows, expected = held_out_rows(alone, "choice")
    guesses = alone.models.get(model).predict(rows)
    assert job.result is not None
    assert job.result.metrics["test/accuracy"] == np.mean(guesses == expected)
    assert list(job.message.spec.data.features) == ["x2", "x5"]
    with pytest.raises(InvalidArgument, match="does not say how much its features count"):
        alone.models.get(model).feature_importances()


def test_a_model_in_use_is_kept_and_a_job_without_files_says_so(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    model = trained(alone, classification(rows=200), "softmax_regression", model="kept")
    scored(alone, "kept", model)
    with pytest.raises(FailedPrecondition):
        alone.models.delete(model)
    job = alone.submit(
        {
            "name": "sum",
            "code": {"files": {"work.py": "def run(n):\n    return n\n"}},
            "tasks": {"entrypoint": "work:run", "arguments": [{"n": 1}]},
        }
    )
    job.wait(timeout_s=60)
    with pytest.raises(NotFound, match="left no files"):
        job.save(tmp_path / "none")


def test_shares_of_votes_have_no_log_loss(alone: phalanx.Cluster) -> None:
    alone.data.add("voted", *classification(rows=120))
    machine = {"cascade": {"c": 1, "gamma": 0.1}}
    made = alone.submit({"name": "votes", "data": {"name": "voted"}, **machine})
    job = scored(alone, "voted", made.wait(timeout_s=60).model)
    assert job.result is not None
    assert {"train/accuracy", "train/f1"} <= set(job.result.metrics)
    assert "train/log_loss" not in job.result.metrics


def test_a_folder_is_no_file_to_write_to(alone: phalanx.Cluster, tmp_path: Path) -> None:
    model = trained(alone, classification(rows=200), "softmax_regression", model="told")
    job = scored(alone, "told", model)
    for folder in (".", "/", tmp_path):
        with pytest.raises(IsADirectoryError) as caught:
            job.save(folder)
        assert caught.value.filename == str(folder)


def test_a_model_with_decision_values_has_all_but_the_log_loss(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    model = trained(alone, classification(rows=900, classes=2), "linear_svm", model="margins")
    job = scored(alone, "margins", model)
    features, targets = held_out_rows(alone, "margins")
    loaded = alone.models.get(model)
    values = loaded.predict_decision_values(features)
    wanted = {
        "accuracy": metrics.accuracy_score(targets, values > 0),
        "f1": metrics.f1_score(targets, values > 0),
        "auc": metrics.roc_auc_score(targets, values),
    }
    job.save(tmp_path / "evaluation.json")
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["metrics"] == pytest.approx(wanted, abs=1e-12)
    confusion_matrix = metrics.confusion_matrix(targets, values > 0)
    assert document["confusion_matrix"] == confusion_matrix.tolist()
    predicted = alone.submit(
        {"name": "labels", "data": {"name": "margins", "shards": 3}, "predict": {"model": model}}
    )
    predicted.wait(timeout_s=60)
    predicted.save(tmp_path / "labels.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "labels.parquet")
    assert table.column_names == ["prediction", "decision value"]
    assert table.column("prediction").to_pylist() == loaded.predict(features).tolist()
    assert table.column("decision value").to_pylist() == values.tolist()
