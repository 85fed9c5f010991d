"""The columns that a job chooses: one order and one hash, and what is said of a wrong name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phalanx import specs
from phalanx.data.choice import RawColumns
from phalanx.data.manifest import Column
from phalanx.errors import InvalidArgument
from phalanx.specs.starting import known_shapes
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = "name: job\ndata: {name: people}\ntrain: {model: {mlp: {hidden: [8]}}, batch_size: 512}"
PEOPLE = RawColumns(
    4,
    (
        Column("age"),
        Column("job", "categorical", ("baker", "clerk", "smith")),
        Column("hours"),
        Column("Wage per hour"),
    ),
)
PIXELS = RawColumns(784)


def choosing(*names: str) -> JobSpec:
    spec = specs.load_yaml(BASE)
    spec.data.features[:] = names
    return spec


def people(make_dataset: MakeDataset) -> Dataset:
    return make_dataset(name="people", target="income", features=6)


def chosen(make_dataset: MakeDataset, *names: str) -> JobSpec:
    return specs.prepare(choosing(*names), people(make_dataset), PEOPLE)


def complaints(spec: JobSpec, dataset: Dataset, columns: RawColumns) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(spec, dataset, columns)
    assert caught.value.reason == "SPEC_INVALID"
    return {each.field: each.message for each in caught.value.violations}


def test_names_stand_in_the_order_of_the_data_set(make_dataset: MakeDataset) -> None:
    one = chosen(make_dataset, "Wage per hour", "age", "job")
    other = chosen(make_dataset, "job", "Wage per hour", "age")
    assert list(one.data.features) == ["age", "job", "Wage per hour"]
    assert specs.spec_sha256(one) == specs.spec_sha256(other)
    assert specs.prepare(one, people(make_dataset), PEOPLE) == one


def test_numbered_columns_go_by_number_and_not_by_letters(make_dataset: MakeDataset) -> None:
    spec = specs.prepare(choosing("x100", "x9", "x784"), make_dataset(), PIXELS)
    assert list(spec.data.features) == ["x9", "x100", "x784"]


def test_all_of_them_are_none_of_them(make_dataset: MakeDataset) -> None:
    every = chosen(make_dataset, "hours", "job", "age", "Wage per hour")
    without = specs.prepare(specs.load_yaml(BASE), people(make_dataset))
    assert list(every.data.features) == []
    assert specs.spec_sha256(every) == specs.spec_sha256(without)
    assert specs.spec_sha256(without) != specs.spec_sha256(chosen(make_dataset, "hours"))


def test_an_empty_list_is_all_of_them(make_dataset: MakeDataset) -> None:
    spec = specs.load_yaml(BASE.replace("name: people", "name: people, features: []"))
    assert not specs.chooses_columns(spec)
    assert specs.prepare(spec, people(make_dataset)).data.features == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("agee", "has no column 'agee'; did you mean 'age'?"),
        ("AGE", "did you mean 'age'?"),
        ("wage_per_hour", "did you mean 'Wage per hour'?"),
        ("job=clerk", "has no column 'job=clerk'; did you mean 'job'?"),
        ("shoe", "has no column 'shoe'; it has: age, job, hours, Wage per hour (see `phalanx data"),
        ("income", "'income' is the target of people@3, which no model may see"),
        ("x1", "has no column 'x1'; it has: age"),
    ],
)
def test_a_name_that_there_is_not(make_dataset: MakeDataset, name: str, says: str) -> None:
    spec = choosing("hours", name)
    wrong = complaints(spec, people(make_dataset), PEOPLE)
    assert list(wrong) == ["data.features[1]"], "at its place in what was written"
    assert says in wrong["data.features[1]"]


@pytest.mark.parametrize("name", ["x785", "x0", "x01", "x", "X1", "pixel1", "x" + "9" * 30])
def test_columns_without_names_are_numbered(make_dataset: MakeDataset, name: str) -> None:
    wrong = complaints(choosing(name), make_dataset(name="people"), PIXELS)
    says = "its columns have no names and go by their place, x1 to x784"
    assert says in wrong["data.features[0]"]


def test_what_is_wrong_with_names_alone_needs_no_data_set() -> None:
    with pytest.raises(InvalidArgument) as caught:
        specs.check_spec(choosing("age", "hours", "age", ""))
    wrong = {each.field: each.message for each in caught.value.violations}
    assert wrong["data.features[2]"] == "'age' is given twice"
    assert "is empty" in wrong["data.features[3]"]


def test_all_that_is_wrong_is_told_at_once(make_dataset: MakeDataset) -> None:
    spec = choosing("agee", "age", "age", "oven")
    spec.train.batch_size = -1
    wrong = complaints(spec, people(make_dataset), PEOPLE)
    assert set(wrong) == {
        "train.batch_size",
        "data.features[0]",
        "data.features[2]",
        "data.features[3]",
    }


def test_of_very_many_wrong_names_some_are_told(make_dataset: MakeDataset) -> None:
    wrong = complaints(choosing(*(f"no{n}" for n in range(50))), people(make_dataset), PEOPLE)
    assert wrong.pop("data.features") == "30 more names are not known"
    assert len(wrong) == 20


def test_columns_without_a_feature_are_refused(make_dataset: MakeDataset) -> None:
    bare = RawColumns(2, (Column("empty", "categorical"), Column("age")))
    wrong = complaints(choosing("empty"), people(make_dataset), bare)
    assert "leaves nothing to learn from" in wrong["data.features"]


def test_the_plan_counts_the_features_that_were_chosen(make_dataset: MakeDataset) -> None:
    dataset = people(make_dataset)
    spec = chosen(make_dataset, "job", "hours")
    seen = specs.as_chosen(dataset, spec.data, PEOPLE)
    assert (seen.features, dataset.features) == (4, 6)
    assert known_shapes(spec, seen)["layers.0.weights"] == (4, 8)
    assert specs.plan(spec, seen).worker_bytes < specs.plan(spec, dataset).worker_bytes
    assert seen.manifest_digest == dataset.manifest_digest
    whole = specs.prepare(specs.load_yaml(BASE), dataset)
    assert specs.as_chosen(dataset, whole.data, None) is dataset


def test_a_job_goes_on_from_one_with_the_same_columns_only(make_dataset: MakeDataset) -> None:
    one = chosen(make_dataset, "age", "job")
    specs.check_same(chosen(make_dataset, "job", "age"), one, "job-1")
    with pytest.raises(InvalidArgument, match=r"data\.features is not as in job-1"):
        specs.check_same(chosen(make_dataset, "age", "hours"), one, "job-1")
