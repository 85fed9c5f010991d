"""Jobs on some of the columns, on a real cluster through the command line: from file to labels."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import shared_data

pytestmark = pytest.mark.slow

JOB = """
name: income
data: {name: people, shards: 6, features: [hours, town]}
train:
  model: {mlp: {hidden: [6]}}
  optimizer: {adam: {learning_rate: 0.02}}
  batch_size: 96
  stop: {steps: 30}
"""
MODES = {
    "parameter server": "train.parameter_server={}",
    "all-reduce": "train.all_reduce={}",
    "int8": "train.compression={int8: {}}",
    "top-k": "train.compression={top_k: {fraction: 0.3}}",
    "verified": "train.verification={replicas: 3}",
    "class weights": "data.class_weights={}",
    "local steps": "train.local={steps: 3}",
}

Cli = Callable[..., str]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Who works more than 40 hours earns much, most of all in Ulm; age and job say nothing."""
    generator = np.random.default_rng(12)
    path = tmp_path_factory.mktemp("people") / "people.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "town", "job", "hours", "income"])
        for age, hours in generator.integers([18, 10], [70, 70], (600, 2)).tolist():
            town = str(generator.choice(["Ulm", "Bonn", "Jena"]))
            rich = hours + (10 if town == "Ulm" else 0) > 42
            job = str(generator.choice(["clerk", "smith"]))
            writer.writerow([age, town, job, hours, "high" if rich else "low"])
    return path


@pytest.fixture(scope="module")
def cluster(people: Path) -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=3, slots=1) as local:
        local.data.add("people", people, test=0.25)
        yield local


@pytest.fixture(scope="module")
def alone(people: Path) -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=0) as local:
        local.data.add("people", people, test=0.25)
        yield local


@pytest.fixture
def cli(
    cluster: phalanx.LocalCluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Cli:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)

    def call(*arguments: str, code: int = 0, remark: bool = False) -> str:
        """What was written; what was said beside it, or the error of a code."""
        capfd.readouterr()
        exit_code = run(["--address", cluster.address, *arguments])
        out, err = capfd.readouterr()
        assert exit_code == code, err
        return err if code or remark else out

    return call


def job_named(cluster: phalanx.LocalCluster, name: str) -> Any:
    [job] = [job for job in cluster.jobs() if job.message.spec.name == name]
    return job


@pytest.mark.parametrize("mode", MODES)
def test_three_workers_have_the_bits_of_one_process(
    cluster: phalanx.LocalCluster, alone: phalanx.LocalCluster, cli: Cli, mode: str
) -> None:
    name = mode.replace(" ", "-")
    cli("submit", "job.yaml", "--set", f"name={name}", "--set", MODES[mode], "--wait")
    job = job_named(cluster, name)
    assert job.message.spec.data.features == ["town", "hours"]
    same = alone.submit(job.message.spec).wait(timeout_s=GUARD_S)
    assert job.result.parameters_sha256 == same.parameters_sha256
    assert job.result.metrics == same.metrics
    assert job.result.metrics["test/accuracy"] > 0.8
    assert json.loads(cli("--json", "verify", job.id))["equal"]


