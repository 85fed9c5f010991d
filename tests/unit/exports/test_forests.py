"""Forests elsewhere: the very trees, and what they predict."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

import phalanx
from phalanx.data.predict import LoadedModel
from phalanx.exports.onnx_files import onnx_bytes
from tests.unit.exports.conversions import ROWS, rows_of

TREE = {"max_depth": 4, "min_samples_leaf": 2, "criterion": "entropy", "splitter": "random"}


@pytest.fixture(scope="module")
def forests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LoadedModel]]:
    """A forest for each task, on rows of ``float32``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHALANX_CACHE", os.fspath(tmp_path_factory.mktemp("cache")))
        yield _grown()


def _grown() -> dict[str, LoadedModel]:
    rows = rows_of("dense", "float32")
    numbers = rows[:, 0] * 3 + rows[:, 1]
    # One class in so few rows that trees are grown without it.
    labels = np.where(np.arange(ROWS) < 2, "rare", np.where(numbers > 12, "high", "low"))
    found = {}
    with phalanx.LocalCluster(workers=0) as cluster:
        for task, targets, tree in (
            ("classification", labels, TREE),
            ("regression", numbers, {"max_features": 0.5}),
        ):
            cluster.data.add(task, rows, targets, task=task)
            job = cluster.submit(
                {
                    "name": task,
                    "data": {"name": task, "shards": 2},
                    "seed": 9,
                    "forest": {"trees": 6, "tree": tree},
                }
            )
            job.wait(60)
            found[task] = cluster.models.get(task)
    return found


def test_a_forest_of_classes_has_the_same_trees(forests: dict[str, LoadedModel]) -> None:
    model, rows = forests["classification"], rows_of("dense", "float32")
    forest = model.to_sklearn()
    assert type(forest) is RandomForestClassifier
    assert forest.classes_.tolist() == ["high", "low", "rare"]
    assert (len(forest), forest.max_depth, forest.criterion) == (6, 4, "entropy")
    np.testing.assert_array_equal(forest.predict(rows), model.predict(rows))
    np.testing.assert_array_equal(forest.predict_proba(rows), model.predict_probabilities(rows))
    ours = list(model.feature_importances().values())
    np.testing.assert_allclose(forest.feature_importances_, ours, rtol=0, atol=1e-15)
    assert max(tree.get_depth() for tree in forest) <= 4
    assert forest.get_params()["random_state"] == 9


def test_a_forest_of_numbers_has_the_same_trees(forests: dict[str, LoadedModel]) -> None:
    model, rows = forests["regression"], rows_of("dense", "float32")
    forest = model.to_sklearn()
    reference = RandomForestRegressor(6, max_features=0.5, random_state=9)
    reference.fit(rows, rows[:, 0] * 3 + rows[:, 1])
    np.testing.assert_array_equal(forest.predict(rows), model.predict(rows))
    for ours, theirs in zip(forest, reference, strict=True):
        assert ours.tree_.max_depth == theirs.tree_.max_depth
        mine, other = (each.tree_.__getstate__() for each in (ours, theirs))
        np.testing.assert_array_equal(mine["values"], other["values"])
        for field in mine["nodes"].dtype.names:
            if field != "missing_go_to_left":
                np.testing.assert_array_equal(mine["nodes"][field], other["nodes"][field])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_runtime_computes_what_a_forest_predicts(
    forests: dict[str, LoadedModel], task: str
) -> None:
    pytest.importorskip("skl2onnx", reason="no converter for this Python")
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")
    model, rows = forests[task], rows_of("dense", "float32")
    session = runtime.InferenceSession(onnx_bytes(model), providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, {"features": rows})
    if task == "classification":
        assert outputs[0].tolist() == model.predict(rows).tolist()
        expected = model.predict_probabilities(rows)
        np.testing.assert_allclose(outputs[1], expected, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(outputs[0][:, 0], model.predict(rows), rtol=1e-6)
