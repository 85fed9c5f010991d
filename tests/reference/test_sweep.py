"""Sweeps: the table is scikit-learn's, trials see nothing of their fold, the best is the model."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.svm import SVC

import phalanx
from phalanx.errors import InvalidArgument
from phalanx.sdk.job import Job
from phalanx.testing.datasets import classification, digits, regression, sparse_classification

SOFTMAX: dict[str, Any] = {
    "model": {"softmax_regression": {}},
    "optimizer": {"sgd": {"learning_rate": 0.1}},
    "batch_size": 64,
    "stop": {"epochs": 3},
}


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        cluster.data.add("digits", *digits())
        cluster.data.add("clouds", *classification(rows=240))
        cluster.data.add("numbers", *regression(rows=200))
        yield cluster


def swept(
    cluster: phalanx.Cluster, folder: Path, data: str, sweep: dict[str, Any], **more: Any
) -> tuple[Job, dict[str, Any]]:
    job = cluster.submit({"name": "search", "data": {"name": data}, "sweep": sweep, **more})
    job.wait(timeout_s=300)
    job.save(folder / "table.json")
    return job, json.loads((folder / "table.json").read_text())


@pytest.mark.slow
def test_a_grid_search_of_machines_has_the_table_of_scikit_learn(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    costs, gammas = [1, 10], [1e-4, 5e-4, 1e-3, 2e-3]
    sweep = {
        "base": {"cascade": {"c": 1, "gamma": 1, "standardise": False}},
        "grid": {"cascade.c": costs, "cascade.gamma": gammas},
        "folds": 5,
    }
    job, table = swept(alone, tmp_path, "digits", sweep)
    features, targets = digits()
    expected = GridSearchCV(
        SVC(), {"C": costs, "gamma": gammas}, cv=StratifiedKFold(5, shuffle=True, random_state=0)
    ).fit(features.astype(np.float64), targets)
    rows, known = table["configurations"], expected.cv_results_
    assert [row["values"] for row in rows] == [
        {"cascade.c": each["C"], "cascade.gamma": each["gamma"]} for each in known["params"]
    ]
    for name, column in (("mean", "mean_test_score"), ("std", "std_test_score")):
        found = [row[name] for row in rows]
        np.testing.assert_allclose(found, known[column], rtol=0, atol=1e-12)
    for fold in range(5):
        found = [row["scores"][fold] for row in rows]
        np.testing.assert_allclose(found, known[f"split{fold}_test_score"], rtol=0, atol=1e-12)
    assert [row["rank"] for row in rows] == known["rank_test_score"].tolist()
    assert table["best"] == expected.best_index_
    assert rows[table["best"]]["values"] == {"cascade.c": 1, "cascade.gamma": 1e-3}
    assert round(rows[table["best"]]["mean"], 5) == 0.98998
    assert job.result is not None
    assert job.result.metrics["sweep/accuracy"] == rows[table["best"]]["mean"]
    model = alone.models.get(job.result.model)
    np.testing.assert_array_equal(
        model.predict(features), expected.predict(features.astype(np.float64))
    )


def test_the_files_of_a_sweep_say_the_same(alone: phalanx.Cluster, tmp_path: Path) -> None:
    grid = {"train.l2": [0, 0.1], "train.optimizer.sgd.learning_rate": [0.1, 1e-7]}
    job, table = swept(
        alone, tmp_path, "clouds", {"base": {"train": SOFTMAX}, "grid": grid, "folds": 3}
    )
    job.save(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, table["configurations"], strict=True):
        assert int(line["configuration"]) == row["configuration"]
        assert {path: float(line[path]) for path in grid} == row["values"]
        assert [float(line[f"fold {fold}"]) for fold in (1, 2, 3)] == row["scores"]
        assert (float(line["mean"]), float(line["std"])) == (row["mean"], row["std"])
    job.save(tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgument, match="several files"):
        job.save(tmp_path / "table.txt")
    assert alone.verify(job).equal


@pytest.mark.parametrize(
    ("data", "cut_as"),
    [
        ("clouds", {}),
        ("numbers", {}),
        ("clouds", {"shards": 3, "rows": {"stratified": True}}),
        ("clouds", {"oversample": {}}),
        ("clouds", {"class_weights": {"weights": {"0": 3, "1": 1, "2": 0.5}}}),
    ],
)
def test_a_trial_is_the_job_on_the_rows_that_train(
    alone: phalanx.Cluster, tmp_path: Path, data: str, cut_as: dict[str, Any]
) -> None:
    """Their statistics, too: rows of the fold would move means and deviations."""
    classes = data == "clouds"
    features, targets = classification(rows=240) if classes else regression(rows=200)
    train = dict(SOFTMAX)
    if not classes:
        train |= {"model": {"linear_regression": {}}, "optimizer": {"sgd": {"learning_rate": 0.01}}}
    base = {"train": train, "data": cut_as}
    sweep = {"base": base, "grid": {"train.batch_size": [32]}, "folds": 4}
    job, table = swept(alone, tmp_path, data, sweep, seed=7)
    kind = StratifiedKFold if classes else KFold
    cut = kind(4, shuffle=True, random_state=7)
    for fold, (kept, held_out) in enumerate(cut.split(features, targets)):
        alone.data.add("part", features[kept], targets[kept])
        document = {
            "name": "part",
            "data": {"name": "part", **cut_as},
            "train": {**train, "batch_size": 32},
            "seed": 7,
        }
        model = alone.models.get(alone.submit(document).wait(timeout_s=60).model)
        predicted = model.predict(features[held_out])
        known = targets[held_out]
        score = np.mean(predicted == known)
        if not classes:
            spread = ((known - known.mean()) ** 2).sum()
            score = 1 - ((known - predicted) ** 2).sum() / spread
        assert table["configurations"][0]["scores"][fold] == pytest.approx(score, abs=1e-6)
    assert table["metric"] == ("accuracy" if classes else "r2")
    document = {
        "name": "all",
        "data": {"name": data, **cut_as},
        "train": {**train, "batch_size": 32},
        "seed": 7,
    }
    whole = alone.submit(document).wait(timeout_s=60)
    assert job.result is not None
    assert job.result.parameters_sha256 == whole.parameters_sha256
    one, other = (alone.models.get(each.model) for each in (job.result, whole))
    np.testing.assert_array_equal(one.predict(features), other.predict(features))


def test_a_trial_may_end_by_what_it_measures_on_its_own_rows(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    features, targets = classification(rows=240, classes=2, seed=5)
    alone.data.add("pair", features, targets)
    gap = {"metric": "train/duality_gap", "at_most": 0.01}
    train = {
        "model": {"linear_svm": {"bias": False}},
        "optimizer": {"cocoa": {}},
        "l2": 0.01,
        "stop": {"steps": 50, "thresholds": [gap]},
    }
    sweep = {"base": {"train": train}, "grid": {"train.l2": [1e-2, 1e-3]}, "folds": 3}
    job, table = swept(alone, tmp_path, "pair", sweep)
    cut = StratifiedKFold(3, shuffle=True, random_state=0)
    for fold, (kept, held_out) in enumerate(cut.split(features, targets)):
        alone.data.add("part", features[kept], targets[kept])
        document = {"name": "part", "data": {"name": "part"}, "train": train}
        result = alone.submit(document).wait(timeout_s=60)
        assert result.steps < 50
        predicted = alone.models.get(result.model).predict(features[held_out])
        score = np.mean(predicted == targets[held_out])
        assert table["configurations"][0]["scores"][fold] == pytest.approx(score, abs=1e-12)
    assert job.result is not None
    assert job.result.metrics["train/duality_gap"] <= 0.01


def test_forests_are_swept_as_scikit_learn_does(alone: phalanx.Cluster, tmp_path: Path) -> None:
    depths = [2, 6]
    sweep = {
        "base": {"forest": {"trees": 8}, "seed": 3},
        "grid": {"forest.tree.max_depth": depths},
        "folds": 3,
    }
    _, table = swept(alone, tmp_path, "clouds", sweep)
    features, targets = classification(rows=240)
    expected = GridSearchCV(
        RandomForestClassifier(8, random_state=3),
        {"max_depth": depths},
        cv=StratifiedKFold(3, shuffle=True, random_state=0),
    ).fit(features, targets)
    found = [row["mean"] for row in table["configurations"]]
    np.testing.assert_allclose(found, expected.cv_results_["mean_test_score"], atol=1e-12)


TWENTY_SEVEN_STEPS = {**SOFTMAX, "stop": {"steps": 27}}
RATES = {
    "base": {"train": TWENTY_SEVEN_STEPS},
    "grid": {"train.optimizer.sgd.learning_rate": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]},
    "folds": 2,
    "objective": {"metric": "log_loss"},
}
"""A sweep whose configurations are the better the later they are."""


def test_asha_lets_trials_go_on_that_are_whole_trainings_of_their_steps(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    stopped = RATES | {"asha": {"min_steps": 9}}
    _, table = swept(alone, tmp_path, "clouds", stopped)
    rows = table["configurations"]
    assert table["rounds"] == 2
    assert {row["steps"] for row in rows if row["round"] == 1} == {9}
    went_on = [row for row in rows if row["round"] == 2]
    assert {row["steps"] for row in went_on} == {27}
    assert table["finalists"] == len(went_on) >= 2
    assert sorted(row["rank"] for row in rows) == [1, 2, 3, 4, 5, 6]
    assert rows[table["best"]]["values"] == {"train.optimizer.sgd.learning_rate": 0.1}
    _, whole = swept(alone, tmp_path, "clouds", RATES)
    for row in went_on:
        assert row["scores"] == whole["configurations"][row["configuration"]]["scores"]
    short = RATES | {"base": {"train": {**TWENTY_SEVEN_STEPS, "stop": {"steps": 9}}}}
    _, first = swept(alone, tmp_path, "clouds", short)
    for row in rows:
        if row["round"] == 1:
            assert row["scores"] == first["configurations"][row["configuration"]]["scores"]


@pytest.mark.soak
def test_early_stopping_finds_what_the_whole_grid_finds(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    """A network on digits, 27 configurations: the winner of ASHA, trained to its end, is within 0.2
    points of the best of the whole grid, for less than an eighth of its steps."""
    train = {
        "model": {"mlp": {"hidden": [32]}},
        "optimizer": {"sgd": {"momentum": 0.9}},
        "batch_size": 64,
        "stop": {"steps": 270},
    }
    sweep = {
        "base": {"train": train},
        "grid": {
            "train.optimizer.sgd.learning_rate": [
                0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10,
            ],
            "train.l2": [0, 1e-4, 1e-2],
        },
        "folds": 3,
    }  # fmt: skip
    for seed in range(3):
        _, whole = swept(alone, tmp_path, "digits", sweep, seed=seed)
        means = {row["configuration"]: row["mean"] for row in whole["configurations"]}
        best = means[whole["best"]]
        print(f"seed {seed}, all: {best:.5f} for {27 * 270} steps of each fold")
        for name in ("asha", "halving"):
            stopped = sweep | {name: {"min_steps": 10}}
            _, table = swept(alone, tmp_path, "digits", stopped, seed=seed)
            rounds = [row["round"] for row in table["configurations"]]
            # Those that are promoted go on; anew they would begin as often as there are rounds.
            steps = sum((10, 30, 90, 270)[number - 1] for number in rounds)
            anew = sum(sum((10, 30, 90, 270)[:number]) for number in rounds)
            found = means[table["best"]]
            print(f"seed {seed}, {name}: {found:.5f} for {steps} steps of each fold, not {anew}")
            assert found >= best - 0.002
            assert steps <= 27 * 270 / 8


def test_halving_trains_only_the_best_to_the_end(alone: phalanx.Cluster, tmp_path: Path) -> None:
    sweep = RATES | {"halving": {"min_steps": 3}}
    job, table = swept(alone, tmp_path, "clouds", sweep)
    rows = table["configurations"]
    assert [row["round"] for row in rows].count(1) == 4
    assert {row["steps"] for row in rows if row["round"] == 1} == {3}
    last = [row for row in rows if row["round"] == table["rounds"]]
    assert table["rounds"] == 3
    assert [row["steps"] for row in last] == [27]
    assert sorted(row["rank"] for row in rows) == [1, 2, 3, 4, 5, 6]
    assert rows[table["best"]]["rank"] == 1
    assert rows[table["best"]]["values"] == {"train.optimizer.sgd.learning_rate": 0.1}
    whole = {"name": "whole", "data": {"name": "clouds"}, "train": TWENTY_SEVEN_STEPS}
    assert job.result is not None
    expected = alone.submit(whole).wait(timeout_s=60).parameters_sha256
    assert job.result.parameters_sha256 == expected


def test_settings_that_diverge_are_last_and_told(alone: phalanx.Cluster, tmp_path: Path) -> None:
    train = {
        "model": {"linear_regression": {}},
        "optimizer": {"sgd": {}},
        "stop": {"epochs": 50},
    }
    sweep = {
        "base": {"train": train},
        "grid": {"train.optimizer.sgd.learning_rate": [1e6, 0.1]},
        "folds": 2,
        "objective": {"metric": "rmse"},
    }
    _, table = swept(alone, tmp_path, "numbers", sweep)
    first, second = table["configurations"]
    assert (first["mean"], first["rank"]) == (None, 2)
    assert "not finite" in first["note"]
    assert (table["best"], second["rank"]) == (1, 1)


def test_the_best_is_one_with_a_score_where_all_that_went_on_diverged(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    train = {"model": {"linear_regression": {}}, "optimizer": {"sgd": {}}, "stop": {"steps": 4000}}
    sweep = {
        "base": {"train": train},
        "grid": {"train.optimizer.sgd.learning_rate": [1.5, 1e-9, 1e-9]},
        "folds": 2,
        "halving": {"min_steps": 1},
    }
    _, table = swept(alone, tmp_path, "numbers", sweep)
    first, *others = table["configurations"]
    assert (first["mean"], first["rank"], first["round"]) == (None, 3, table["rounds"])
    assert table["best"] == 1
    assert [row["rank"] for row in others] == [1, 1]


def test_scores_of_models_that_grew_without_bounds_are_told(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    train = {
        "model": {"linear_regression": {}},
        "optimizer": {"sgd": {}},
        "stop": {"steps": 20},
        "dtype": "float64",
    }
    sweep = {
        "base": {"train": train},
        "grid": {"train.optimizer.sgd.learning_rate": [0.1, 1e4]},
        "folds": 3,
    }
    job, table = swept(alone, tmp_path, "numbers", sweep)
    first, second = table["configurations"]
    assert (first["rank"], second["rank"]) == (1, 2)
    assert second["mean"] < -1e100
    assert 1e100 < second["std"] < float("inf")
    job.save(tmp_path / "scores.png")


def test_a_random_search_draws_combinations_by_its_seed(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    grid = {"train.l2": [0, 0.1, 0.2, 0.3, 0.4], "train.batch_size": [16, 32]}
    found = []
    for seed in (1, 1, 2):
        sweep = {"base": {"train": SOFTMAX}, "grid": grid, "folds": 2, "random_trials": 3}
        _, table = swept(alone, tmp_path, "clouds", sweep, seed=seed)
        found.append([tuple(row["values"].values()) for row in table["configurations"]])
    assert found[0] == found[1] != found[2]
    allowed = set(itertools.product(grid["train.batch_size"], grid["train.l2"]))
    assert all(len(set(each)) == 3 and set(each) <= allowed for each in found)


def test_chosen_columns_of_sparse_rows_are_those_of_every_trial(
    alone: phalanx.Cluster, tmp_path: Path
) -> None:
    rows, targets = sparse_classification(rows=200, features=12)
    alone.data.add("thin", rows, targets)
    chosen = ["x2", "x5", "x7"]
    sweep = {"base": {"cascade": {"c": 1, "gamma": 0.1}}, "grid": {"cascade.c": [1, 3]}, "folds": 3}
    job = alone.submit(
        {"name": "thin", "data": {"name": "thin", "features": chosen}, "sweep": sweep}
    )
    model = alone.models.get(job.wait(timeout_s=60).model)
    job.save(tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    narrow = rows.toarray()[:, [1, 4, 6]].astype(np.float64)
    expected = GridSearchCV(
        SVC(gamma=0.1), {"C": [1, 3]}, cv=StratifiedKFold(3, shuffle=True, random_state=0)
    ).fit(narrow, targets)
    found = [row["mean"] for row in table["configurations"]]
    np.testing.assert_allclose(found, expected.cv_results_["mean_test_score"], atol=1e-12)
    values = model.predict_decision_values(rows)
    np.testing.assert_allclose(values, expected.decision_function(narrow), rtol=0, atol=1e-9)


def test_a_fold_that_leaves_one_class_is_named(alone: phalanx.Cluster) -> None:
    """Scikit-learn has no score for that fold, so no mean for any configuration, and takes the
    first one; here the sweep ends."""
    features, targets = classification(rows=40, classes=2)
    targets[:] = 0
    targets[7] = 1
    alone.data.add("one", features, targets)
    cut = StratifiedKFold(3, shuffle=True, random_state=0)
    with pytest.warns(UserWarning, match="only 1 members"):
        held_out = [7 in rows for _, rows in cut.split(features, targets)].index(True)
    sweep = {"base": {"cascade": {"c": 1, "gamma": 0.1}}, "grid": {"cascade.c": [1, 3]}, "folds": 3}
    job = alone.submit({"name": "one", "data": {"name": "one"}, "sweep": sweep})
    with pytest.raises(phalanx.JobFailed, match=f"without fold {held_out + 1} of 3 all rows"):
        job.wait(timeout_s=60)
