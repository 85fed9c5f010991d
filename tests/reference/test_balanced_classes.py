"""Balance of classes: scikit-learn's optimum with class weights, and rows written twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from phalanx.models import DataSchema, build_model
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec

L2 = 1e-2
ROWS = 1200


def unequal(classes: int) -> tuple[Any, Any]:
    """Overlapping clouds; each class has a third of the rows of the one before."""
    features, targets = classification(ROWS * 3, 6, classes, seed=3)
    kept = [np.flatnonzero(targets == label)[: ROWS // 3**label // 2] for label in range(classes)]
    rows = np.concatenate(kept)
    return features[rows].astype(np.float64) / 3, targets[rows]


def train(
    stored: StoredDataset, kind: str, data: dict[str, Any], steps: int = 1500
) -> TrainedModel:
    plan = plan_for(
        stored,
        {
            "model": {kind: {"bias": False}, "standardise": False},
            "optimizer": {"sgd": {"learning_rate": 1.0}},
            "stop": {"steps": steps},
            "dtype": "float64",
            "l2": L2,
        },
        data={"name": "data", "shards": 3, **data},
    )
    return train_in_process(plan, stored.manifest, stored.fetch)


@pytest.mark.parametrize(
    ("kind", "classes", "weights"),
    [
        ("logistic_regression", 2, None),
        ("softmax_regression", 3, None),
        ("softmax_regression", 3, {1: 2.5, 2: 0.5}),
    ],
)
def test_class_weights_reach_the_optimum_of_scikit_learn(
    tmp_path: Path, kind: str, classes: int, weights: dict[int, float] | None
) -> None:
    features, targets = unequal(classes)
    stored = store(tmp_path, features, targets, dtype="float64")
    asked = {"weights": {str(label): weight for label, weight in (weights or {}).items()}}
    trained = train(stored, kind, {"class_weights": asked})
    solver = LogisticRegression(
        C=1 / (L2 * len(targets)),
        class_weight=weights or "balanced",
        fit_intercept=False,
        tol=1e-12,
        max_iter=10_000,
    ).fit(features, targets)
    expected = solver.coef_[0] if classes == 2 else solver.coef_.T.ravel()
    np.testing.assert_allclose(trained.parameters, expected, atol=1e-6)


def test_oversampling_is_writing_the_rows_again(tmp_path: Path) -> None:
    """600, 200 and 66 rows: the second class comes three times, the third nine times and a bit."""
    features, targets = unequal(3)
    sizes = np.bincount(targets)
    again = [np.resize(np.flatnonzero(targets == label), sizes.max()) for label in range(3)]
    rows = np.concatenate(again)
    stored = store(tmp_path / "once", features, targets, dtype="float64")
    written = store(tmp_path / "again", features[rows], targets[rows], dtype="float64")
    asked = train(stored, "softmax_regression", {"oversample": {}}, steps=50)
    plain = train(written, "softmax_regression", {}, steps=50)
    np.testing.assert_allclose(asked.parameters, plain.parameters, rtol=0, atol=1e-12)


def test_small_classes_are_found(tmp_path: Path) -> None:
    features, targets = unequal(3)
    stored = store(tmp_path, features, targets, dtype="float64")
    spec = JobSpec(train={"model": {"softmax_regression": {"bias": False}}})
    model = build_model(spec, DataSchema(6, 3, "float64"))
    scores = {}
    for name in ("none", "class_weights", "oversample"):
        trained = train(stored, "softmax_regression", {} if name == "none" else {name: {}}, 400)
        predicted = model.predict(trained.parameters, features).argmax(axis=1)
        scores[name] = balanced_accuracy_score(targets, predicted)
    assert scores["class_weights"] > scores["none"] + 0.03, scores
    assert scores["oversample"] > scores["none"] + 0.03, scores
