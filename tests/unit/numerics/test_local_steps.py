"""The shards' own steps between two commits, and what the outer optimizer makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.models import DataSchema, build_model
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_local_optimizer
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.expected import expected_examples
from phalanx.training.leaf import LocalSteps, leaf_batch
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

SHARDS = 4
RATE = 0.2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(560, 6, 3)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2, chunk_bytes=4096)


def plan(dataset: StoredDataset, shards: int = SHARDS, **train: Any) -> JobPlan:
    document = {
        "model": {"softmax_regression": {}},
        "optimizer": {"sgd": {"learning_rate": RATE}},
        "batch_size": 16 * shards,
        "stop": {"steps": 9},
        "l2": 0.01,
        "dtype": "float64",
        **train,
    }
    return plan_for(dataset, document, data={"name": "data", "shards": shards}, seed=3)


def run(dataset: StoredDataset, plan: JobPlan) -> TrainedModel:
    return train_in_process(plan, dataset.manifest, dataset.fetch)


@pytest.mark.parametrize("schedule", [{}, {"inverse_time": {"decay": 0.1}}, {"cosine": {}}])
def test_one_local_step_is_a_synchronous_step(
    dataset: StoredDataset, schedule: dict[str, Any]
) -> None:
    optimizer = {"sgd": {"learning_rate": RATE}, "schedule": schedule}
    synchronous = run(dataset, plan(dataset, optimizer=optimizer))
    local = run(dataset, plan(dataset, optimizer=optimizer, local={"steps": 1}))
    np.testing.assert_allclose(local.parameters, synchronous.parameters, rtol=0, atol=1e-12)
    assert local.examples == synchronous.examples
    assert local.metrics["train/loss"] == pytest.approx(
        synchronous.metrics["train/loss"], abs=1e-12
    )


def averaged(dataset: StoredDataset, plan: JobPlan) -> Any:
    """Shards train by themselves and their parameters are averaged: written out."""
    spec = JobSpec.FromString(plan.spec)
    model = build_model(spec, DataSchema(6, 3, "float64"))
    reader = dataset.reader("train", np.float64)
    optimizer = build_local_optimizer(spec.train, plan.total_steps * plan.local_steps)
    decay = decay_mask(model.layout)
    w = model.initial_parameters(spec.seed)
    for version in range(plan.total_steps):
        ends = []
        for shard in range(plan.shards):
            own = w.copy()
            for step in range(version * plan.local_steps, (version + 1) * plan.local_steps):
                batch = leaf_batch(reader, plan, shard, step)
                assert batch is not None
                gradient, after = np.empty_like(own), np.empty_like(own)
                count = model.gradient(own, batch, gradient).count
                optimizer.apply(own, gradient, count, decay, {}, step, after)
                own = after
            ends.append(own)
        w = np.mean(ends, axis=0)
    return w


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_an_outer_rate_of_one_without_momentum_averages(dataset: StoredDataset, steps: int) -> None:
    """448 rows on 4 shards: 7 steps of 16 rows, all of equal size."""
    job = plan(dataset, local={"steps": steps}, stop={"steps": 6})
    np.testing.assert_allclose(
        run(dataset, job).parameters, averaged(dataset, job), rtol=0, atol=1e-12
    )


def test_the_outer_optimizer_has_momentum_of_its_own(dataset: StoredDataset) -> None:
    local = {
        "steps": 3,
        "outer": {"sgd": {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}},
    }
    nesterov = run(dataset, plan(dataset, local=local))
    plain = run(dataset, plan(dataset, local={"steps": 3}))
    assert np.abs(nesterov.parameters - plain.parameters).max() > 1e-2
    assert nesterov.metrics["train/loss"] < plain.metrics["train/loss"]


def test_every_row_counts_once_in_an_epoch(dataset: StoredDataset) -> None:
    """Shards of 149 or 150 rows, 10 own steps of 16 rows, the last one short: 5 commits."""
    job = plan(dataset, shards=3, local={"steps": 2}, stop={"epochs": 2})
    assert (job.steps_per_epoch, job.total_steps) == (10, 10)
    trained = run(dataset, job)
    assert trained.examples == 2 * 448
    expected = [expected_examples(job, version) for version in range(10)]
    assert sum(expected) == 2 * 448
    assert expected[4] < expected[3]


def test_a_shard_without_rows_in_its_steps_is_absent(dataset: StoredDataset) -> None:
    job = plan(dataset, local={"steps": 2})
    model = build_model(JobSpec.FromString(job.spec), DataSchema(6, 3, "float64"))
    w = model.initial_parameters(0)
    outcome = LocalSteps(job, model.layout).run(model, w, 0, lambda _: None, np.full_like(w, 7), {})
    assert (outcome.count, outcome.loss_sum, outcome.finite) == (0, 0.0, True)


def test_steps_that_diverge_make_a_leaf_that_is_not_finite(dataset: StoredDataset) -> None:
    job = plan(dataset, local={"steps": 60}, optimizer={"sgd": {"learning_rate": 1e308}})
    spec = JobSpec.FromString(job.spec)
    model = build_model(spec, DataSchema(6, 3, "float64"))
    reader = dataset.reader("train", np.float64)
    w = model.initial_parameters(0)
    before = w.copy()
    out = np.empty_like(w)
    outcome = LocalSteps(job, model.layout).run(
        model, w, 0, lambda step: leaf_batch(reader, job, 0, step), out, {}
    )
    assert not outcome.finite
    assert (w == before).all(), "parameters are only read"


def test_the_norms_of_own_steps_and_of_the_difference_are_limited(dataset: StoredDataset) -> None:
    """With one step a shard's mean gradient is the difference divided by the rate."""
    inner = {"sgd": {"learning_rate": RATE}, "clip_norm": 0.05}
    outer = {"clip_norm": 0.02}
    free = plan(dataset, shards=1, l2=0, stop={"steps": 1}, local={"steps": 1})
    start = build_model(JobSpec.FromString(free.spec), DataSchema(6, 3, "float64"))
    w = start.initial_parameters(3)
    moved = run(dataset, free).parameters - w
    assert np.linalg.norm(moved) > RATE * 0.05
    for optimizer, local, norm in (
        (inner, {"steps": 1}, RATE * 0.05),
        (inner, {"steps": 1, "outer": {"clip_norm": 0.005}}, 0.005),
        ({"sgd": {"learning_rate": RATE}}, {"steps": 1, "outer": outer}, 0.02),
    ):
        job = plan(dataset, shards=1, l2=0, stop={"steps": 1}, optimizer=optimizer, local=local)
        shortened = run(dataset, job).parameters - w
        assert np.linalg.norm(shortened) == pytest.approx(norm, rel=1e-9)
        np.testing.assert_allclose(
            shortened / norm, moved / np.linalg.norm(moved), rtol=0, atol=1e-9
        )


def test_a_limit_for_the_synchronous_gradient(dataset: StoredDataset) -> None:
    free = plan(dataset, l2=0, stop={"steps": 1})
    optimizer = {"sgd": {"learning_rate": RATE}, "clip_norm": 0.05}
    limited = plan(dataset, l2=0, stop={"steps": 1}, optimizer=optimizer)
    model = build_model(JobSpec.FromString(free.spec), DataSchema(6, 3, "float64"))
    w = model.initial_parameters(3)
    moved, shortened = run(dataset, free).parameters - w, run(dataset, limited).parameters - w
    assert np.linalg.norm(moved) > RATE * 0.05
    assert np.linalg.norm(shortened) == pytest.approx(RATE * 0.05, rel=1e-9)
