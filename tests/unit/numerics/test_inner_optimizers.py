"""Optimizers of shards that remember their steps, against formulas written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phalanx.models import DataSchema, build_model
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.leaf import LocalSteps, leaf_batch
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

Array = NDArray[np.float64]
Update = Callable[[Array, Array, dict[str, Array], int], Array]

SHARDS = 4
RATE, L2, DECAY = 0.1, 0.01, 0.02


def momentum(w: Array, g: Array, state: dict[str, Array], step: int) -> Array:
    v = state["v"] = 0.9 * state.get("v", 0) + g
    return w - RATE * v


def nesterov(w: Array, g: Array, state: dict[str, Array], step: int) -> Array:
    v = state["v"] = 0.9 * state.get("v", 0) + g
    return w - RATE * (g + 0.9 * v)


def adagrad(w: Array, g: Array, state: dict[str, Array], step: int) -> Array:
    s = state["s"] = state.get("s", 0) + g**2
    return w - RATE * g / (np.sqrt(s) + 1e-8)


def adam(w: Array, g: Array, state: dict[str, Array], step: int) -> Array:
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
    return w - RATE * m_hat / (np.sqrt(v_hat) + 1e-8)


def adamw(w: Array, g: Array, state: dict[str, Array], step: int) -> Array:
    """The first 18 parameters are weights, the rest biases, which do not decay."""
    decay = np.arange(len(w)) < 18
    return adam(w, g, state, step) - RATE * DECAY * w * decay


RULES: dict[str, tuple[dict[str, Any], Update]] = {
    "momentum": ({"sgd": {"learning_rate": RATE, "momentum": 0.9}}, momentum),
    "nesterov": ({"sgd": {"learning_rate": RATE, "momentum": 0.9, "nesterov": True}}, nesterov),
    "adagrad": ({"adagrad": {"learning_rate": RATE, "epsilon": 1e-8}}, adagrad),
    "adam": ({"adam": {"learning_rate": RATE, "epsilon": 1e-8}}, adam),
    "adamw": ({"adamw": {"learning_rate": RATE, "epsilon": 1e-8, "weight_decay": DECAY}}, adamw),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(560, 6, 3)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2, chunk_bytes=4096)


def plan(dataset: StoredDataset, steps: int, optimizer: dict[str, Any], **train: Any) -> JobPlan:
    document = {
        "model": {"softmax_regression": {}, "standardise": False},
        "optimizer": optimizer,
        "local": {"steps": steps},
        "batch_size": 16 * SHARDS,
        "stop": {"steps": 12},
        "l2": L2,
        "dtype": "float64",
        **train,
    }
    return plan_for(dataset, document, data={"name": "data", "shards": SHARDS}, seed=3)


def run(dataset: StoredDataset, plan: JobPlan) -> TrainedModel:
    return train_in_process(plan, dataset.manifest, dataset.fetch)


def gradient(w: Array, features: Array, targets: NDArray[np.int64]) -> Array:
    """The mean gradient of a softmax regression with L2 on its weights."""
    weights = w[:18].reshape(6, 3)
    scores = features @ weights + w[18:]
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(targets)), targets] -= 1
    flat = np.concatenate([(features.T @ p).ravel(), p.sum(axis=0)]) / len(targets)
    flat[:18] += L2 * w[:18]
    return flat


def by_hand(dataset: StoredDataset, plan: JobPlan, update: Update) -> Array:
    """Each shard steps by itself, with a memory of its own; the weighted mean goes on."""
    spec = JobSpec.FromString(plan.spec)
    reader = dataset.reader("train", np.float64)
    model = build_model(spec, DataSchema(6, 3, "float64"))
    assert [tuple(each.shape) for each in model.layout.tensors] == [(6, 3), (3,)]
    w = model.initial_parameters(spec.seed)
    memories: list[dict[str, Array]] = [{} for _ in range(SHARDS)]
    for version in range(plan.total_steps):
        ends, counts = [], []
        for shard, memory in enumerate(memories):
            own, rows = w, 0
            for step in range(version * plan.local_steps, (version + 1) * plan.local_steps):
                batch = leaf_batch(reader, plan, shard, step)
                assert batch is not None
                g = gradient(own, batch.features, batch.targets)
                own, rows = update(own, g, memory, step), rows + batch.rows
            ends.append(own)
            counts.append(rows)
        w = np.average(ends, axis=0, weights=counts)
    return w


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("rule", RULES)
def test_every_shard_has_a_memory_of_its_own(dataset: StoredDataset, rule: str, steps: int) -> None:
    optimizer, update = RULES[rule]
    job = plan(dataset, steps, optimizer)
    expected = by_hand(dataset, job, update)
    np.testing.assert_allclose(run(dataset, job).parameters, expected, rtol=0, atol=1e-12)


def synchronous(job: JobPlan) -> JobPlan:
    """The same job with one memory, of the root, for all shards."""
    spec = JobSpec.FromString(job.spec)
    spec.train.synchronous.SetInParent()
    made = JobPlan.FromString(job.SerializeToString())
    made.spec, made.local_steps, made.unit_span = spec.SerializeToString(), 0, 0
    return made


def test_one_memory_for_all_shards_is_the_same_only_where_it_is_linear(
    dataset: StoredDataset,
) -> None:
    """Shards of equal size: the mean of their velocities is the velocity of the mean."""
    for rule, same in (("momentum", True), ("nesterov", True), ("adam", False)):
        job = plan(dataset, 1, RULES[rule][0])
        apart = run(dataset, job).parameters - run(dataset, synchronous(job)).parameters
        assert (np.abs(apart).max() < 1e-12) == same, rule


def test_what_a_shard_remembers_stays_as_it_is_in_steps_without_rows(
    dataset: StoredDataset,
) -> None:
    job = plan(dataset, 2, RULES["adam"][0])
    model = build_model(JobSpec.FromString(job.spec), DataSchema(6, 3, "float64"))
    w = model.initial_parameters(0)
    state = {"m": np.full_like(w, 2), "v": np.full_like(w, 3)}
    outcome = LocalSteps(job, model.layout).run(
        model, w, 0, lambda _: None, np.full_like(w, 7), state
    )
    assert outcome.count == 0
    assert (state["m"] == 2).all()
    assert (state["v"] == 3).all()
