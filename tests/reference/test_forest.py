"""Forests equal scikit-learn's: each tree, what is predicted, importances, out-of-bag scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.tree import DecisionTreeClassifier

import phalanx
from phalanx.data.predict import LoadedModel
from phalanx.forests.growing import seeds_of, times_drawn
from phalanx.forests.tables import (
    FEATURE,
    IMPURITY,
    LEFT,
    RIGHT,
    SAMPLES,
    THRESHOLD,
    VALUES,
    WEIGHT,
    tensor_name,
)
from phalanx.models.base import views
from phalanx.programs import Outcome
from phalanx.sdk.methods import READ_TASK_RESULTS
from phalanx.sdk.values import Result
from phalanx.testing.datasets import classification, digits, regression, shared_data
from phalanx.v1.job_service_pb2 import ReadTaskResultsRequest


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        yield cluster


def grown(
    cluster: phalanx.Cluster, data: tuple[Any, Any], seed: int = 0, **forest: Any
) -> tuple[LoadedModel, Result]:
    shards = forest.pop("shards", 5)
    cluster.data.add("data", *data)
    document = {
        "name": "forest",
        "data": {"name": "data", "shards": shards},
        "forest": forest,
        "seed": seed,
    }
    result = cluster.submit(document).wait(timeout_s=120)
    return cluster.models.get(result.model), result


def assert_equal_trees(model: LoadedModel, estimators: list[Any]) -> None:
    tables = views(model.model.layout, model.parameters)
    for number, estimator in enumerate(estimators):
        table, tree = tables[tensor_name(number)], estimator.tree_
        for column, expected in (
            (LEFT, tree.children_left),
            (RIGHT, tree.children_right),
            (FEATURE, tree.feature),
            (THRESHOLD, tree.threshold),
            (IMPURITY, tree.impurity),
            (SAMPLES, tree.n_node_samples),
            (WEIGHT, tree.weighted_n_node_samples),
        ):
            np.testing.assert_array_equal(table[:, column], expected)
        np.testing.assert_array_equal(table[:, VALUES:], tree.value[:, 0, :])


def importances(model: LoadedModel) -> Any:
    found = model.feature_importances()
    assert list(found) == [f"x{number + 1}" for number in range(len(found))]
    return np.array(list(found.values()))


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"max_depth": 5, "criterion": "entropy", "min_samples_leaf": 3},
        {"max_features": 0.5, "max_leaf_nodes": 20},
        {"max_features": "all", "ccp_alpha": 0.002, "min_samples_split": 0.05},
    ],
)
def test_a_forest_of_classes_is_that_of_scikit_learn(
    alone: phalanx.Cluster, tree: dict[str, Any]
) -> None:
    features, targets = digits()
    model, result = grown(alone, (features, targets), seed=7, trees=25, tree=tree)
    arguments = {name: None if value == "all" else value for name, value in tree.items()}
    expected = RandomForestClassifier(25, random_state=7, n_jobs=1, oob_score=True, **arguments)
    expected.fit(features.astype(np.float32), targets)
    assert_equal_trees(model, expected.estimators_)
    probabilities = model.predict_probabilities(features)
    np.testing.assert_array_equal(probabilities, expected.predict_proba(features))
    np.testing.assert_array_equal(model.predict(features), expected.predict(features))
    np.testing.assert_array_equal(importances(model), expected.feature_importances_)
    assert result.metrics["oob/accuracy"] == expected.oob_score_


def test_a_forest_of_numbers_is_that_of_scikit_learn(alone: phalanx.Cluster) -> None:
    features, targets = regression(rows=700)
    model, result = grown(alone, (features, targets), seed=2, trees=12, tree={"max_depth": 9})
    expected = RandomForestRegressor(12, random_state=2, n_jobs=1, oob_score=True, max_depth=9)
    with pytest.warns(UserWarning, match="OOB"):
        expected.fit(features.astype(np.float32), targets)
    assert_equal_trees(model, expected.estimators_)
    np.testing.assert_array_equal(model.predict(features), expected.predict(features))
    np.testing.assert_array_equal(importances(model), expected.feature_importances_)
    assert result.metrics["oob/r2"] == pytest.approx(expected.oob_score_, rel=1e-12)
    assert result.metrics["oob/unscored_rows"] > 0


def test_a_target_that_never_changes_has_no_r2(alone: phalanx.Cluster) -> None:
    """The mean of so many equal numbers is not that number, and what rounding leaves no spread."""
    features, _ = regression(150, 3)
    targets = np.full(150, 0.1)
    assert targets.mean() != 0.1
    _, result = grown(alone, (features, targets), trees=8)
    assert {name for name in result.metrics if name.startswith("oob/")} == {
        "oob/rmse",
        "oob/unscored_rows",
    }


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_numbers_whose_squares_are_beyond_all_numbers(alone: phalanx.Cluster) -> None:
    """What they come to is left out, instead of failing a forest that is grown."""
    features, targets = regression(rows=60, features=3)
    targets = targets * 1e200
    model, result = grown(alone, (features, targets), trees=3)
    theirs = RandomForestRegressor(3, random_state=0).fit(features, targets)
    np.testing.assert_array_equal(model.predict(features), theirs.predict(features))
    assert {name for name in result.metrics if name.startswith("oob/")} == {"oob/unscored_rows"}


def test_a_model_has_a_piece_for_each_task_and_not_for_each_tree(alone: phalanx.Cluster) -> None:
    # Storage puts a model together of so many pieces and no more: forests have as many trees.
    _, result = grown(alone, classification(rows=60), trees=96, shards=2)
    job = alone.jobs()[0]
    request = ReadTaskResultsRequest(job_id=job.id, tasks=[result.steps - 1])
    (page,) = alone.backend.stream(READ_TASK_RESULTS, request)
    outcome = Outcome.from_json(alone.backend.get_blob(page.results[0].stored.digest))
    assert outcome.model is not None
    assert len(outcome.model.layout.tensors) == 96 + 1
    assert len(outcome.model.pieces) == 32 + 1
    features, targets = classification(rows=60)
    expected = RandomForestClassifier(96, random_state=0).fit(features, targets)
    model = alone.models.get(result.model)
    assert_equal_trees(model, expected.estimators_)


def test_sparse_rows_grow_the_trees_of_scikit_learn(
    alone: phalanx.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.Generator(np.random.Philox(3))
    dense = generator.normal(size=(400, 30)) * (generator.random((400, 30)) < 0.2)
    targets = (dense[:, :3].sum(axis=1) > 0).astype(int)
    sparse = scipy.sparse.csr_array(dense.astype(np.float32))
    expected = RandomForestClassifier(25, random_state=1, n_jobs=1, oob_score=True)
    expected.fit(sparse, targets)
    # Some rows at a time are made dense where all would take too much.
    monkeypatch.setattr("phalanx.forests.model.DENSE_BYTES", 4 * 30 * 11)
    for limit in (0, 2**30):
        monkeypatch.setattr("phalanx.forests.growing.GROWN_DENSE_BYTES", limit)
        model, result = grown(alone, (sparse, targets), seed=1, trees=25)
        assert result.metrics["oob/accuracy"] == expected.oob_score_
        assert_equal_trees(model, expected.estimators_)
        probabilities = model.predict_probabilities(sparse)
        np.testing.assert_array_equal(probabilities, expected.predict_proba(sparse))


def test_trees_on_shards_see_the_rows_of_one_shard_each(alone: phalanx.Cluster) -> None:
    features, targets = classification(rows=300, classes=3)
    model, result = grown(
        alone, (features, targets), seed=5, shards=4, trees=8, per_shard=True, tree={"max_depth": 4}
    )
    seeds, estimators, votes = seeds_of(5, 8), [], np.zeros((300, 3))
    for number in range(8):
        first, stop = (300 * part // 4 for part in (number % 4, number % 4 + 1))
        drawn = times_drawn(int(seeds[number]), stop - first)
        tree = DecisionTreeClassifier(
            random_state=seeds[number], max_features="sqrt", max_depth=4
        ).fit(features[first:stop], targets[first:stop], sample_weight=drawn)
        estimators.append(tree)
        unseen = first + np.flatnonzero(drawn == 0)
        votes[unseen] += tree.predict_proba(features[unseen])
    assert_equal_trees(model, estimators)
    assert result.metrics["oob/accuracy"] == np.mean(votes.argmax(axis=1) == targets)


@pytest.mark.soak
def test_a_forest_may_see_more_features_than_a_message_holds() -> None:
    """The importances of 530,000 features are more than 4 MiB."""
    features, rows = 530_000, 60
    columns = np.random.default_rng(0).integers(0, features, size=(rows, 20))
    columns[:, 0] = (np.arange(rows) % 2) * (features - 1)
    places = (np.repeat(np.arange(rows), 20), columns.ravel())
    values = np.ones(rows * 20, np.float32)
    data = scipy.sparse.csr_array((values, places), shape=(rows, features))
    with phalanx.LocalCluster(workers=1, slots=1) as cluster:
        targets, tree = np.arange(rows) % 2, {"max_features": "all"}
        model, _ = grown(cluster, (data, targets), trees=3, shards=2, tree=tree)
        found = importances(model)
    assert found.argmax() == features - 1
    assert found.sum() == pytest.approx(1)


@pytest.mark.slow
def test_a_forest_on_a9a_is_that_of_scikit_learn(alone: phalanx.Cluster) -> None:
    from sklearn.datasets import load_svmlight_file

    path = shared_data("a9a") / "a9a"
    features, targets = load_svmlight_file(str(path), n_features=123)
    alone.data.add("a9a", str(path), feature_count=123, format="libsvm")
    tree = {"max_depth": 20, "min_samples_leaf": 2}
    document = {
        "name": "forest",
        "data": {"name": "a9a"},
        "forest": {"trees": 10, "tree": tree},
    }
    result = alone.submit(document).wait(timeout_s=120)
    model = alone.models.get(result.model)
    reader_rows = features.astype(np.float32).toarray()
    expected = RandomForestClassifier(10, random_state=0, n_jobs=1, **tree)
    expected.fit(reader_rows, targets)
    assert_equal_trees(model, expected.estimators_)
    found = model.predict_probabilities(scipy.sparse.csr_array(features))
    np.testing.assert_array_equal(found, expected.predict_proba(reader_rows))


@pytest.mark.soak
def test_what_forests_reach_on_a9a(alone: phalanx.Cluster) -> None:
    folder = shared_data("a9a")
    alone.data.add(
        "a9a",
        str(folder / "a9a"),
        test=str(folder / "a9a.t"),
        feature_count=123,
        format="libsvm",
    )
    tree = {"max_depth": 20, "min_samples_leaf": 2}
    for name, trees, per_shard in (("whole", 100, False), ("shards", 96, True)):
        document = {
            "name": name,
            "data": {"name": "a9a", "shards": 8},
            "forest": {"trees": trees, "tree": tree, "per_shard": per_shard},
        }
        grown = alone.submit(document).wait(timeout_s=300).metrics
        document = {"name": "test", "data": {"name": "a9a"}, "evaluate": {"model": name}}
        found = alone.submit(document).wait(timeout_s=300).metrics
        print(f"{name}: test {dict(found)}, out of bag {grown['oob/accuracy']:.4f}")
        assert found["test/accuracy"] > 0.845
