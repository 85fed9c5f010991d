"""Defaults, plans and hashes of specs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]


def job(**train: Any) -> JobSpec:
    spec = JobSpec(name="job")
    spec.data.name = "fashion"
    spec.train.model.mlp.hidden.append(128)
    for name, value in train.items():
        setattr(spec.train, name, value)
    return spec


def test_every_default_is_written(make_dataset: MakeDataset) -> None:
    resolved = specs.prepare(job(batch_size=2048), make_dataset())
    assert specs.to_json(resolved) == {
        "name": "job",
        "namespace": "default",
        "seed": 0,
        "priority": 50,
        "retain": "2592000s",
        "data": {"name": "fashion@3", "shards": 8, "split": "train", "target": "label", "rows": {}},
        "resources": {"min_workers": 1},
        "reproducibility": {"bitwise": {}},
        "output": {"model": "job"},
        "train": {
            "model": {
                "mlp": {"hidden": [128], "activation": "relu", "loss": "cross_entropy"},
                "standardise": True,
            },
            "optimizer": {"sgd": {"learning_rate": 0.01}, "schedule": {"constant": {}}},
            "synchronous": {},
            "parameter_server": {},
            "batch_size": 2048,
            "stop": {"epochs": 10},
            "evaluation": {"split": "test", "every_steps": 5},
            "checkpoints": {"every": "60s", "keep": 3},
            "reduction": {"weighted_mean": {}},
            "on_nonfinite": {"fail": {}},
            "dtype": "float32",
        },
    }


@pytest.mark.parametrize(
    ("batch", "rows", "shards"),
    [(2048, 10_000, 8), (100, 10_000, 1), (0, 10_000, 39), (0, 10**6, 64), (0, 5, 1), (4096, 3, 3)],
)
def test_default_shards(make_dataset: MakeDataset, batch: int, rows: int, shards: int) -> None:
    resolved = specs.resolve(job(batch_size=batch), make_dataset(rows={"train": rows}))
    assert resolved.data.shards == shards


def test_sparse_data_are_not_standardised_by_default(make_dataset: MakeDataset) -> None:
    assert not specs.resolve(job(), make_dataset(format="csr")).train.model.standardise


def test_regression_gets_its_loss(make_dataset: MakeDataset) -> None:
    resolved = specs.resolve(job(), make_dataset(task="regression", classes=[]))
    assert resolved.train.model.mlp.loss == "squared_error"


@pytest.mark.parametrize(
    ("rows", "metric", "split"),
    [
        ({"train": 10, "test": 5, "validation": 5}, "", "test"),
        ({"train": 10, "validation": 5}, "", "validation"),
        ({"train": 10, "test": 5, "validation": 5}, "validation/loss", "validation"),
        ({"train": 10, "test": 5, "validation": 5}, "train/loss", "test"),
    ],
)
def test_the_evaluation_split_follows_the_data_and_the_stop_rules(
    make_dataset: MakeDataset, rows: dict[str, int], metric: str, split: str
) -> None:
    spec = job()
    if metric:
        spec.train.stop.plateau.metric = metric
        spec.train.stop.plateau.evaluations = 3
    assert specs.resolve(spec, make_dataset(rows=rows)).train.evaluation.split == split


def test_without_held_out_rows_there_is_no_evaluation(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(rows={"train": 1000})
    resolved = specs.prepare(job(batch_size=100), dataset)
    assert not resolved.train.HasField("evaluation")
    assert specs.job_plan(resolved, dataset, "job-1").evaluation_shards == 0


def test_given_stop_rules_get_no_default_beside_them(make_dataset: MakeDataset) -> None:
    spec = job()
    spec.train.stop.thresholds.add(metric="test/accuracy", at_least=0.9)
    assert not specs.resolve(spec, make_dataset()).train.stop.HasField("epochs")


SPECS = st.builds(
    lambda **fields: fields,
    batch=st.integers(0, 5000),
    shards=st.none() | st.integers(1, 64),
    kind=st.sampled_from(("mlp", "logistic_regression", "softmax_regression", "custom")),
    optimizer=st.none() | st.sampled_from(("sgd", "adagrad", "adam", "adamw")),
    epochs=st.none() | st.floats(0.1, 50),
    steps=st.none() | st.integers(1, 10_000),
    every=st.none() | st.integers(0, 500),
    seed=st.none() | st.integers(0, 2**53 - 1),
    tolerant=st.booleans(),
    rows=st.integers(1, 100_000),
    held_out=st.integers(0, 1000),
    sparse=st.booleans(),
)


def build(fields: dict[str, Any]) -> JobSpec:
    spec = JobSpec(name="job")
    spec.data.name = "fashion"
    spec.train.batch_size = fields["batch"]
    getattr(spec.train.model, fields["kind"]).SetInParent()
    if fields["optimizer"]:
        getattr(spec.train.optimizer, fields["optimizer"]).SetInParent()
    for message, name in ((spec.train.stop, "epochs"), (spec.train.stop, "steps"), (spec, "seed")):
        if fields[name] is not None:
            setattr(message, name, fields[name])
    if fields["shards"] is not None:
        spec.data.shards = fields["shards"]
    if fields["every"] is not None:
        spec.train.evaluation.every_steps = fields["every"]
    if fields["tolerant"]:
        spec.reproducibility.tolerant.SetInParent()
    return spec


@given(fields=SPECS)
@settings(max_examples=300, deadline=None)
def test_resolving_again_changes_nothing(fields: dict[str, Any]) -> None:
    dataset = Dataset(
        name="fashion",
        version=2,
        rows={"train": fields["rows"], "test": fields["held_out"]},
        features=3,
        task="classification",
        classes=["a", "b"],
        format="csr" if fields["sparse"] else "dense",
        target="y",
    )
    spec = build(fields)
    before = spec.SerializeToString(deterministic=True)
    once = specs.resolve(spec, dataset)
    assert spec.SerializeToString(deterministic=True) == before, "the argument stays as it is"
    assert specs.resolve(once, dataset) == once
    assert specs.spec_sha256(specs.resolve(once, dataset)) == specs.spec_sha256(once)
    text = json.dumps(specs.to_json(once))
    assert specs.load_json(text) == once == specs.load_yaml(text)
    made = specs.job_plan(once, dataset, "job-1")
    largest = -(-fields["rows"] // once.data.shards)
    assert 1 <= made.rows_per_leaf <= max(1, largest)
    assert made.steps_per_epoch == max(1, -(-largest // made.rows_per_leaf))
    assert made.evaluation_shards <= 64
    told = specs.plan(once, dataset, 4)
    assert told.steps == made.total_steps


def test_the_plan_counts(make_dataset: MakeDataset) -> None:
    spec = job(batch_size=2048)
    spec.data.shards = 16
    spec.train.stop.epochs = 20
    spec.train.evaluation.every_steps = 20
    spec.train.checkpoints.every_steps = 20
    dataset = make_dataset()
    told = specs.plan(specs.prepare(spec, dataset), dataset, 4)
    assert (told.steps, told.rows_per_leaf, told.evaluations, told.checkpoints) == (100, 128, 5, 5)
    assert told.eligible_workers == 4
    assert not told.warnings
    elements = 784 * 128 + 128 + 128 * 10 + 10
    assert told.worker_bytes > 5 * 4 * elements


def edit_warning(name: str, spec: JobSpec) -> None:
    stop, train = spec.train.stop, spec.train
    match name:
        case "under 64":
            spec.data.shards = 64
        case "no multiple":
            spec.data.shards = 7
        case "stop.epochs never fires":
            stop.steps, stop.epochs = 3, 20
        case "stop.steps never fires":
            stop.steps, stop.epochs = 10_000, 1
        case "may run until it is cancelled":
            stop.thresholds.add(metric="test/accuracy", at_least=0.9)
        case "never fires early":
            stop.epochs = 1
            stop.thresholds.add(metric="test/accuracy", at_least=0.9)
            train.evaluation.every_steps = 100
        case "stop.plateau never fires":
            stop.epochs = 1
            stop.plateau.evaluations = 50
        case "depends on the clock":
            stop.wall_time.seconds = 60
        case "never ends":
            stop.steps = 10
            train.optimizer.schedule.warm_up_steps = 10
        case "never lowers":
            stop.steps = 10
            train.optimizer.schedule.step.every_steps = 10
            train.optimizer.schedule.step.factor = 0.1
        case "only checkpoint":
            stop.steps = 10
            train.checkpoints.every_steps = 10
        case "every step uses all":
            train.batch_size = 20_480
        case "workers busy":
            spec.data.shards = 2


@pytest.mark.parametrize(
    "name",
    [
        "under 64",
        "no multiple",
        "stop.epochs never fires",
        "stop.steps never fires",
        "may run until it is cancelled",
        "never fires early",
        "stop.plateau never fires",
        "depends on the clock",
        "never ends",
        "never lowers",
        "only checkpoint",
        "every step uses all",
        "workers busy",
    ],
)
def test_the_plan_warns(make_dataset: MakeDataset, name: str) -> None:
    spec, dataset = job(batch_size=2048), make_dataset()
    edit_warning(name, spec)
    told = specs.plan(specs.prepare(spec, dataset), dataset, 4)
    assert [warning for warning in told.warnings if name in warning], told.warnings


def test_the_hash_is_that_of_canonical_json(make_dataset: MakeDataset) -> None:
    resolved = specs.prepare(job(batch_size=2048), make_dataset())
    same = specs.prepare(job(batch_size=2048), make_dataset())
    other = specs.prepare(job(batch_size=4096), make_dataset())
    assert specs.spec_sha256(resolved) == specs.spec_sha256(same)
    assert specs.spec_sha256(resolved) != specs.spec_sha256(other)


@pytest.mark.parametrize(
    ("number", "text"),
    [  # RFC 8785, appendix B, and what ECMAScript prints
        (0.0, "0"),
        (-0.0, "0"),
        (5e-324, "5e-324"),
        (-5e-324, "-5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (9007199254740992.0, "9007199254740992"),
        (295147905179352830000.0, "295147905179352830000"),
        (9.999999999999997e22, "9.999999999999997e+22"),
        (1e23, "1e+23"),
        (1.0000000000000001e23, "1.0000000000000001e+23"),
        (999999999999999700000.0, "999999999999999700000"),
        (999999999999999900000.0, "999999999999999900000"),
        (1e21, "1e+21"),
        (9.999999999999997e-7, "9.999999999999997e-7"),
        (0.000001, "0.000001"),
        (333333333.3333332, "333333333.3333332"),
        (333333333.33333343, "333333333.33333343"),
        (-0.0000033333333333333333, "-0.0000033333333333333333"),
        (1424953923781206.2, "1424953923781206.2"),
        (0.003, "0.003"),
        (100.0, "100"),
        (128, "128"),
    ],
)
def test_canonical_numbers(number: float, text: str) -> None:
    assert specs.canonical_json(number) == text


def test_canonical_json_sorts_by_utf_16_and_escapes_little() -> None:
    value = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    expected = '{"\\r":2,"1":4,"\u0080":6,"\u00f6":7,"\u20ac":1,"\U0001f600":5,"\ufb33":3}'
    assert specs.canonical_json(value) == expected
    assert specs.canonical_json({"a": [True, None, "x\ny"]}) == '{"a":[true,null,"x\\ny"]}'
    with pytest.raises(InvalidArgument, match="finite"):
        specs.canonical_json(float("nan"))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_numbers_read_back_the_same(number: float) -> None:
    assert float(specs.canonical_json(number)) == number
