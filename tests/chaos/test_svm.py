"""Pegasos with its projection, and CoCoA+: the same bits whoever dies in the middle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.sdk.job import Job
from phalanx.testing.arena import GUARD_S, Arena, arena, in_time
from phalanx.testing.half_way import kill_in_a_leaf, kill_the_aggregators

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

TRAIN: dict[str, dict[str, Any]] = {
    "pegasos, projected": {
        "model": {"linear_svm": {}},
        "optimizer": {"pegasos": {"project": True}},
        "batch_size": 1100,
        "stop": {"steps": 300},
    },
    "cocoa": {
        "model": {"linear_svm": {}},
        "optimizer": {"cocoa": {"local_passes": 3}},
        "stop": {"steps": 40},
        "evaluation": {"split": "train", "every_steps": 10},
    },
}


def job_of(name: str) -> dict[str, Any]:
    best = {"metric": "train/primal", "at_most": 1} if name == "cocoa" else None
    return {
        "name": "margins",
        "output": {"best": best} if best else {},
        "data": {"name": "two", "shards": 11},
        "train": {"l2": 1e-3, "checkpoints": {"every_steps": 5}, **TRAIN[name]},
    }


def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(6000, 16))
    noisy = features[:, :4].sum(axis=1) + rng.normal(size=6000)
    return features, np.where(noisy > 0, "yes", "no")


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("gate"), 3, aggregators=2) as ring:
        ring.cluster.data.add("two", *rows(), test=0.2)
        yield ring


@pytest.mark.parametrize("name", TRAIN)
def test_a_worker_and_the_aggregators_die(
    ring: Arena, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path))
    with phalanx.LocalCluster(workers=0) as alone:
        alone.data.add("two", *rows(), test=0.2)
        undisturbed = alone.submit(job_of(name)).wait(timeout_s=GUARD_S)
        expected = alone.models.get(undisturbed.model).predict_decision_values(rows()[0])

    def disturbed() -> Job:
        ring.workers_ready()
        job = ring.cluster.submit(job_of(name))
        kill_in_a_leaf(ring, job, 4)
        kill_the_aggregators(ring, job, 8)
        return job

    result = in_time(disturbed).wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == undisturbed.parameters_sha256
    assert result.metrics == undisturbed.metrics
    model = ring.cluster.models.get(result.model)
    assert model.predict_decision_values(rows()[0]).tobytes() == expected.tobytes()
    assert np.mean(model.predict(rows()[0]) == rows()[1]) > 0.8
