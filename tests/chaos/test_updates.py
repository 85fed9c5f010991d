"""Algorithms without an elementwise optimizer: the same bits whoever dies in the middle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.sdk.job import Job
from phalanx.testing.arena import GUARD_S, arena, in_time, undisturbed_sha256_of
from phalanx.testing.half_way import kill_in_a_leaf, kill_the_aggregators

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

STEPS = 400
JOB: dict[str, Any] = {
    "name": "clusters",
    "data": {"name": "many", "shards": 11},
    "train": {
        "model": {"k_means": {"clusters": 40}},
        "stop": {"steps": STEPS},
        "checkpoints": {"every_steps": 20},
    },
}


def add_many(cluster: phalanx.Cluster) -> None:
    rng = np.random.default_rng(8)
    centers = rng.normal(size=(40, 16)) * 3
    rows = centers[rng.integers(0, 40, 6000)] + rng.normal(size=(6000, 16))
    cluster.data.add("many", rows, rng.integers(0, 2, 6000), test=0.2)


BOOSTING = {
    **JOB,
    "name": "trees",
    "train": {
        "model": {"boosting": {"trees": 20, "depth": 5, "bins": 32}},
        "checkpoints": {"every_steps": 20},
    },
}


COLUMNS = {
    **JOB,
    "name": "columns",
    "data": {"name": "many", "columns": {}, "shards": 5},
    "train": {
        "model": {"logistic_regression": {}},
        "optimizer": {"adam": {"learning_rate": 0.01}, "clip_norm": 0.05},
        "l2": 1e-3,
        "batch_size": 500,
        "dtype": "float64",
        "stop": {"steps": STEPS},
        "checkpoints": {"every_steps": 20},
    },
}


@pytest.mark.parametrize(
    ("job_of", "workers"),
    [(JOB, 1), (BOOSTING, 3), (COLUMNS, 3)],
    ids=["k-means, alone", "boosting", "columns"],
)
def test_a_worker_and_an_aggregator_die(
    tmp_path: Path, job_of: dict[str, Any], workers: int
) -> None:
    undisturbed = undisturbed_sha256_of(job_of, tmp_path, add_many)
    with arena(tmp_path, workers, aggregators=2) as ring:
        add_many(ring.cluster)

        def disturbed() -> Job:
            ring.workers_ready()
            job = ring.cluster.submit(job_of)
            if workers > 1:
                kill_in_a_leaf(ring, job, 5)
            kill_the_aggregators(ring, job, 25)
            return job

        job = in_time(disturbed)
        result = job.wait(timeout_s=GUARD_S)
        assert ring.cluster.verify(job).equal
    assert result.parameters_sha256 == undisturbed
