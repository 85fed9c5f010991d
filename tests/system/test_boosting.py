"""Boosted trees on real clusters: the same model for any number of workers."""

from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.testing.arena import GUARD_S

pytestmark = pytest.mark.slow

JOB: dict[str, Any] = {
    "name": "trees",
    "data": {"name": "waves", "shards": 8},
    "train": {"model": {"boosting": {"trees": 5, "depth": 4}}},
}


def fitted(workers: int, shards: int) -> str:
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(4000, 6))
    targets = (np.sin(3 * rows[:, 0]) + rows[:, 1] * rows[:, 2] > 0).astype(np.int64)
    with phalanx.LocalCluster(workers=workers, slots=1) as cluster:
        cluster.data.add("waves", rows, targets, test=0.2)
        job = {**JOB, "data": {"name": "waves", "shards": shards}}
        return cluster.submit(job).wait(timeout_s=GUARD_S).parameters_sha256


@pytest.fixture(scope="module")
def alone() -> str:
    return fitted(0, 8)


@pytest.mark.parametrize(
    ("workers", "shards"),
    [(2, 3), *(pytest.param(workers, 8, marks=pytest.mark.soak) for workers in (1, 3, 4, 8))],
)
def test_any_number_of_workers_and_shards_gives_the_same_model(
    alone: str, workers: int, shards: int
) -> None:
    assert fitted(workers, shards) == alone
