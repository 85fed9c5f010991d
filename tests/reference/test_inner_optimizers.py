"""DiLoCo on digits: Adam inside, which remembers its steps shard by shard, momentum outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.models import DataSchema, Model, build_model
from phalanx.testing.datasets import StoredDataset, store_digits
from phalanx.testing.plans import plan_for
from phalanx.training.leaf import leaf_batch
from phalanx.training.local import train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

pytestmark = pytest.mark.slow

SHARDS, STEPS, COMMITS = 4, 20, 12
RATE, OUTER_RATE, MOMENTUM = 0.003, 0.7, 0.9


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store_digits(tmp_path_factory.mktemp("digits"))


def plan(stored: StoredDataset, **train: Any) -> JobPlan:
    outer = {"sgd": {"learning_rate": OUTER_RATE, "momentum": MOMENTUM, "nesterov": True}}
    document = {
        "model": {"mlp": {"hidden": [64]}, "standardise": False},
        "optimizer": {"adam": {"learning_rate": RATE}},
        "local": {"steps": STEPS, "outer": outer},
        "batch_size": 16 * SHARDS,
        "dtype": "float64",
        "stop": {"steps": COMMITS},
        "evaluation": {"every_steps": COMMITS},
        **train,
    }
    return plan_for(stored, document, data={"name": "data", "shards": SHARDS})


def diloco(stored: StoredDataset, plan: JobPlan, model: Model) -> np.ndarray:
    """The same by a loop: AdamW's paper inside, Sutskever's Nesterov momentum outside."""
    reader = stored.reader("train", np.float64)
    w = model.initial_parameters(0)
    velocity, gradient = np.zeros_like(w), np.empty_like(w)
    memory = [(np.zeros_like(w), np.zeros_like(w)) for _ in range(SHARDS)]
    for commit in range(COMMITS):
        moved, rows = np.zeros_like(w), 0
        for shard, (m, v) in enumerate(memory):
            own, count = w.copy(), 0
            for step in range(commit * STEPS, (commit + 1) * STEPS):
                batch = leaf_batch(reader, plan, shard, step)
                if batch is None:
                    continue
                count_here = model.gradient(own, batch, gradient).count
                mean = gradient / count_here
                m[:] = 0.9 * m + 0.1 * mean
                v[:] = 0.999 * v + 0.001 * mean**2
                corrected = m / (1 - 0.9 ** (step + 1))
                size = np.sqrt(v / (1 - 0.999 ** (step + 1)))
                own = own - RATE * corrected / (size + 1e-8)
                count += count_here
            moved, rows = moved + (w - own) * count, rows + count
        velocity = MOMENTUM * velocity + moved / rows
        w = w - OUTER_RATE * (moved / rows + MOMENTUM * velocity)
    return w


def test_adam_inside_and_momentum_outside_learn_what_a_plain_loop_does(
    stored: StoredDataset,
) -> None:
    job = plan(stored)
    trained = train_in_process(job, stored.manifest, stored.fetch)
    model = build_model(JobSpec.FromString(job.spec), DataSchema(64, 10, "float64"))
    expected = diloco(stored, job, model)
    np.testing.assert_allclose(trained.parameters, expected, rtol=0, atol=1e-6)
    accuracy = trained.metrics["test/accuracy"]
    plain = plan(stored, optimizer={"sgd": {"learning_rate": 0.1}}, local={"steps": STEPS})
    averaged = train_in_process(plain, stored.manifest, stored.fetch).metrics["test/accuracy"]
    print(f"DiLoCo {accuracy:.4f}, SGD and averages {averaged:.4f}")
    assert accuracy >= 0.95
    assert averaged < accuracy
