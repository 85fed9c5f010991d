"""Programs of tasks: what their job files may say, their defaults, their graphs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from phalanx.errors import InvalidArgument
from phalanx.programs import graph_of
from phalanx.programs import predict as predicting
from phalanx.programs.cascade import Layers as CascadeLayers
from phalanx.programs.forest import FEATURES_MAX, TASKS_MAX, Layers
from phalanx.programs.predict import OUTPUT
from phalanx.specs import job_plan, load_document, plan, prepare, resolve
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan


def dataset(rows: int = 5000, classes: int = 3, features: int = 7) -> Dataset:
    return Dataset(
        namespace="default",
        name="data",
        version=2,
        rows={"train": rows, "test": 500},
        features=features,
        classes=[str(each) for each in range(classes)],
        task="classification" if classes else "regression",
        format="dense",
        target="y",
        manifest_digest="a" * 64,
    )


def spec_of(forest: dict[str, Any], **more: Any) -> JobSpec:
    document = {"name": "trees", "data": {"name": "data"}, "forest": forest, **more}
    return ParseDict(document, JobSpec())


@pytest.mark.parametrize(
    ("forest", "more", "field", "message"),
    [
        ({}, {}, "forest.trees", "must be at least 1"),
        ({"trees": 10_001}, {}, "forest.trees", "at most 10000"),
        ({"trees": 5, "tree": {"depth": 3}}, {}, "forest.tree.depth", "is no parameter of a tree"),
        ({"trees": 5, "tree": {"random_state": 3}}, {}, "forest.tree.random_state", "no parameter"),
        ({"trees": 5, "tree": {"max_depth": 0}}, {}, "forest.tree.max_depth", "from 1 on or null"),
        ({"trees": 5, "tree": {"max_depth": 2.5}}, {}, "forest.tree.max_depth", "a whole number"),
        ({"trees": 5, "tree": {"max_depth": "2"}}, {}, "forest.tree.max_depth", "a whole number"),
        ({"trees": 5, "tree": {"max_features": "many"}}, {}, "forest.tree.max_features", "sqrt"),
        ({"trees": 5, "tree": {"max_features": 0}}, {}, "forest.tree.max_features", "not 0"),
        ({"trees": 5, "tree": {"min_samples_split": 1}}, {}, "forest.tree.min_samples_split", "2"),
        ({"trees": 5, "tree": {"min_samples_leaf": 0}}, {}, "forest.tree.min_samples_leaf", "not"),
        (
            {"trees": 5, "tree": {"min_weight_fraction_leaf": 0.6}},
            {},
            "forest.tree.min_weight",
            "5",
        ),
        ({"trees": 5, "tree": {"ccp_alpha": -1}}, {}, "forest.tree.ccp_alpha", "from 0 on"),
        ({"trees": 5, "tree": {"ccp_alpha": True}}, {}, "forest.tree.ccp_alpha", "from 0 on"),
        (
            {"trees": 5, "tree": {"criterion": "poisson"}},
            {},
            "forest.tree.criterion",
            "does not fit a classification",
        ),
        ({"trees": 5}, {"code": {"files": {"a.py": "x = 1"}}}, "code", "is not run"),
        ({"trees": 5}, {"output": {"best": {"metric": "test/loss"}}}, "output.best", "training"),
        (
            {"trees": 5},
            {"data": {"name": "data", "oversample": {}}},
            "data.oversample",
            "for training",
        ),
        (
            {"trees": 5},
            {"data": {"name": "data", "rows": {"stratified": True}}},
            "data.rows.stratified",
            "per_shard",
        ),
        (
            {"trees": 5, "per_shard": True},
            {"data": {"name": "data", "shards": 6000}},
            "data.shards",
            "more than the",
        ),
    ],
)
def test_what_a_forest_may_not_say_is_named(
    forest: dict[str, Any], more: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        prepare(spec_of(forest, **more), dataset())
    found = [each for each in caught.value.violations if each.field.startswith(field)]
    assert found, caught.value.violations
    assert message in found[0].message


def test_a_forest_takes_as_many_features_as_the_result_of_a_task_has_room_for() -> None:
    wide = dataset()
    wide.features = FEATURES_MAX
    prepare(spec_of({"trees": 5}), wide)
    wide.features += 1
    with pytest.raises(InvalidArgument, match=r"data.features: 67,108,865 features.*choose fewer"):
        prepare(spec_of({"trees": 5}), wide)


def test_the_defaults_of_a_forest_are_those_of_scikit_learn() -> None:
    resolved = prepare(spec_of({"trees": 5}), dataset())
    assert resolved.forest.tree["max_features"] == "sqrt"
    assert resolved.data.name == "data@2"
    assert resolved.output.model == "trees"
    assert resolved.reproducibility.WhichOneof("mode") == "bitwise"
    assert resolve(resolved, dataset()) == resolved
    numbers = prepare(spec_of({"trees": 5}), dataset(classes=0))
    assert numbers.forest.tree["max_features"] == "all"
    kept = prepare(spec_of({"trees": 5, "tree": {"max_features": None}}), dataset())
    assert kept.forest.tree["max_features"] is None


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize(
    ("program", "field"),
    [
        ({"forest": {"trees": 5, "tree": {"max_features": 1.0}}}, "forest.tree.max_features"),
        (
            {
                "sweep": {
                    "base": {"forest": {"trees": 5, "tree": {"max_features": 1.0}}},
                    "grid": {"forest.tree.max_depth": [1, 2]},
                }
            },
            "sweep.base.forest.tree.max_features",
        ),
        (
            {
                "sweep": {
                    "base": {"forest": {"trees": 5}},
                    "grid": {"forest.tree.max_features": [0.5, 1.0]},
                }
            },
            'sweep.grid["forest.tree.max_features"][1]',
        ),
    ],
)
def test_one_feature_and_all_features_are_not_taken_for_each_other(
    program: dict[str, Any], field: str, is_json: bool
) -> None:
    """To scikit-learn 1 is one feature and 1.0 is all; a message has one kind of numbers."""
    text = json.dumps({"name": "trees", "data": {"name": "data"}, **program})
    with pytest.raises(InvalidArgument, match="write all for all features, or 1 for one") as told:
        load_document(text, "job", json=is_json)
    assert [each.field for each in told.value.violations] == [field]
    one = load_document(text.replace("1.0", "1"), "job", json=is_json)
    assert load_document(text.replace("1.0", '"all"'), "job", json=is_json).spec != one.spec


ARGUMENT = "train.model.custom.arguments.max_features"


@pytest.mark.parametrize("grid", [{"train.l2": [0.1]}, {ARGUMENT: [0.5, 1.0]}])
def test_what_user_code_is_given_is_no_matter_of_forests(grid: dict[str, Any]) -> None:
    custom = {"entrypoint": "net:build", "arguments": {"max_features": 1.0}}
    sweep = {"base": {"train": {"model": {"custom": custom}}}, "grid": grid}
    text = json.dumps({"name": "mine", "data": {"name": "data"}, "sweep": sweep})
    assert load_document(text, "job", json=True).spec.sweep.base.HasField("train")


def test_a_forest_that_looks_at_one_feature_is_warned_of() -> None:
    for value, warned in ((1, True), ("all", False), (2, False), (0.5, False)):
        resolved = prepare(spec_of({"trees": 5, "tree": {"max_features": value}}), dataset())
        warnings = plan(resolved, dataset()).warnings
        assert any("1.0 is all here" in each for each in warnings) == warned


@pytest.mark.parametrize(
    ("cascade", "more", "field", "message"),
    [
        ({"gamma": 0.1}, {}, "cascade.c", "must be above 0"),
        ({"c": 1}, {}, "cascade.gamma", "must be above 0"),
        ({"c": 1, "gamma": -2}, {}, "cascade.gamma", "not -2"),
        ({"c": 1, "gamma": 1, "gap_at_most": 1}, {}, "cascade.gap_at_most", "below 1"),
        ({"c": 1, "gamma": 1, "passes": 0}, {}, "cascade.passes", "at least 1"),
        ({"c": 1, "gamma": 1}, {"seed": 3}, "seed", "changes nothing"),
        (
            {"c": 1, "gamma": 1, "passes": 1000},
            {"data": {"name": "data", "shards": 30}},
            "cascade.passes",
            "at most 50000",
        ),
    ],
)
def test_what_a_cascade_may_not_say_is_named(
    cascade: dict[str, Any], more: dict[str, Any], field: str, message: str
) -> None:
    document = {"name": "svm", "data": {"name": "data"}, "cascade": cascade, **more}
    with pytest.raises(InvalidArgument) as caught:
        prepare(ParseDict(document, JobSpec()), dataset())
    found = [each for each in caught.value.violations if each.field == field]
    assert found, caught.value.violations
    assert message in found[0].message


def cascade_of(shards: int | None = None, rows: int = 12_000, **cascade: Any) -> JobSpec:
    data = {"name": "data"} | ({} if shards is None else {"shards": shards})
    document = {"name": "svm", "data": data, "cascade": {"c": 1, "gamma": 0.1, **cascade}}
    return prepare(ParseDict(document, JobSpec()), dataset(rows))


def test_the_defaults_of_a_cascade() -> None:
    resolved = cascade_of()
    assert resolved.data.shards == 2
    assert (resolved.cascade.gap_at_most, resolved.cascade.passes) == (1e-6, 10)
    assert resolved.cascade.standardise
    assert resolve(resolved, dataset(12_000)) == resolved
    assert cascade_of(rows=300).data.shards == 1


def test_a_cascade_tells_classes_apart() -> None:
    spec = ParseDict(
        {"name": "svm", "data": {"name": "data"}, "cascade": {"c": 1, "gamma": 0.1}}, JobSpec()
    )
    with pytest.raises(InvalidArgument, match="is for regression"):
        prepare(spec, dataset(classes=0))


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("passes", [1, 3])
def test_every_shard_of_a_cascade_reaches_the_top_of_its_pass(shards: int, passes: int) -> None:
    plan_ = job_plan(cascade_of(shards, passes=passes), dataset(12_000), "job-1")
    steps = CascadeLayers.of(plan_).steps
    tops = [task for task, step in enumerate(steps) if step.top]
    assert len(tops) == (1 if shards == 1 else passes)
    reached: list[set[int]] = []
    for task, step in enumerate(steps):
        assert all(needed < task for needed in step.needs)
        below = [needed for needed in step.needs if needed not in tops]
        reached.append(set().union(*(reached[needed] for needed in below)))
        if step.kind == "shard":
            reached[-1] = {step.number}
        if step.top:
            assert reached[-1] == set(range(shards))
    vectors = [task for task, step in enumerate(steps) if step.kind == "vectors"]
    assert steps[-1].needs == (tops[-1], *vectors)
    assert graph_of(plan_).count == len(steps) == plan_.total_steps


def planned(trees: int, rows: int, **forest: Any) -> JobPlan:
    spec = prepare(spec_of({"trees": trees, **forest}), dataset(rows))
    return job_plan(spec, dataset(rows), "job-1")


@pytest.mark.parametrize(
    ("trees", "rows", "forest"),
    [(1, 100, {}), (7, 300_000, {}), (100, 500, {}), (10_000, 400_000, {}), (9, 999, {})],
)
def test_the_tasks_of_a_forest(trees: int, rows: int, forest: dict[str, Any]) -> None:
    plan_ = planned(trees, rows, **forest)
    graph, layers = graph_of(plan_), Layers.of(plan_)
    grown = [tree for group in range(layers.groups) for tree in layers.trees_of(group)]
    assert grown == list(range(trees))
    assert layers.groups <= TASKS_MAX
    assert graph.count == layers.groups + layers.blocks + 1 == plan_.total_steps
    assert set(graph.needs[-1]) == set(range(graph.count - 1))
    assert all(needed < task for task, needs in enumerate(graph.needs) for needed in needs)


def test_few_rows_make_tasks_of_several_trees() -> None:
    assert Layers.of(planned(320, 1000)).groups == 32
    assert Layers.of(planned(320, 1_000_000)).groups == 320
    assert Layers.of(planned(320, 40_000, per_shard=True)).groups == 32


def test_people_are_told_what_a_forest_will_do() -> None:
    spec = prepare(
        spec_of({"trees": 3, "per_shard": True}, data={"name": "data", "shards": 8}), dataset()
    )
    told = plan(spec, dataset(), eligible_workers=40)
    assert told.steps == 12
    assert any("rows of 5 shards are never used" in each for each in told.warnings)
    assert any("12 tasks keep 12 of 40 workers busy" in each for each in told.warnings)
    assert told.worker_bytes > 0


@pytest.mark.parametrize(
    ("program", "more", "field", "message"),
    [
        ({"evaluate": {}}, {}, "evaluate.model", "is missing"),
        ({"predict": {"model": "Not A Name"}}, {}, "predict.model", "is not allowed"),
        ({"evaluate": {"model": "m", "metrics": ["recall"]}}, {}, "evaluate.metrics[0]", "use acc"),
        ({"evaluate": {"model": "m", "metrics": ["f1", "f1"]}}, {}, "evaluate.metrics[1]", "twice"),
        ({"evaluate": {"model": "m", "metrics": ["r2"]}}, {}, "evaluate.metrics[0]", "none of a"),
        ({"predict": {"model": "m", "output": "a/b.parquet"}}, {}, "predict.output", "a folder"),
        ({"predict": {"model": "m", "output": "b.csv"}}, {}, "predict.output", ".parquet"),
        ({"predict": {"model": "m"}}, {"seed": 3}, "seed", "changes nothing"),
        ({"predict": {"model": "m"}}, {"output": {"model": "n"}}, "output.model", "leaves none"),
        ({"predict": {"model": "m"}}, {"code": {"files": {"a.py": ""}}}, "code", "is not run"),
    ],
)
def test_what_a_program_with_a_model_may_not_say_is_named(
    program: dict[str, Any], more: dict[str, Any], field: str, message: str
) -> None:
    document = {"name": "rows", "data": {"name": "data"}, **program, **more}
    with pytest.raises(InvalidArgument) as caught:
        prepare(ParseDict(document, JobSpec()), dataset())
    found = {each.field: each.message for each in caught.value.violations}
    assert message in found[field]


def test_the_defaults_of_an_evaluation_and_a_prediction() -> None:
    document = {"name": "rows", "data": {"name": "data"}, "evaluate": {"model": "m"}}
    resolved = prepare(ParseDict(document, JobSpec()), dataset())
    assert resolved.data.split == "test"
    assert list(resolved.evaluate.metrics) == ["accuracy", "f1", "log_loss"]
    assert resolved.output.model == ""
    two = prepare(ParseDict(document, JobSpec()), dataset(classes=2))
    assert "auc" in two.evaluate.metrics
    numbers = prepare(ParseDict(document, JobSpec()), dataset(classes=0))
    assert list(numbers.evaluate.metrics) == ["r2", "rmse", "mae"]
    predicted = {"name": "rows", "data": {"name": "data"}, "predict": {"model": "m"}}
    assert prepare(ParseDict(predicted, JobSpec()), dataset()).predict.output == OUTPUT
    assert resolve(resolved, dataset()) == resolved


@pytest.mark.parametrize(("rows", "shards", "files"), [(10, 1, 1), (10**7, 64, 20), (10**7, 3, 3)])
def test_the_tasks_of_a_prediction(rows: int, shards: int, files: int) -> None:
    document = {
        "name": "rows",
        "data": {"name": "data", "split": "train", "shards": shards},
        "predict": {"model": "m"},
    }
    plan_ = job_plan(prepare(ParseDict(document, JobSpec()), dataset(rows)), dataset(rows), "job-1")
    layers, graph = predicting.Layers.of(plan_), graph_of(plan_)
    assert (layers.shards, layers.files) == (shards, files)
    assert [shard for file in range(files) for shard in layers.shards_of(file)] == list(
        range(shards)
    )
    assert graph.count == plan_.total_steps == shards + files + 1
    names = layers.file_names(OUTPUT)
    assert names == sorted(names)
    assert len(names) == files


def test_what_a_task_holds_is_counted() -> None:
    large = dataset(rows=4_000_000, features=1000)

    def bytes_of(**program: Any) -> int:
        document = {"name": "rows", "data": {"name": "data", "split": "train", "shards": 64}}
        spec = prepare(ParseDict({**document, **program}, JobSpec()), large)
        return plan(spec, large).worker_bytes

    whole = bytes_of(forest={"trees": 5})
    assert whole >= 4 * 4_000_000 * 1000
    assert bytes_of(forest={"trees": 64, "per_shard": True}) < whole / 50
    assert bytes_of(evaluate={"model": "m"}) < whole / 20
    assert bytes_of(predict={"model": "m"}) < whole / 20
    large.features = 1
    shards = bytes_of(evaluate={"model": "m", "metrics": ["accuracy"]})
    assert bytes_of(evaluate={"model": "m", "metrics": ["auc"]}) > 100 * 4_000_000 > shards
    assert bytes_of(predict={"model": "m"}) > 100 * 500_000 > shards
    large.features = 1000
    large.format, large.size_bytes = "csr", 10**9
    assert bytes_of(forest={"trees": 5}) < 4 * 10**9
