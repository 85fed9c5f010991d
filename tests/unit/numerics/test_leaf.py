"""Leaves: which rows they take, what they do to them, and how they say that something is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.data.statistics import manifest_mean_and_scale
from phalanx.models import Batch, DataSchema, LeafSums, Model, build_model
from phalanx.reduction import all_finite
from phalanx.testing.datasets import StoredDataset, classification, sparse_classification, store
from phalanx.training.leaf import (
    leaf_batch,
    leaf_chunks,
    run_evaluation_leaf,
    run_leaf,
)
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

ROWS, FEATURES, CLASSES = 300, 8, 3


@pytest.fixture
def dataset(tmp_path: Path) -> StoredDataset:
    features, targets = classification(ROWS, FEATURES, CLASSES)
    return store(tmp_path, features * 3 + 1, targets, test=0.2, chunk_bytes=2048)


def make_plan(standardise: bool = True, **fields: Any) -> JobPlan:
    spec = JobSpec(
        seed=4, train={"model": {"softmax_regression": {"bias": True}, "standardise": standardise}}
    )
    spec.data.split, spec.train.evaluation.split = "train", "test"
    known = {
        "shards": 4,
        "train_rows": 240,
        "rows_per_leaf": 20,
        "steps_per_epoch": 3,
        "evaluation_shards": 2,
        "evaluation_rows": 60,
    }
    return JobPlan(spec=spec.SerializeToString(), **{**known, **fields})


def make_model(dtype: str = "float64") -> Model:
    spec = JobSpec(train={"model": {"softmax_regression": {"bias": True}}})
    return build_model(spec, DataSchema(FEATURES, CLASSES, dtype))


class Recorder:
    """A reader that remembers what was asked for."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.manifest, self.dtype = reader.manifest, reader.dtype
        self.chunk_rows = reader.chunk_rows
        self.batches: list[Batch] = []

    def rows(self, selections: Sequence[Any]) -> Batch:
        batch: Batch = self._reader.rows(selections)
        self.batches.append(Batch(batch.features.copy(), batch.targets.copy()))
        return batch


def test_a_leaf_has_a_key_of_its_own(dataset: StoredDataset) -> None:
    reader, plan = dataset.reader("train", np.float64), make_plan()
    keys = []
    for step in range(4):
        for shard in range(4):
            batch = leaf_batch(reader, plan, shard, step)
            assert batch is not None
            assert batch.key == (4, shard, step)
            keys.append(batch.key)
    assert len(set(keys)) == 16


def test_a_leaf_is_the_model_on_its_standardised_rows(dataset: StoredDataset) -> None:
    model, plan = make_model(), make_plan()
    reader = Recorder(dataset.reader("train", np.float64))
    w = np.linspace(-1, 1, model.layout.element_count)
    out, expected = np.empty_like(w), np.empty_like(w)
    outcome = run_leaf(model, w, reader, plan, 2, 1, out)
    raw = reader.batches[0]
    scales = manifest_mean_and_scale(dataset.manifest, np.float64)
    assert scales is not None
    prepared = (raw.features - scales[0]) * scales[1]
    sums = model.gradient(w, Batch(prepared, raw.targets), expected)
    assert out.tobytes() == expected.tobytes()
    assert (outcome.count, outcome.loss_sum, outcome.finite) == (20, sums.loss_sum, True)


def test_the_statistics_are_those_of_the_train_split_also_in_evaluation(
    dataset: StoredDataset,
) -> None:
    model, plan = make_model(), make_plan()
    reader = Recorder(dataset.reader("test", np.float64))
    w = np.linspace(-1, 1, model.layout.element_count)
    sums = np.zeros(2)
    outcome = run_evaluation_leaf(model, w, reader, plan, 1, sums)
    raw = reader.batches[0]
    scales = manifest_mean_and_scale(dataset.manifest, np.float64)
    assert scales is not None
    prepared = (raw.features - scales[0]) * scales[1]
    assert sums.tolist() == model.evaluate(w, Batch(prepared, raw.targets)).tolist()
    assert outcome.count == 30


def test_evaluation_shards_make_up_the_split(dataset: StoredDataset) -> None:
    model, plan = make_model(), make_plan(evaluation_shards=7)
    reader = dataset.reader("test", np.float64)
    w = np.linspace(-1, 1, model.layout.element_count)
    total, count = np.zeros(2), 0
    for shard in range(7):
        sums = np.zeros(2)
        count += run_evaluation_leaf(model, w, reader, plan, shard, sums).count
        total += sums
    whole = np.zeros(2)
    run_evaluation_leaf(model, w, reader, make_plan(evaluation_shards=1), 0, whole)
    assert count == 60
    np.testing.assert_allclose(total, whole, rtol=1e-12)