def test_from_the_file_to_labels(cluster: phalanx.LocalCluster, cli: Cli, people: Path) -> None:
    cli("submit", "job.yaml", "--wait")
    cli("predict", "income", str(people), "-o", "whole.csv")
    said = cli("predict", "income", str(people), "-o", "again.csv", remark=True)
    assert "columns that the job did not choose are ignored: age, job\n" in said
    with people.open() as file, open("few.csv", "w", newline="") as few:
        rows = list(csv.DictReader(file))
        writer = csv.DictWriter(few, ["hours", "town"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    said = cli("predict", "income", "few.csv", "-o", "labels.csv", remark=True)
    assert "ignored" not in said
    assert Path("labels.csv").read_bytes() == Path("whole.csv").read_bytes()
    with open("labels.csv") as file:
        labels = [row["prediction"] for row in csv.DictReader(file)]
    assert np.mean([label == row["income"] for label, row in zip(labels, rows, strict=True)]) > 0.8
    cli("models", "get", "income", "folder")
    document = json.loads(Path("folder/model.json").read_text())
    assert [column["name"] for column in document["columns"]] == ["town", "hours"]
    assert "The job chose 2 columns of 4." in Path("folder/README.md").read_text()
    cli("models", "export", "income", "model.npz")
    with np.load("model.npz") as tensors:
        assert tensors["layers.0.weights"].shape == (4, 6)


def test_a_wrong_name_is_told_with_its_line_and_the_right_one(cli: Cli) -> None:
    said = cli("submit", "job.yaml", "--set", "data.features=[Hours]", code=2)
    assert "data.features[0]: people@1 has no column 'Hours'; did you mean 'hours'?" in said
    said = cli("submit", "job.yaml", "--set", "data.features=[income]", code=2)
    assert "'income' is the target of people@1" in said
    Path("job.yaml").write_text(JOB.replace("[hours, town]", "[hours, town, hours]"))
    assert "job.yaml:3: data.features[2]: 'hours' is given twice" in cli(
        "submit", "job.yaml", "--dry-run", code=2
    )


def test_data_without_names_say_what_their_columns_are_called(
    cluster: phalanx.LocalCluster, cli: Cli
) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (64, 6)).astype(np.uint8)
    cluster.data.add("pixels", pixels, pixels[:, 2] > 127)
    assert "x1 … x6" in cli("data", "show", "pixels")
    shown = cli(
        "submit", "job.yaml", "--set", "data={name: pixels, features: [x3, x1]}", "--dry-run"
    )
    assert 'features: ["x1", "x3"]' in shown


ADULT = """
name: adult
data:
  name: adult
  shards: 8
  # age, years of education, marital status, capital gain and loss, hours per week
  features: [column_1, column_5, column_6, column_11, column_12, column_13]
train:
  model: {logistic_regression: {}}
  optimizer: {adam: {learning_rate: 0.02}}
  batch_size: 4096
  stop: {epochs: 30}
  evaluation: {every_steps: 100}
"""


def test_adult_on_six_of_its_columns(cluster: phalanx.LocalCluster, cli: Cli) -> None:
    raw = str(shared_data("adult") / "adult.data")
    Path("job.yaml").write_text(ADULT)
    cli("data", "add", "adult", raw, "--test", "0.2", "--missing", "category")
    cli("submit", "job.yaml", "--wait")
    result = job_named(cluster, "adult").result
    assert result.metrics["test/accuracy"] >= 0.83
    said = cli("predict", "adult", raw, "-o", "labels.csv", remark=True)
    ignored = "column_2, column_3, column_4, column_7, column_8, column_9, column_10, column_14"
    assert f"columns that the job did not choose are ignored: {ignored}\n" in said
    with open("labels.csv") as file:
        predicted = [row["prediction"] for row in csv.DictReader(file)]
    with open(raw) as file:
        lines = [line.strip().split(", ") for line in file if line.strip()]
    wanted = [line[14] for line in lines]
    assert np.mean(np.array(predicted) == np.array(wanted)) >= 0.83
    with open("few.csv", "w", newline="") as few:
        writer = csv.writer(few)
        writer.writerow([f"column_{number}" for number in (13, 12, 11, 6, 5, 1)])
        writer.writerows([line[number - 1] for number in (13, 12, 11, 6, 5, 1)] for line in lines)
    cli("predict", "adult", "few.csv", "-o", "again.csv")
    assert Path("again.csv").read_bytes() == Path("labels.csv").read_bytes()
    with phalanx.LocalCluster(workers=0) as one:
        one.data.add("adult", raw, test=0.2, missing="category")
        assert one.submit("job.yaml").wait(GUARD_S).parameters_sha256 == result.parameters_sha256
