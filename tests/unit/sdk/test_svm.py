"""A linear SVM from the job file to labels: it has decision values, and no probabilities."""

import re

import numpy as np
import pyarrow.parquet
import pytest

import phalanx
from phalanx.data.model_files import load_model_directory
from phalanx.errors import InvalidArgument
from phalanx.sdk.prediction import predict_file, predicted_rows
from phalanx.sdk.verification import verify_job
from phalanx.testing.datasets import REPOSITORY, classification

CSV_COLUMNS = {"size": [1.5], "colour": ["red"]}
CSV = "size,colour\n1.5,red\n-2.0,blue\n0.25,red\n"


def job(**train):
    return {
        "name": "shapes",
        "data": {"name": "shapes", "shards": 2},
        "train": {
            "model": {"linear_svm": {}},
            "optimizer": {"sgd": {"learning_rate": 0.5}},
            "l2": 0.01,
            "stop": {"steps": 30},
            **train,
        },
    }


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    with phalanx.LocalCluster(workers=0) as local:
        generator = np.random.default_rng(0)
        size = generator.normal(size=300)
        table = {
            "size": size.tolist(),
            "colour": generator.choice(["red", "blue"], 300).tolist(),
            "kind": np.where(size > 0, "big", "small").tolist(),
        }
        local.data.add("shapes", table, target="kind", test=0.2)
        yield local


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(CSV)
    return file


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"model": {"linear_svm": {"loss": "squared_hinge", "bias": False}}},
        {"optimizer": {"pegasos": {}}},
        {"optimizer": {"adam": {"learning_rate": 0.1}}, "asynchronous": {}},
        {"optimizer": {"pegasos": {}}, "local": {"steps": 2}},
        {"optimizer": {"pegasos": {"project": True}}, "reduction": {"clip_norm": 1.0}},
        {"optimizer": {"cocoa": {}}},
    ],
)
def test_learns_and_predicts_original_labels(cluster, rows, train):
    result = cluster.submit(job(**train)).wait(60)
    assert result.metrics["test/accuracy"] > 0.9
    model = cluster.models.get("shapes")
    assert model.predict(rows).tolist() == ["big", "small", "big"]


def test_decision_values_stand_where_probabilities_would(cluster, rows, tmp_path):
    cluster.submit(job()).wait(60)
    model = load_model_directory(cluster.models.download("shapes", tmp_path / "model"))
    values = model.predict_decision_values(rows)
    assert values.shape == (3,)
    assert model.classes.tolist() == ["big", "small"]
    assert (values > 0).tolist() == [False, True, False], "above 0 for the second class"
    predict_file(model, rows, tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "prediction,decision value"
    assert [line.split(",")[0] for line in lines[1:]] == ["big", "small", "big"]
    assert np.array([float(line.split(",")[1]) for line in lines[1:]], np.float32).tolist() == (
        values.tolist()
    )
    predict_file(model, rows, tmp_path / "out.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column("decision value").to_pylist() == values.tolist()
    assert list(predicted_rows(model, rows)) == [
        {"prediction": label, "decision_value": value}
        for label, value in zip(["big", "small", "big"], values.tolist(), strict=True)
    ]


def test_predictions_of_no_rows_have_the_same_shape(cluster):
    cluster.submit(job()).wait(60)
    model = cluster.models.get("shapes")
    nothing = model.prepare(CSV_COLUMNS)[:0]
    predictions = model.predict_prepared(nothing)
    assert (predictions.labels.shape, predictions.probabilities) == ((0,), None)
    assert predictions.decision_values.shape == (0,)


def test_what_a_model_does_not_have_is_said(cluster, rows):
    cluster.submit(job()).wait(60)
    with pytest.raises(InvalidArgument, match="use predict_decision_values"):
        cluster.models.get("shapes").predict_probabilities(rows)
    cluster.submit(job(model={"logistic_regression": {}})).wait(60)
    with pytest.raises(InvalidArgument, match="no model with decision values"):
        cluster.models.get("shapes").predict_decision_values(rows)


def test_class_weights_move_the_border(cluster, rows):
    weights = {"name": "shapes", "shards": 2, "class_weights": {"weights": {"big": 1, "small": 9}}}
    plain = cluster.submit(job()).wait(60)
    weighted = cluster.submit({**job(), "data": weights}).wait(60)
    value = [
        cluster.models.get(each.model).predict_decision_values({"size": [0.0], "colour": ["red"]})
        for each in (plain, weighted)
    ]
    assert value[1] > value[0]


def jobs_of_the_manual():
    text = (REPOSITORY / "docs" / "ALGORITHMS.md").read_text()
    found = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [each for each in found if "linear_svm" in each]


@pytest.mark.parametrize("text", jobs_of_the_manual(), ids=["pegasos", "cocoa"])
def test_jobs_of_the_manual_do_what_it_says(text, tmp_path, monkeypatch):
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "job.yaml").write_text(text)
    features, targets = classification(2000, 8, 2)
    with phalanx.LocalCluster(workers=0) as local:
        local.data.add("adult", features, targets, test=0.2)
        job = local.submit(tmp_path / "job.yaml")
        result = job.wait(60)
        model = local.models.get(result.model)
        assert verify_job(local, job.id).equal
    assert (model.predict(features) == targets).mean() > 0.9
    if "cocoa" in text:
        assert result.metrics["train/duality_gap"] <= 1e-2
        assert result.steps < 100
        assert model.parameters.shape == (8,), "the dual variables are not part of it"


def test_the_best_round_is_kept_without_its_dual_variables(cluster):
    best = {"output": {"best": {"metric": "train/primal", "at_most": 2}}}
    result = cluster.submit({**job(optimizer={"cocoa": {}}), **best}).wait(60)
    model = cluster.models.get(result.model)
    assert model.parameters.shape == (2 + 1,)
    assert result.metrics["train/primal"] < 0.5


class OneNumber:
    """A model of a user's that gives one number for each row."""

    def predict(self, parameters, features):
        return np.linspace(-1, 1, len(features))


def test_one_number_tells_no_more_than_two_classes_apart(cluster, rows):
    features, targets = classification(90, 2, 3)
    cluster.data.add("three", features, targets)
    three = {**job(model={"softmax_regression": {}}), "name": "three", "data": {"name": "three"}}
    cluster.submit(three).wait(60)
    model = cluster.models.get("three")
    model.model = OneNumber()
    with pytest.raises(InvalidArgument, match="two classes apart, and has 3 classes"):
        model.predict(features)
    cluster.submit(job()).wait(60)
    two = cluster.models.get("shapes")
    two.model = OneNumber()
    assert two.predict(rows).tolist() == ["big"] * 3
