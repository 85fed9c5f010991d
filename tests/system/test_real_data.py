"""Real data sets through a real cluster, against scikit-learn, and one larger than the cache."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.testing.arena import GUARD_S, arena, gated_job
from phalanx.testing.datasets import shared_data
from phalanx.testing.scraping import scrape, series

pytestmark = pytest.mark.slow

LAMBDA = 1e-4
A9A_STEPS = 700


@pytest.fixture(scope="module")
def cluster() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=2, slots=1) as local:
        yield local


def sha256_of_one_process(job: dict[str, Any], *data: Any, **options: Any) -> str:
    with phalanx.LocalCluster(workers=0) as alone:
        alone.data.add(job["data"]["name"], *data, **options)
        return alone.submit(job).wait(timeout_s=GUARD_S).parameters_sha256


def test_a9a_reaches_the_optimum_of_scikit_learn(cluster: phalanx.LocalCluster) -> None:
    from sklearn.datasets import load_svmlight_file
    from sklearn.linear_model import LogisticRegression

    path = shared_data("a9a") / "a9a"
    features, labels = load_svmlight_file(str(path), n_features=123)
    signs = np.where(labels > 0, 1.0, -1.0)

    def objective(w: np.ndarray) -> float:
        margins = signs * (features @ w)
        losses = np.maximum(-margins, 0) + np.log1p(np.exp(-np.abs(margins)))
        return float(losses.mean() + LAMBDA / 2 * w @ w)

    reference = LogisticRegression(
        C=1 / (LAMBDA * len(signs)), fit_intercept=False, tol=1e-10, solver="newton-cg"
    ).fit(features, labels)
    smoothness = float(
        np.linalg.eigvalsh((features.T @ features).toarray())[-1] / (4 * len(signs)) + LAMBDA
    )
    root = np.sqrt(LAMBDA / smoothness)
    sgd = {
        "learning_rate": 1 / smoothness,
        "momentum": (1 - root) / (1 + root),
        "nesterov": True,
    }
    job = {
        "name": "a9a",
        "data": {"name": "a9a", "shards": 4},
        "train": {
            "model": {"logistic_regression": {"bias": False}},
            "optimizer": {"sgd": sgd},
            "l2": LAMBDA,
            "dtype": "float64",
            "stop": {"steps": A9A_STEPS},
        },
    }
    cluster.data.add("a9a", path, format="libsvm", dtype="float64")
    result = cluster.submit(job).wait(timeout_s=GUARD_S)
    w = cluster.models.get(result.model).parameters
    assert abs(objective(w) - objective(reference.coef_.ravel())) < 1e-6
    assert result.parameters_sha256 == sha256_of_one_process(
        job, path, format="libsvm", dtype="float64"
    )


ADULT = """
name: adult
data: {name: adult, shards: 8}
train:
  model: {logistic_regression: {}}
  optimizer: {adam: {learning_rate: 0.02}}
  batch_size: 4096
  stop: {epochs: 30}
  evaluation: {every_steps: 100}
