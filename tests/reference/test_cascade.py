"""Cascades reach libsvm's optimum, and decide as scikit-learn's machine does."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import scipy.sparse
from sklearn.datasets import load_svmlight_file
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import phalanx
from phalanx.cascades.machine import solve
from phalanx.cascades.model import KernelMachine
from phalanx.data.predict import LoadedModel
from phalanx.errors import InvalidArgument
from phalanx.exports.onnx_files import load_for_graph
from phalanx.sdk.values import Result
from phalanx.testing.datasets import classification, shared_data


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        yield cluster


def solved(
    cluster: phalanx.Cluster, rows: tuple[Any, Any], shards: int = 4, **cascade: Any
) -> tuple[LoadedModel, Result]:
    cluster.data.add("data", *rows)
    document = {
        "name": "machine",
        "data": {"name": "data", "shards": shards, **cascade.pop("data", {})},
        "cascade": {"c": 1, "gamma": 0.1, "standardise": False, "passes": 4, **cascade},
    }
    result = cluster.submit(document).wait(timeout_s=300)
    return cluster.models.get(result.model), result


def dual_of(machine: SVC, features: Any, gamma: float) -> float:
    """The dual objective of two classes, apart from the code under test."""
    vectors, signed = features[machine.support_], machine.dual_coef_[0]
    return float(np.abs(signed).sum() - signed @ rbf_kernel(vectors, gamma=gamma) @ signed / 2)


@pytest.mark.parametrize(("shards", "sparse"), [(1, False), (3, False), (4, True)])
def test_two_classes_are_decided_as_by_libsvm_on_all_rows(
    alone: phalanx.Cluster, shards: int, sparse: bool
) -> None:
    features, targets = classification(rows=400, classes=2)
    rows: Any = features
    if sparse:
        features = np.where(features > 0.3, features, 0)
        rows = scipy.sparse.csr_array(features)
    model, result = solved(alone, (rows, targets), shards, gap_at_most=1e-9)
    expected = SVC(C=1, gamma=0.1).fit(features.astype(np.float64), targets)
    wanted = dual_of(expected, features.astype(np.float64), 0.1)
    assert result.metrics["cascade/dual"] == pytest.approx(wanted, rel=1e-5)
    values = model.predict_decision_values(rows)
    known = expected.decision_function(features.astype(np.float64))
    if shards == 1:
        np.testing.assert_allclose(values, known, rtol=0, atol=1e-9)
        assert result.metrics["cascade/passes"] == 1
        assert result.metrics["cascade/support_vectors"] == len(expected.support_)
    # libsvm ends within 1e-3 of the optimum.
    np.testing.assert_allclose(values, known, rtol=0, atol=5e-3)


@pytest.mark.parametrize("shards", [1, 3])
def test_more_classes_are_told_apart_pair_by_pair(alone: phalanx.Cluster, shards: int) -> None:
    features, targets = classification(rows=500, classes=5)
    model, result = solved(alone, (features, targets), shards)
    machine = SVC(C=1, gamma=0.1, decision_function_shape="ovo")
    expected = machine.fit(features.astype(np.float64), targets)
    kernel_machine = model.model
    assert isinstance(kernel_machine, KernelMachine)
    values = kernel_machine.decision_values(model.parameters, features.astype(np.float64))
    known = expected.decision_function(features.astype(np.float64))
    tolerance = 1e-9 if shards == 1 else 5e-3
    np.testing.assert_allclose(values, known, rtol=0, atol=tolerance)
    shares = model.predict_probabilities(features)
    assert shares.shape == (500, 5)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    if shards == 1:
        np.testing.assert_array_equal(model.predict(features), expected.predict(features))
    assert result.metrics["cascade/dual"] > 0


def test_rows_are_scaled_by_the_statistics_of_the_split(alone: phalanx.Cluster) -> None:
    features, targets = classification(rows=300, classes=2)
    features = features * 7 + 3
    model, _ = solved(alone, (features, targets), 1, standardise=True)
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    expected = SVC(C=1, gamma=0.1).fit(scaled, targets)
    values = model.predict_decision_values(features)
    np.testing.assert_allclose(values, expected.decision_function(scaled), rtol=0, atol=1e-9)


def test_shards_of_one_class_pass_all_of_their_rows_on(alone: phalanx.Cluster) -> None:
    features, targets = classification(rows=300, classes=2)
    order = np.argsort(targets, kind="stable")
    model, _ = solved(alone, (features[order], targets[order]), 4)
    expected = SVC(C=1, gamma=0.1).fit(features.astype(np.float64), targets)
    values = model.predict_decision_values(features)
    known = expected.decision_function(features.astype(np.float64))
    np.testing.assert_allclose(values, known, rtol=0, atol=5e-3)


def test_passes_end_once_the_objective_stands_still(alone: phalanx.Cluster) -> None:
    data = classification(rows=400, classes=2)
    _, ended = solved(alone, data, 2, gap_at_most=1e-2, passes=6)
    _, first = solved(alone, data, 2, passes=1)
    assert 2 <= ended.metrics["cascade/passes"] < 6
    assert ended.metrics["cascade/change"] <= 1e-2
    assert first.metrics["cascade/passes"] == 1
    assert "cascade/change" not in first.metrics
    # All passes have their tasks; those after the last pass its machine on.
    assert ended.steps == 6 * 3 + 3


def test_a_machine_is_evaluated_and_predicts_files(alone: phalanx.Cluster, tmp_path: Path) -> None:
    features, targets = classification(rows=400, classes=2)
    words = np.array(["no", "yes"])[targets]
    model, _ = solved(alone, (features, words), data={"rows": {"stratified": True}})
    metrics = ["accuracy", "auc", "log_loss"]
    document = {
        "name": "score",
        "data": {"name": "data", "split": "train", "shards": 3},
        "evaluate": {"model": "machine", "metrics": metrics},
    }
    found = alone.submit(document).wait(timeout_s=60).metrics
    values = model.predict_decision_values(features)
    assert found["train/accuracy"] == np.mean((values > 0) == targets)
    assert found["train/auc"] == pytest.approx(roc_auc_score(targets, values), rel=1e-12)
    assert "train/log_loss" not in found
    document = {
        "name": "rows",
        "data": {"name": "data", "split": "train"},
        "predict": {"model": "machine"},
    }
    job = alone.submit(document)
    job.wait(timeout_s=60)
    job.save(tmp_path / "out.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["prediction"].to_pylist() == np.where(values > 0, "yes", "no").tolist()
    assert table["decision value"].to_pylist() == values.tolist()


@pytest.mark.parametrize(("classes", "sparse"), [(2, False), (2, True), (4, False), (4, True)])
def test_a_machine_leaves_as_an_object_of_scikit_learn(
    alone: phalanx.Cluster, tmp_path: Path, classes: int, sparse: bool
) -> None:
    features, targets = classification(rows=300, classes=classes)
    rows: Any = (
        scipy.sparse.csr_array(np.where(features > 0.3, features, 0)) if sparse else features
    )
    labels = np.array(["ash", "birch", "cedar", "elm"])[targets]
    model, _ = solved(alone, (rows, labels), 2, standardise=True)
    estimator = model.to_sklearn()
    prepared = model.prepare(rows)
    np.testing.assert_array_equal(estimator.predict(prepared), model.predict(rows))
    assert estimator.classes_.tolist() == model.classes.tolist()
    if classes == 2:
        found = estimator.decision_function(prepared)
        np.testing.assert_allclose(found, model.predict_decision_values(rows), rtol=0, atol=1e-9)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.predict(prepared), model.predict(rows))
    alone.models.download("machine", tmp_path / "model")
    with pytest.raises(InvalidArgument, match="ONNX computes a cascade otherwise"):
        load_for_graph(tmp_path / "model")


def test_rows_of_one_class_have_no_machine() -> None:
    features, _ = classification(rows=40, classes=2)
    assert solve(features.astype(np.float64), np.ones(40, np.int64), 1, 0.1) is None
    assert solve(features[:0].astype(np.float64), np.ones(0, np.int64), 1, 0.1) is None


@pytest.mark.slow
def test_a_cascade_on_a9a_reaches_the_optimum_of_libsvm_by_its_third_pass(
    alone: phalanx.Cluster,
) -> None:
    rows, labels = load_svmlight_file(
        str(shared_data("a9a") / "a9a"), n_features=123, dtype=np.float64
    )
    features = np.ascontiguousarray(rows[:6000].toarray())
    targets = (labels[:6000] > 0).astype(int)
    _, result = solved(alone, (features, targets), 4, gamma=0.05, passes=3, gap_at_most=1e-15)
    expected = SVC(C=1, gamma=0.05).fit(features, targets)
    wanted = dual_of(expected, features, 0.05)
    found = result.metrics["cascade/dual"]
    print(f"libsvm {wanted:.6f}, cascade {found:.6f}, {abs(found - wanted) / wanted:.2e} apart")
    assert result.metrics["cascade/passes"] == 3
    assert abs(found - wanted) <= 1e-6 * wanted
