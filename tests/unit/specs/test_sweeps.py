"""Sweeps: what their job files may say, their rounds and tasks, and the order of configurations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import ParameterGrid

from phalanx.errors import InvalidArgument
from phalanx.programs import graph_of
from phalanx.programs.base import ModelParts, Outcome, Piece
from phalanx.specs import job_plan, plan, prepare, resolve
from phalanx.sweeps.configurations import configurations, job_of
from phalanx.sweeps.ranking import Scored, Trial, best_first, ranks, scored
from phalanx.sweeps.steps import rounds_of, steps_of, tasks_of
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout

TRAIN: dict[str, Any] = {"model": {"softmax_regression": {}}, "stop": {"steps": 100}}
CASCADE = {"cascade": {"c": 1, "gamma": 0.1}}
GRID = {"train.l2": [0, 0.1]}


def dataset(rows: int = 5000, classes: int = 3) -> Dataset:
    message = Dataset(
        namespace="default",
        name="data",
        version=2,
        rows={"train": rows},
        features=7,
        classes=[str(each) for each in range(classes)],
        task="classification" if classes else "regression",
        format="dense",
        target="y",
        manifest_digest="a" * 64,
    )
    if classes:
        message.class_rows["train"].rows.extend([rows // classes] * classes)
    return message


def spec_of(sweep: dict[str, Any], **more: Any) -> JobSpec:
    document = {"name": "search", "data": {"name": "data"}, "sweep": sweep, **more}
    return ParseDict(document, JobSpec())


def with_train(**fields: Any) -> dict[str, Any]:
    return {"train": {**TRAIN, **fields}}


@pytest.mark.parametrize(
    ("sweep", "more", "field", "message"),
    [
        ({"grid": GRID}, {}, "sweep.base", "train, forest, cascade"),
        ({"base": {"evaluate": {}}, "grid": GRID}, {}, "sweep.base", "not evaluate"),
        ({"base": {"train": TRAIN}}, {}, "sweep.grid", "is missing"),
        ({"base": {"train": TRAIN}, "grid": {"train.l2": []}}, {}, "sweep.grid", "no values"),
        ({"base": {"train": TRAIN}, "grid": {"forest.trees": [1]}}, {}, "sweep.grid", "train."),
        ({"base": {"train": TRAIN}, "grid": {"data.name": ["x"]}}, {}, "sweep.grid", "train."),
        (
            {"base": {"train": TRAIN}, "grid": {**GRID, "train.l3": [1]}},
            {},
            'sweep.grid["train.l3"]',
            "1: train.l3: unknown field; known are",
        ),
        (
            {"base": {"train": TRAIN}, "grid": {"train.l2": [0, -1]}},
            {},
            'sweep.grid["train.l2"]',
            "-1: must be",
        ),
        (
            {"base": {"train": TRAIN}, "grid": {**GRID, "train.batch_size": [32, 0.5]}},
            {},
            'sweep.grid["train.batch_size"]',
            "0.5: train.batch_size: expected a whole number",
        ),
        (
            {"base": {"train": TRAIN}, "grid": {**GRID, "train.model.mlp.hidden": [[4]]}},
            {},
            'sweep.grid["train.model.mlp.hidden"]',
            "choose one kind: softmax_regression is already given",
        ),
        (
            {
                "base": {"train": TRAIN},
                "grid": {**GRID, "train.optimizer": [{"sgd": {"learning_rate": -2}}]},
            },
            {},
            'sweep.grid["train.optimizer"]',
            "sgd.learning_rate must",
        ),
        (
            {
                "base": with_train(l2=-3),
                "grid": {"train.optimizer.sgd.learning_rate": [0.1]},
            },
            {},
            "sweep.base.train.l2",
            "(where train.optimizer.sgd.learning_rate = 0.1)",
        ),
        # So no sweep needs a library that some workers lack.
        (
            {"base": with_train(model={"torch": {"module": "net:build"}}), "grid": GRID},
            {},
            "sweep.base.train.model.torch",
            "a sweep tries built-in models",
        ),
        (
            {
                "base": {"train": TRAIN},
                "grid": {"train.model": [TRAIN["model"], {"torch": {"module": "net:build"}}]},
            },
            {},
            'sweep.grid["train.model"]',
            "a sweep tries built-in models",
        ),
        ({"base": {"name": "x", "train": TRAIN}, "grid": GRID}, {}, "sweep.base.name", "itself"),
        (
            {"base": {"data": {"name": "x"}, "train": TRAIN}, "grid": GRID},
            {},
            "sweep.base.data.name",
            "itself",
        ),
        ({"base": {"train": TRAIN}, "grid": GRID, "folds": 1}, {}, "sweep.folds", "at least 2"),
        (
            {"base": {"train": TRAIN}, "grid": GRID, "random_trials": 3},
            {},
            "sweep.random_trials",
            "2 combinations only",
        ),
        (
            {"base": {"train": TRAIN}, "grid": {"train.l2": list(range(2001))}},
            {},
            "sweep.grid",
            "random_trials",
        ),
        (
            {"base": {"train": TRAIN}, "grid": GRID, "objective": {"metric": "speed"}},
            {},
            "sweep.objective.metric",
            "is not known",
        ),
        (
            {"base": {"train": TRAIN}, "grid": GRID, "objective": {"metric": "rmse"}},
            {},
            "sweep.objective.metric",
            "none of a classification",
        ),
        (
            {"base": {"train": TRAIN}, "grid": GRID, "objective": {"at_least": 0.9}},
            {},
            "sweep.objective.at_least",
            "no bound",
        ),
        (
            {"base": CASCADE, "grid": {"cascade.c": [1]}, "objective": {"metric": "log_loss"}},
            {},
            "sweep.base.cascade",
            "needs probabilities",
        ),
        ({"base": CASCADE, "grid": {"cascade.c": [1]}, "asha": {}}, {}, "sweep.asha", "trainings"),
        (
            {"base": CASCADE, "grid": {"cascade.c": [1]}, "halving": {}},
            {},
            "sweep.halving",
            "trainings",
        ),
        (
            {
                "base": {"train": TRAIN},
                "grid": GRID,
                "asha": {"min_steps": 1},
                "halving": {"min_steps": 1},
            },
            {},
            "sweep.halving",
            "leave one of them out",
        ),
        *(
            (
                {
                    "base": with_train(stop={"steps": 100_000}),
                    "grid": {"train.l2": [each / 1000 for each in range(1000)]},
                    name: {"min_steps": 1, "reduction": 1.1},
                },
                {},
                f"sweep.{name}.reduction",
                "rounds from step 1 to step 100000, with",
            )
            for name in ("asha", "halving")
        ),
        (
            {
                "base": with_train(stop={"steps": 100_000}),
                "grid": {"train.l2": [each / 1000 for each in range(1000)]},
                "halving": {"min_steps": 1000, "reduction": 1.1},
                "folds": 1000,
            },
            {},
            "sweep.folds",
            "at most 25000",
        ),
        (
            {"base": with_train(stop={"epochs": 2}), "grid": GRID, "asha": {"min_steps": 1}},
            {},
            "sweep.asha",
            "stop.steps",
        ),
        (
            {"base": {"train": TRAIN}, "grid": GRID, "asha": {"min_steps": 100}},
            {},
            "sweep.asha.min_steps",
            "below stop.steps",
        ),
        (
            {"base": {"train": TRAIN}, "grid": GRID, "asha": {"min_steps": 1, "reduction": 1}},
            {},
            "sweep.asha.reduction",
            "from 1.1",
        ),
        *(
            (
                {"base": {"train": TRAIN}, "grid": {path: values}, "asha": {"min_steps": 1}},
                {},
                "sweep.grid",
                "the same for all",
            )
            for path, values in (("train.stop.steps", [1]), ("train", [TRAIN]))
        ),
        (
            {"base": with_train(model={"k_means": {"clusters": 2}}), "grid": GRID},
            {},
            "sweep.base.train",
            "",
        ),
        (
            {"base": with_train(stale={"bound": 2}), "grid": GRID},
            {},
            "sweep.base.train.stale",
            "synchronous",
        ),
        (
            {"base": with_train(stop={"wall_time": "5s"}), "grid": GRID},
            {},
            "sweep.base.train.stop.wall_time",
            "steps or epochs",
        ),
        (
            {"base": with_train(start={"model": "other"}), "grid": GRID},
            {},
            "sweep.base.train.start",
            "leave it out",
        ),
        (
            {"base": with_train(model={"linear_regression": {}}), "grid": GRID},
            {},
            "sweep.base.train.model",
            "",
        ),
        (
            {
                "base": with_train(dtype="float64"),
                "grid": {
                    "train.model": [{"mlp": {"hidden": [20]}}, {"mlp": {"hidden": [12_000] * 2}}]
                },
            },
            {},
            'sweep.grid["train.model"]',
            "mlp has 1153152024 bytes of parameters; a sweep leaves a model of at most 1048576000",
        ),
        (
            {"base": {"train": TRAIN}, "grid": {"data.shards": [1, 4900]}},
            {},
            'sweep.grid["data.shards"]',
            "4900: 4,900 shards: more than the 4,000 rows",
        ),
        (
            {"base": {"train": TRAIN}, "grid": GRID},
            {"data": {"name": "data", "shards": 4}},
            "data.shards",
            "sweep.base.data.shards",
        ),
    ],
)
def test_what_a_sweep_may_not_say_is_named(
    sweep: dict[str, Any], more: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        prepare(spec_of(sweep, **more), dataset())
    found = [each for each in caught.value.violations if each.field.startswith(field)]
    assert found, caught.value.violations
    assert message in found[0].message


def test_a_fold_has_a_row_and_one_of_some_class() -> None:
    spec = spec_of({"base": {"train": TRAIN}, "grid": GRID, "folds": 30})
    with pytest.raises(InvalidArgument, match="no class has 30 rows"):
        prepare(spec, dataset(rows=60))
    with pytest.raises(InvalidArgument, match="more than the 20 rows"):
        prepare(spec, dataset(rows=20))


def test_the_defaults_of_a_sweep() -> None:
    resolved = prepare(spec_of({"base": {"train": TRAIN}, "grid": GRID}), dataset())
    assert resolved.sweep.folds == 5
    assert resolved.sweep.objective.metric == "accuracy"
    assert resolved.output.model == "search"
    assert resolve(resolved, dataset()) == resolved
    assert not resolved.sweep.base.train.model.HasField("standardise")
    base = with_train(model={"linear_regression": {}})
    numbers = prepare(spec_of({"base": base, "grid": GRID}), dataset(classes=0))
    assert numbers.sweep.objective.metric == "r2"


def test_combinations_are_in_the_order_of_scikit_learn() -> None:
    grid = {"train.l2": [0.5, 1e-7, 0], "train.batch_size": [8, 16]}
    spec = spec_of({"base": {"train": TRAIN}, "grid": grid})
    found = configurations(spec)
    assert [dict(each.values) for each in found] == list(ParameterGrid(grid))
    assert [each.number for each in found] == list(range(6))
    job = job_of(spec, found[1])
    assert (job.train.batch_size, job.train.l2) == (8, 1e-7)
    assert (job.name, job.data.name) == ("search", "data")
    assert spec.sweep.base.train.l2 == 0


def test_lists_and_words_are_values_as_well() -> None:
    base = {"train": {"model": {"mlp": {"hidden": [4]}}, "stop": {"steps": 5}}}
    grid = {
        "train.model.mlp.hidden": [[8], [16, 8]],
        "train.model.mlp.activation": ["relu", "tanh"],
        "train.model.standardise": [False],
    }
    spec = prepare(spec_of({"base": base, "grid": grid}), dataset())
    jobs = [job_of(spec, each).train.model for each in configurations(spec)]
    assert [list(each.mlp.hidden) for each in jobs] == [[8], [16, 8], [8], [16, 8]]
    assert [each.mlp.activation for each in jobs] == ["relu", "relu", "tanh", "tanh"]
    assert not any(each.standardise for each in jobs)


@pytest.mark.parametrize(
    ("count", "stopping", "expected"),
    [
        (9, {"halving": {"min_steps": 10}}, [(9, 10), (3, 30), (1, 90), (1, 0)]),
        (20, {"halving": {"min_steps": 25, "reduction": 2}}, [(20, 25), (10, 50), (5, 0)]),
        (2, {"halving": {"min_steps": 40, "reduction": 10}}, [(2, 40), (1, 0)]),
        # A round that would train for no longer than the one before is none.
        (8, {"halving": {"min_steps": 30, "reduction": 1.6}}, [(8, 30), (5, 48), (3, 76), (1, 0)]),
        (9, {"halving": {"min_steps": 1, "reduction": 9.5}}, [(9, 1), (1, 9), (1, 90), (1, 0)]),
        (9, {"asha": {"min_steps": 10}}, [(9, 10), (7, 30), (5, 90), (3, 0)]),
        (20, {"asha": {"min_steps": 25, "reduction": 2.5}}, [(20, 25), (18, 62), (16, 0)]),
        (2, {"asha": {"min_steps": 40, "reduction": 10}}, [(2, 40), (1, 0)]),
        (4, {}, [(4, 0)]),
    ],
)
def test_rounds_and_their_tasks(
    count: int, stopping: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    sweep: dict[str, Any] = {
        "base": {"train": TRAIN},
        "grid": {"train.l2": [each / 100 for each in range(count)]},
        "folds": 3,
        **stopping,
    }
    spec = prepare(spec_of(sweep), dataset())
    assert [(each.count, each.steps) for each in rounds_of(spec)] == expected
    plan = job_plan(spec, dataset(), "job-1")
    steps, graph = steps_of(spec), graph_of(plan)
    assert graph.count == len(steps) == plan.total_steps == tasks_of(spec)
    for task, step in enumerate(steps):
        assert all(needed < task for needed in step.needs)
        if step.kind == "trial" and step.round:
            (before,) = (steps[needed] for needed in step.needs)
            kind = "promoted" if "asha" in stopping else "order"
            assert (before.kind, before.round) == (kind, step.round - 1)
    for number, (left, _) in enumerate(expected):
        trials = {
            (each.place, each.fold)
            for each in steps
            if each.kind == "trial" and each.round == number
        }
        assert trials == {(place, fold) for place in range(left) for fold in range(3)}


def test_a_round_trains_for_longer_than_the_one_before() -> None:
    sweep = {
        "base": with_train(stop={"steps": 12}),
        "grid": {"train.l2": [each / 100 for each in range(8)]},
        "halving": {"min_steps": 1, "reduction": 1.5},
    }
    found = rounds_of(prepare(spec_of(sweep), dataset()))
    assert [each.steps for each in found] == [1, 2, 3, 5, 7, 11, 0]
    assert [each.count for each in found] == [8, 5, 3, 2, 1, 1, 1]


SCORES = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@given(
    table=st.lists(st.lists(SCORES, min_size=3, max_size=3), min_size=1, max_size=6),
    more_is_better=st.booleans(),
    shuffled=st.randoms(),
)
def test_the_order_does_not_depend_on_who_ends_first(
    table: list[list[float | None]], more_is_better: bool, shuffled: Any
) -> None:
    trials = [
        Trial(number, fold, score)
        for number, scores in enumerate(table)
        for fold, score in enumerate(scores)
    ]
    expected = best_first(scored(trials), more_is_better=more_is_better)
    shuffled.shuffle(trials)
    found = best_first(scored(trials), more_is_better=more_is_better)
    assert found == expected
    means = [each.mean for each in found]
    known = [each for each in means if each is not None]
    assert means == known + [None] * (len(means) - len(known))
    assert known == sorted(known, reverse=more_is_better)
    for one, other in pairwise(found):
        if one.mean == other.mean:
            assert one.configuration < other.configuration


def test_equal_scores_have_equal_ranks() -> None:
    entries = [
        Scored(number, (score,)) for number, score in enumerate([0.5, 0.9, 0.5, None, 0.1, None])
    ]
    assert dict(ranks(entries, more_is_better=True)) == {1: 1, 0: 2, 2: 2, 4: 4, 3: 5, 5: 5}


def test_scores_without_bounds_have_a_mean_and_a_deviation() -> None:
    usual = Scored(0, (0.25, 0.5, 0.75, 1.0))
    far = Scored(1, tuple(-1.5e308 * score for score in (0.25, 0.5, 0.75, 1.0)))
    assert usual.mean is not None
    assert usual.std is not None
    assert far.mean == pytest.approx(-1.5e308 * usual.mean)
    assert far.std == pytest.approx(1.5e308 * usual.std)
    assert (Scored(2, (0.0, 0.0)).mean, Scored(2, (0.0, 0.0)).std) == (0.0, 0.0)


def test_a_value_and_a_part_of_it_may_both_be_of_the_grid() -> None:
    grid = {"train.optimizer": [{"sgd": {}}], "train.optimizer.sgd.learning_rate": [0.1, 0.01]}
    spec = spec_of({"base": {"train": TRAIN}, "grid": grid})
    found = configurations(spec)
    rates = [job_of(spec, each).train.optimizer.sgd.learning_rate for each in found]
    assert rates == [0.1, 0.01]
    assert [each.values["train.optimizer"] for each in found] == [{"sgd": {}}] * 2


def test_a_model_of_another_job_keeps_the_code_and_the_place_of_its_own() -> None:
    told = ParseDict(
        {"name": "x", "namespace": "theirs", "code": {"files": {"a.py": ""}}, "train": {}},
        JobSpec(),
    )
    parts = ModelParts(Layout(dtype="float64"), (Piece("ab" * 32, 8, 1),), told)
    read = Outcome.from_json(Outcome({}, parts).to_json()).model
    assert read == parts
    described = parts.spec_of(spec_of({}, namespace="ours", output={"model": "best"}))
    assert described is not None
    assert (described.namespace, described.output.model) == ("ours", "best")
    assert described.HasField("train")
    assert not described.code.files
    assert ModelParts(Layout(), ()).spec_of(told) is None


@pytest.mark.parametrize("path", ["train.model.mlp.hidden", "train.model", "train"])
def test_the_largest_job_that_is_tried_counts_as_memory(path: str) -> None:
    """It is trained in a task: a worker without room for it must not get the sweep."""

    def bytes_of(*hidden: list[int]) -> int:
        of: dict[str, Any] = {
            "train.model.mlp.hidden": list(hidden),
            "train.model": [{"mlp": {"hidden": each}} for each in hidden],
            "train": [
                {**TRAIN, "model": {"mlp": {"hidden": each}}, "stop": {"steps": 5}}
                for each in hidden
            ],
        }
        sweep = {"base": {"train": {**TRAIN, "model": {"mlp": {}}}}, "grid": {path: of[path]}}
        return plan(prepare(spec_of(sweep), dataset()), dataset()).worker_bytes

    small, vector_bytes = bytes_of([8], [16]), 4 * 4096**2
    assert bytes_of([8], [4096, 4096], [16]) > small + 8 * vector_bytes
    assert small < vector_bytes


def test_what_a_cascade_holds_counts_in_a_sweep_of_it() -> None:
    sweep = {"base": CASCADE, "grid": {"cascade.c": [1.0, 10.0]}}
    assert plan(prepare(spec_of(sweep), dataset()), dataset()).worker_bytes > 200 * 2**20