def test_an_exhausted_shard_gives_an_empty_leaf(dataset: StoredDataset) -> None:
    model, plan = make_model(), make_plan(steps_per_epoch=5)
    w = np.zeros(model.layout.element_count)
    out = np.full_like(w, 7.0)
    outcome = run_leaf(model, w, dataset.reader("train", np.float64), plan, 0, 4, out)
    assert (outcome.count, outcome.finite) == (0, True)
    assert (out == 7).all()


def test_steps_walk_through_epochs(dataset: StoredDataset) -> None:
    model, plan = make_model(), make_plan()
    reader = Recorder(dataset.reader("train", np.float64))
    w = np.zeros(model.layout.element_count)
    for step in range(6):
        run_leaf(model, w, reader, plan, 0, step, np.empty_like(w))
    epochs = [
        np.sort(np.concatenate([batch.features[:, 0] for batch in reader.batches[first:stop]]))
        for first, stop in ((0, 3), (3, 6))
    ]
    assert epochs[0].tolist() == epochs[1].tolist()
    assert reader.batches[0].features.tolist() != reader.batches[3].features.tolist()


def test_chunks_for_prefetching(dataset: StoredDataset) -> None:
    plan = make_plan()
    reader = dataset.reader("train")
    assert len(reader.chunks) > 4
    for shard in range(4):
        chunks = leaf_chunks(plan, reader, shard, 2)
        assert chunks
        assert set(chunks) < set(range(len(reader.chunks)))


def test_sparse_rows(tmp_path: Path) -> None:
    features, targets = sparse_classification(200, 30)
    dataset = store(tmp_path, features, targets)
    spec = JobSpec(train={"model": {"logistic_regression": {"bias": True}}})
    model = build_model(spec, DataSchema(30, 2, "float32"))
    plan = make_plan(standardise=False, train_rows=200, shards=2)
    w = np.ones(31, np.float32)
    out = np.empty_like(w)
    outcome = run_leaf(model, w, dataset.reader(), plan, 1, 0, out)
    assert outcome.count == 20
    assert out.any()


class Broken:
    """A model that returns what it was told to."""

    layout = make_model().layout
    evaluation_sums = ("loss",)

    def __init__(self, gradient: float, loss: float) -> None:
        self._gradient, self._loss = gradient, loss

    def initial_parameters(self, seed: int) -> Any:
        return np.zeros(self.layout.element_count)

    def gradient(self, parameters: Any, batch: Batch, out: Any) -> LeafSums:
        out[:] = 1.0
        out[-1] = self._gradient
        np.exp(np.array([1e9]))  # an overflow inside a leaf is no warning
        return LeafSums(batch.rows, self._loss)

    def evaluate(self, parameters: Any, batch: Batch) -> Any:
        return np.array([self._loss])

    def predict(self, parameters: Any, features: Any) -> Any:
        return np.zeros(len(features))


@pytest.mark.parametrize(
    ("gradient", "loss", "finite"),
    [
        (1.0, 1.0, True),
        (1e300, 1.0, True),
        (np.nan, 1.0, False),
        (np.inf, 1.0, False),
        (1.0, np.nan, False),
        (1.0, -np.inf, False),
    ],
)
def test_leaves_that_are_not_finite_are_marked(
    dataset: StoredDataset, gradient: float, loss: float, finite: bool
) -> None:
    w = np.zeros(Broken.layout.element_count)
    reader = dataset.reader("train", np.float64)
    outcome = run_leaf(Broken(gradient, loss), w, reader, make_plan(), 0, 0, np.empty_like(w))
    assert outcome.finite is finite


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_finite(dtype: str) -> None:
    values = np.full(70_000, np.finfo(dtype).max, dtype)
    assert all_finite(values)
    assert all_finite(np.zeros(0, dtype))
    for bad in (np.nan, np.inf, -np.inf):
        values[69_999] = bad
        assert not all_finite(values)


@pytest.mark.parametrize("offset", [1, 3, 7])
def test_the_bits_do_not_depend_on_where_vectors_lie_in_memory(
    dataset: StoredDataset, offset: int
) -> None:
    spec = JobSpec(train={"model": {"mlp": {"hidden": [33]}}})
    model = build_model(spec, DataSchema(FEATURES, CLASSES, "float32"))
    count = model.layout.element_count
    plan = make_plan()
    w, out = model.initial_parameters(1), np.empty(count, np.float32)
    moved_w, moved_out = (np.zeros(count + 8, np.float32)[offset : offset + count] for _ in "ab")
    moved_w[:] = w
    one = run_leaf(model, w, dataset.reader(), plan, 1, 0, out)
    two = run_leaf(model, moved_w, dataset.reader(), plan, 1, 0, moved_out)
    assert one == two
    assert out.tobytes() == moved_out.tobytes()
