"""Shards that are groups of columns, on clusters: the bits, whoever computes which group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_svmlight_file

import phalanx
from phalanx.errors import InvalidArgument
from phalanx.sdk.job import Job
from phalanx.testing.arena import GUARD_S, in_time, pause, wait_until
from phalanx.testing.datasets import shared_data

pytestmark = pytest.mark.slow

JOB: dict[str, Any] = {
    "name": "columns",
    "data": {"name": "scores", "columns": {"groups": ["x1-x3", "x12,x4-x8", "x9,x10,x11"]}},
    "train": {
        "model": {"linear_regression": {}},
        "optimizer": {"sgd": {"learning_rate": 0.05, "momentum": 0.9}},
        "l2": 1e-3,
        "batch_size": 128,
        "dtype": "float64",
        "stop": {"steps": 60},
    },
}


def add_data(cluster: phalanx.Cluster) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(1500, 12)) * 10.0 ** rng.integers(-2, 3, 12)
    targets = (rows / rows.std(axis=0)) @ rng.normal(size=12) + rng.normal(size=1500)
    cluster.data.add("scores", rows, targets, test=0.2)


def run(cluster: phalanx.Cluster, **train: Any) -> Job:
    job = cluster.submit({**JOB, "train": {**JOB["train"], **train}})
    job.wait(timeout_s=GUARD_S)
    return job


def parameters_of(cluster: phalanx.Cluster, job: Job) -> np.ndarray:
    assert job.result is not None
    parameters: np.ndarray = np.array(cluster.models.get(job.result.model).parameters)
    return parameters


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        add_data(cluster)
        yield cluster


@pytest.mark.same_bits
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_equal_bits_on_any_number_of_workers(workers: int, alone: phalanx.LocalCluster) -> None:
    expected = run(alone).result
    whole = alone.submit({**JOB, "data": {"name": "scores", "shards": 1}})
    whole.wait(timeout_s=GUARD_S)
    with phalanx.LocalCluster(workers=workers, slots=1) as cluster:
        add_data(cluster)
        wait_until(lambda: len(cluster.workers()) == workers, "all workers to join")
        job = cluster.submit({**JOB, "resources": {"min_workers": min(workers, 3)}})
        result = job.wait(timeout_s=GUARD_S)
        assert expected is not None
        assert result.parameters_sha256 == expected.parameters_sha256
        assert result.metrics == expected.metrics
        assert result.steps == 60
        distance = parameters_of(cluster, job) - parameters_of(alone, whole)
        assert np.abs(distance).max() < 1e-12
        verdict = cluster.verify(job)
        assert verdict.equal
        assert verdict.ledger is not None
        assert verdict.ledger.balanced, verdict.ledger.problems
        progress = job.refresh().progress
        assert (progress.step, progress.total_steps) == (60, 60)
        # 10 steps read the 1,200 rows once: nine of 128 and one of the other 48.
        assert (progress.epoch, progress.examples) == (6.0, 7200)


@pytest.mark.same_bits
def test_verified_columns(alone: phalanx.LocalCluster) -> None:
    undisturbed = run(alone, stop={"steps": 12}).result
    with phalanx.LocalCluster(workers=3, slots=1) as cluster:
        add_data(cluster)
        verified = run(cluster, stop={"steps": 12}, verification={"replicas": 3}).result
    assert undisturbed is not None
    assert verified is not None
    assert verified.parameters_sha256 == undisturbed.parameters_sha256


def test_a_pause_and_a_job_that_goes_on(alone: phalanx.LocalCluster) -> None:
    """Both take over a whole step, wherever the first one was."""
    expected = run(alone, stop={"steps": 400}).result
    with phalanx.LocalCluster(workers=2, slots=1) as cluster:
        add_data(cluster)

        def half_way() -> Job:
            job = cluster.submit({**JOB, "train": {**JOB["train"], "stop": {"steps": 400}}})
            wait_until(lambda: job.refresh().progress.step > 3 or job.done, "some steps")
            pause(job)
            return job

        job = in_time(half_way)
        job.resume()
        paused = job.wait(timeout_s=GUARD_S)
        first = run(cluster, stop={"steps": 30}, checkpoints={"every_steps": 7})
        again = run(cluster, stop={"steps": 400}, start={"job": f"{first.id}@28"}).result
    assert expected is not None
    assert again is not None
    assert paused.parameters_sha256 == expected.parameters_sha256
    assert again.parameters_sha256 == expected.parameters_sha256


def test_a_group_with_an_unknown_column_is_refused(alone: phalanx.LocalCluster) -> None:
    data = {"name": "scores", "columns": {"groups": ["x1-x6", "x7-x13"]}}
    with pytest.raises(InvalidArgument, match="has no column 'x7-x13'"):
        alone.submit({**JOB, "data": data})


@pytest.mark.parametrize(("batch_size", "steps"), [(0, 30), (2048, 100)])
def test_a9a(batch_size: int, steps: int) -> None:
    """Sparse rows of 123 columns among 6 shards."""
    rows, labels = load_svmlight_file(str(shared_data("a9a") / "a9a"), n_features=123)
    train = {
        "model": {"logistic_regression": {}},
        "optimizer": {"sgd": {"learning_rate": 0.5, "momentum": 0.9}},
        "l2": 1e-4,
        "batch_size": batch_size,
        "dtype": "float64",
        "stop": {"steps": steps},
    }
    with phalanx.LocalCluster(workers=0) as cluster:
        cluster.data.add("a9a", rows, (labels > 0).astype(np.int64))
        found = []
        for data in ({"columns": {}, "shards": 6}, {"shards": 1}):
            job = cluster.submit({"name": "a9a", "data": {"name": "a9a", **data}, "train": train})
            job.wait(timeout_s=GUARD_S)
            found.append(parameters_of(cluster, job))
    distance = np.abs(found[0] - found[1]).max()
    print(f"a9a, batch_size {batch_size}: largest difference of a weight {distance:.1e}")
    assert distance < 1e-12