"""


def test_adult_from_the_raw_file_to_labels(
    cluster: phalanx.LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared_data("adult")
    (tmp_path / "job.yaml").write_text(ADULT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))

    def cli(*arguments: str) -> None:
        assert run(["--address", cluster.address, *arguments]) == 0

    raw = str(folder / "adult.data")
    cli("data", "add", "adult", raw, "--test", "0.2", "--missing", "category")
    cli("submit", "job.yaml", "--wait")
    [job] = [job for job in cluster.jobs() if job.message.spec.name == "adult"]
    result = job.result
    assert result is not None
    assert result.metrics["test/accuracy"] >= 0.85
    cli("predict", "adult", raw, "-o", "labels.csv")
    with open("labels.csv") as file:
        predicted = [row["prediction"] for row in csv.DictReader(file)]
    with open(raw) as file:
        wanted = [line.rpartition(",")[2].strip() for line in file if line.strip()]
    assert set(predicted) == {"<=50K", ">50K"}
    assert len(predicted) == len(wanted)
    assert np.mean(np.array(predicted) == np.array(wanted)) >= 0.85
    with phalanx.LocalCluster(workers=0) as alone:
        alone.data.add("adult", raw, test=0.2, missing="category")
        same = alone.submit("job.yaml").wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == same.parameters_sha256


def test_a_data_set_ten_times_the_cache_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(11)
    features = generator.standard_normal((160_000, 128)).astype(np.float32)
    targets = (features[:, :5].sum(axis=1) > 0).astype(np.int64)
    cache_bytes = 8 * 2**20
    job = {**gated_job(steps=6, checkpoints={"every_steps": 3}), "name": "large"}
    job["data"] = {"name": "large", "shards": 8}
    # Each step reads all rows, and there is no test split.
    del job["train"]["batch_size"], job["train"]["evaluation"]
    limits = {"PHALANX_WORKER_CACHE_BYTES": str(cache_bytes)}
    with arena(tmp_path, 2, environment=limits) as ring:
        ring.cluster.data.add("large", features, targets)
        manifest = ring.cluster.data.manifest("large")
        stored = sum(chunk.size_bytes for chunk in manifest.splits["train"])
        assert stored > 9.5 * cache_bytes
        running = ring.submit(job)
        victim = ring.caught_at(running, 1)[0]
        ring.signal(victim)
        ring.gate.release()
        result = running.wait(timeout_s=GUARD_S)
        events = [event for event in ring.cluster.events() if event.job_id == running.id]
        assert {"SHARDS_MOVED", "RECOVERED"} <= {event.type for event in events}
        lost = {event.worker_id for event in events if event.type == "WORKER_LOST"}
        assert lost == {victim}
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
    monkeypatch.setenv("PHALANX_TEST_GATE", str(tmp_path))
    assert result.parameters_sha256 == sha256_of_one_process(job, features, targets)


def leaves_of_workers(cluster: phalanx.LocalCluster) -> dict[str, float]:
    """Leaves that each worker has computed."""
    done = series("leaf_seconds_count", program="train", outcome="done")
    workers = [process for process in cluster.processes() if process.role == "worker"]
    return {worker.id: scrape(worker.metrics_address)[done] for worker in workers}


SQUARES = {"linear_regression": {}}
CLASSES = {"softmax_regression": {}}


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (SQUARES, {"sgd": {"learning_rate": 0.05, "momentum": 0.9}}),
        (SQUARES, {"adagrad": {"learning_rate": 0.5}}),
        (SQUARES, {"adamw": {"learning_rate": 0.1, "weight_decay": 0.01}}),
        (CLASSES, {"adagrad": {"learning_rate": 0.1}}),
        (CLASSES, {"adamw": {"learning_rate": 0.01, "weight_decay": 0.01}}),
    ],
    ids=lambda part: next(iter(part)),
)
def test_two_workers_have_the_bits_of_one_process(
    cluster: phalanx.LocalCluster, model: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    from sklearn.datasets import load_diabetes, load_digits

    name, load = ("diabetes", load_diabetes) if model is SQUARES else ("digits", load_digits)
    data = load(return_X_y=True)
    job = {
        "name": name,
        "data": {"name": name, "shards": 7},
        "train": {
            "model": model,
            "optimizer": optimizer,
            "batch_size": 140,
            "stop": {"steps": 40},
        },
    }
    cluster.data.add(name, *data)
    before = leaves_of_workers(cluster)
    running = cluster.submit(job)
    result = running.wait(timeout_s=GUARD_S)
    after = leaves_of_workers(cluster)
    assert all(after[worker] > before[worker] for worker in after), "one of them did nothing"
    points = [point.value for point in running.metric_messages() if point.name == "train/loss"]
    assert points[-1] < points[0], "nothing was learned, so any optimizer would have these bits"
    assert result.parameters_sha256 == sha256_of_one_process(job, *data)
