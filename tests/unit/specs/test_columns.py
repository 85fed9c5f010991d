"""Groups of columns: how they are written, and what is said of those that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx import specs
from phalanx.data.choice import RawColumns
from phalanx.data.manifest import Column
from phalanx.errors import InvalidArgument
from phalanx.specs.columns import positions_of_shards
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = """
name: job
data: {name: people}
train: {model: {logistic_regression: {}}, batch_size: 512}
"""
PEOPLE = RawColumns(
    5,
    (
        Column("age"),
        Column("job", "categorical", ("baker", "clerk", "smith")),
        Column("hours"),
        Column("wage, per hour"),
        Column("none", "categorical", ()),
    ),
)
PIXELS = RawColumns(784)


def job(*edits: str, groups: tuple[str, ...] = (), shards: int | None = None) -> JobSpec:
    spec = specs.load_yaml(BASE)
    spec.data.columns.groups[:] = groups
    spec.data.columns.SetInParent()
    if shards is not None:
        spec.data.shards = shards
    return specs.apply_sets(spec, edits)


def people(make_dataset: MakeDataset, **changes: Any) -> Dataset:
    known = {"name": "people", "target": "income", "features": 6, "classes": ["no", "yes"]}
    return make_dataset(**{**known, **changes})


def prepared(make_dataset: MakeDataset, spec: JobSpec, columns: RawColumns = PEOPLE) -> JobSpec:
    return specs.prepare(spec, people(make_dataset, features=columns.count + 1), columns)


def complaints(
    make_dataset: MakeDataset, spec: JobSpec, columns: RawColumns = PEOPLE
) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        prepared(make_dataset, spec, columns)
    return {each.field: each.message for each in caught.value.violations}


def test_a_group_is_written_in_the_order_of_the_data_set(make_dataset: MakeDataset) -> None:
    one = job(groups=("hours, job", "wage, per hour,none,age"))
    other = job(groups=("job,hours", "age,wage, per hour,none"))
    resolved = prepared(make_dataset, one)
    assert list(resolved.data.columns.groups) == ["job,hours", "age,wage, per hour,none"]
    assert resolved.data.shards == 2
    assert resolved == prepared(make_dataset, other)
    assert specs.prepare(resolved, people(make_dataset), PEOPLE) == resolved
    assert positions_of_shards(resolved.data, PEOPLE) == [[1, 2], [0, 3, 4]]


def test_ranges_of_columns_without_names(make_dataset: MakeDataset) -> None:
    spec = job(groups=("x784,x3-x7,x8", "x1,x2,x9-x783"))
    resolved = prepared(make_dataset, spec, PIXELS)
    assert list(resolved.data.columns.groups) == ["x3-x8,x784", "x1-x2,x9-x783"]
    assert positions_of_shards(resolved.data, PIXELS)[0] == [2, 3, 4, 5, 6, 7, 783]


def test_without_groups_the_columns_are_divided_evenly(make_dataset: MakeDataset) -> None:
    resolved = prepared(make_dataset, job(shards=2))
    assert list(resolved.data.columns.groups) == []
    assert positions_of_shards(resolved.data, PEOPLE) == [[0, 1], [2, 3, 4]]
    fewer = job(shards=3)
    fewer.data.features[:] = ["hours", "age", "job"]
    assert positions_of_shards(prepared(make_dataset, fewer).data, PEOPLE) == [[0], [1], [2]]


def test_every_shard_of_an_even_division_has_something_to_learn_from(
    make_dataset: MakeDataset,
) -> None:
    said = complaints(make_dataset, job(shards=5))
    assert "leave one of them 'none' alone" in said["data.shards"]
    assert prepared(make_dataset, job(shards=4)).data.shards == 4


def test_the_rows_of_a_step_are_those_of_one_shard(make_dataset: MakeDataset) -> None:
    dataset = people(make_dataset)
    spec = specs.prepare(job("train.batch_size=1000", shards=4), dataset, PEOPLE)
    plan = specs.job_plan(spec, dataset, "job-1")
    assert plan.by_columns
    assert (plan.shards, plan.rows_per_leaf, plan.steps_per_epoch, plan.total_steps) == (
        4,
        1000,
        10,
        100,
    )
    shown = specs.plan(spec, dataset)
    assert shown.steps == 100
    assert not shown.warnings
    rows = specs.load_yaml(BASE)
    rows.train.batch_size, rows.data.shards = 1000, 1
    whole = specs.plan(specs.prepare(rows, dataset), dataset)
    # The scores of a step are a part of the vector.
    assert shown.worker_bytes > whole.worker_bytes


@pytest.mark.parametrize(
    ("groups", "path", "said"),
    [
        (("age,jobb", "hours"), "[0]", "has no column 'jobb'; did you mean 'job'?"),
        (("age", "income"), "[1]", "'income' is the target"),
        (("age,,job",), "[0]", "names no column somewhere"),
        (("",), "[0]", "names no column somewhere"),
        (("age,job", "hours,age"), "[1]", "'age' is in data.columns.groups[0] already"),
        (("age,age,job",), "[0]", "'age' is in data.columns.groups[0] already"),
        (("age", "job,none"), "", "name 'hours', 'wage, per hour' in no group"),
        (("age,job,hours,wage, per hour", "none"), "[1]", "leaves nothing to learn from"),
    ],
)
def test_what_cannot_be_a_group(
    make_dataset: MakeDataset, groups: tuple[str, ...], path: str, said: str
) -> None:
    found = complaints(make_dataset, job(groups=groups))
    assert said in found[f"data.columns.groups{path}"]


def test_ranges_that_there_are_not(make_dataset: MakeDataset) -> None:
    for text in ("x1-x785", "x9-x3", "x0-x4"):
        found = complaints(make_dataset, job(groups=(text, "x1-x784")), PIXELS)
        assert f"has no column {text!r}" in found["data.columns.groups[0]"]
        assert "x1 to x784" in found["data.columns.groups[0]"]
    found = complaints(make_dataset, job(groups=("age-hours", "none")))
    assert "has no column 'age-hours'" in found["data.columns.groups[0]"]


def test_groups_are_of_the_columns_that_the_job_chooses(make_dataset: MakeDataset) -> None:
    spec = job(groups=("age", "hours"))
    spec.data.features[:] = ["age", "job"]
    found = complaints(make_dataset, spec)
    assert found["data.columns.groups[1]"] == "'hours' is none of data.features"
    assert "name 'job' in no group" in found["data.columns.groups"]
    spec.data.features[:] = ["age", "jobb"]
    assert list(complaints(make_dataset, spec)) == ["data.features[1]"]


def test_as_many_shards_as_groups(make_dataset: MakeDataset) -> None:
    everything = ("age", "job,hours,wage, per hour,none")
    assert prepared(make_dataset, job(groups=everything, shards=2)).data.shards == 2
    found = complaints(make_dataset, job(groups=everything, shards=3))
    assert found["data.shards"] == "3 is not the number of data.columns.groups, 2; leave it out"
    found = complaints(make_dataset, job(shards=6))
    assert found["data.shards"] == "6 shards: more than the 5 columns of people@3"
    assert "needs the groups, or data.shards" in complaints(make_dataset, job())["data.columns"]


@pytest.mark.parametrize(
    ("edit", "path", "said"),
    [
        ("train.model={mlp: {hidden: [4]}}", "data.columns", "use rows for mlp"),
        ("train.model={softmax_regression: {}}", "data.columns", "use rows for softmax"),
        ("train.model={linear_svm: {}}", "data.columns", "use rows for linear_svm"),
        ("train.optimizer={closed_form: {}}", "train.optimizer.closed_form", "use sgd"),
        ("train.asynchronous={}", "train.asynchronous", "use synchronous"),
        ("train.local={steps: 3}", "train.local", "use synchronous"),
        ("train.all_reduce={}", "train.all_reduce", "use parameter_server"),
        ("train.reduction={median: {}}", "train.reduction.median", "as they are"),
        ("train.reduction={clip_norm: 1}", "train.reduction.clip_norm", "as they are"),
        ("train.compression={sign: {}}", "train.compression.sign", "as they are"),
        ("train.on_nonfinite={skip: {}}", "train.on_nonfinite.skip", "use fail"),
        (
            "train.privacy={clip_norm: 1, noise_multiplier: 1, delta: 1e-5}",
            "data.columns",
            "none of which knows its norm; use rows",
        ),
    ],
)
def test_what_does_not_go_together_is_said(
    make_dataset: MakeDataset, edit: str, path: str, said: str
) -> None:
    assert said in complaints(make_dataset, job(edit, shards=2))[path]


@pytest.mark.parametrize(
    "edit",
    [
        "train.optimizer={adam: {}, clip_norm: 1}",
        "train.verification={replicas: 3}",
        "train.start={model: other}",
        "data.class_weights={}",
        "data.oversample={}",
        "output.best={metric: test/accuracy}",
    ],
)
def test_what_goes_together(make_dataset: MakeDataset, edit: str) -> None:
    dataset = people(make_dataset)
    dataset.class_rows["train"].rows[:] = [9000, 1000]
    assert specs.prepare(job(edit, shards=2), dataset, PEOPLE).data.shards == 2


def test_other_programs_read_whole_rows() -> None:
    spec = specs.load_yaml("name: job\ndata: {name: people, columns: {}}\nforest: {trees: 2}")
    with pytest.raises(InvalidArgument, match=r"data\.columns: is for train"):
        specs.check_spec(spec)
