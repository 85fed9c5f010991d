"""Balance of classes: written out in the resolved spec, and refused where it has no meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.v1.dataset_service_pb2 import ClassRows, Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = "name: job\ndata: {name: fashion}\ntrain: {model: {mlp: {hidden: [8]}}, batch_size: 512}"


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> Dataset:
    """600, 300 and 100 rows of three classes, and a fourth that only the test split has."""
    train, test = ClassRows(rows=[600, 300, 100, 0]), ClassRows(rows=[10, 10, 10, 5])
    return make_dataset(
        rows={"train": 1000, "test": 35},
        classes=["cat", "dog", "emu", "yak"],
        class_rows={"train": train, "test": test},
    )


def edited(*settings: str) -> JobSpec:
    return specs.apply_sets(specs.load_yaml(BASE), settings)


def complaints(spec: JobSpec, dataset: Dataset) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(spec, dataset)
    return {each.field: each.message for each in caught.value.violations}


def test_balanced_weights_are_written_out(dataset: Dataset) -> None:
    resolved = specs.prepare(edited("data.class_weights={}"), dataset)
    weights = dict(resolved.data.class_weights.weights)
    assert weights == pytest.approx(
        {"cat": 1000 / 1800, "dog": 1000 / 900, "emu": 10 / 3, "yak": 1}
    )
    assert specs.prepare(resolved, dataset) == resolved


def test_classes_without_a_weight_of_their_own_count_once(dataset: Dataset) -> None:
    resolved = specs.prepare(edited("data.class_weights={weights: {emu: 4}}"), dataset)
    assert dict(resolved.data.class_weights.weights) == {"cat": 1, "dog": 1, "emu": 4, "yak": 1}


def test_an_oversampled_epoch_is_longer(dataset: Dataset) -> None:
    spec = edited("data.oversample={}", "train.batch_size=0", "train.stop={epochs: 2}")
    resolved = specs.prepare(spec, dataset)
    plan = specs.job_plan(resolved, dataset, "job")
    assert plan.train_rows == 3 * 600
    assert resolved.data.shards == 1800 // 256
    assert plan.rows_per_leaf == -(-1800 // 7)
    assert plan.total_steps == 2


@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("{weights: {cow: 2}}", "data.class_weights.weights.cow", "it has: cat, dog, emu, yak"),
        ("{weights: {cat: -1}}", "data.class_weights.weights.cat", "at least 0, not -1"),
        ("{weights: {cat: 0, dog: 0, emu: 0, yak: 0}}", "data.class_weights.weights", "are all 0"),
    ],
)
def test_wrong_weights(dataset: Dataset, setting: str, field: str, says: str) -> None:
    assert says in complaints(edited(f"data.class_weights={setting}"), dataset)[field]


def test_a_weight_that_is_no_number(dataset: Dataset) -> None:
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(edited("data.class_weights={weights: {cat: .nan}}"), dataset)
    assert [each.field for each in caught.value.violations] == ["data.class_weights.weights.cat"]


def test_a_custom_model_weighs_its_own_rows(dataset: Dataset) -> None:
    spec = edited("data.class_weights={}", "train.model={custom: {entrypoint: 'net:Net'}}")
    spec.code.files["net.py"] = "x"
    assert "its own loss" in complaints(spec, dataset)["data.class_weights"]


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("data.class_weights={}", "data.class_weights"),
        ("data.oversample={}", "data.oversample"),
        ("data.rows={stratified: true}", "data.rows.stratified"),
    ],
)
def test_numbers_have_no_classes(make_dataset: MakeDataset, setting: str, field: str) -> None:
    houses: dict[str, Any] = {"task": "regression", "classes": []}
    found = complaints(edited(setting), make_dataset(**houses))
    assert "is a regression data set" in found[field]
