"""Private training of real data: what the noise costs, and what it hides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_svmlight_file

from phalanx.privacy.accountant import Accountant
from phalanx.testing.datasets import StoredDataset, shared_data, store
from phalanx.testing.plans import plan_for
from phalanx.training.local import TrainedModel, train_in_process

pytestmark = pytest.mark.slow

BATCH, STEPS, DELTA = 256, 1270, 1e-5


def read(name: str) -> tuple[Any, Any]:
    rows, labels = load_svmlight_file(str(shared_data("a9a") / name), n_features=123)
    return scipy.sparse.csr_array(rows), (labels > 0).astype(np.int64)


@pytest.fixture(scope="module")
def a9a(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store(tmp_path_factory.mktemp("a9a"), *read("a9a"))


def train(stored: StoredDataset, sigma: float, shards: int = 1) -> TrainedModel:
    plan = plan_for(
        stored,
        {
            "model": {"logistic_regression": {}},
            "optimizer": {"sgd": {"learning_rate": 1.0}},
            "batch_size": BATCH,
            "stop": {"steps": STEPS},
            "privacy": {"clip_norm": 1, "noise_multiplier": sigma, "delta": DELTA},
        },
        data={"name": "data", "shards": shards},
    )
    return train_in_process(plan, stored.manifest, stored.fetch, secret=bytes(range(32)))


@pytest.mark.parametrize(
    ("sigma", "shards", "least"),
    [(1.0, 1, 0.84), pytest.param(2.0, 4, 0.84, marks=pytest.mark.soak)],
)
def test_a9a_is_told_apart_under_noise(
    a9a: StoredDataset, tmp_path: Path, sigma: float, shards: int, least: float
) -> None:
    trained = train(a9a, sigma, shards)
    features, targets = read("a9a.t")
    weights, bias = trained.parameters[:-1], trained.parameters[-1]
    accuracy = float(((features @ weights + bias > 0) == targets).mean())
    assert accuracy >= least
    rows = a9a.manifest.rows_by_split()["train"]
    spent = Accountant(BATCH / rows, sigma, DELTA).epsilon(STEPS)
    assert trained.metrics["train/epsilon"] == spent
    assert spent < (2.3 if sigma == 1.0 else 0.8)
    print(sigma, shards, accuracy, spent)
