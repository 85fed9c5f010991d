"""Estimators in the hands of scikit-learn: its own checks, its tools, and every kind of cluster."""

import pickle
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_diabetes, load_digits
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

import phalanx
import phalanx.sklearn

pytestmark = pytest.mark.slow

ESTIMATORS = [getattr(phalanx.sklearn, name) for name in phalanx.sklearn.__all__]


@pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_has_no_objection(kind: Any) -> None:
    # Its checks fit hundreds of times.
    quick = {"n_estimators": 5, "epochs": 30, "steps": 30}
    chosen = {name: value for name, value in quick.items() if name in kind().get_params()}
    checks = check_estimator(kind(**chosen), on_skip=None, on_fail=None)
    assert len(checks) > 40
    assert [each["check_name"] for each in checks if each["status"] == "failed"] == []


def digits(rows: int = 600) -> tuple[np.ndarray, np.ndarray]:
    features, targets = load_digits(return_X_y=True)
    return features[:rows] / 16, np.array([f"digit {each}" for each in targets[:rows]])


def test_it_fits_alike_in_this_process_and_on_clusters() -> None:
    features, labels = digits()
    alone = phalanx.sklearn.PhalanxClassifier((24,), epochs=5, seed=3).fit(features, labels)
    own = clone(alone).set_params(workers=2).fit(features, labels)
    with phalanx.LocalCluster(workers=2) as cluster:
        there = clone(alone).set_params(cluster=cluster.address).fit(features, labels)
        held = phalanx.sklearn.PhalanxClassifier((24,), epochs=5, seed=3, cluster=cluster)
        held.fit(features, labels)
        assert cluster.jobs() == []
        assert cluster.models.list() == []
        assert cluster.data.list() == []
    hashes = {each.parameters_sha256_ for each in (alone, own, there, held)}
    assert len(hashes) == 1
    np.testing.assert_array_equal(own.predict_proba(features), alone.predict_proba(features))
    assert set(alone.predict(features)) <= set(labels)
    assert alone.score(features, labels) > 0.5


def test_its_linear_regression_is_that_of_scikit_learn() -> None:
    features, targets = load_diabetes(return_X_y=True)
    ours = phalanx.sklearn.PhalanxRegressor().fit(features, targets)
    reference = LinearRegression().fit(features, targets)
    np.testing.assert_allclose(ours.predict(features), reference.predict(features), rtol=1e-9)


def test_its_forest_is_that_of_scikit_learn() -> None:
    features, labels = digits(400)
    ours = phalanx.sklearn.PhalanxForestClassifier(8, seed=5).fit(features, labels)
    reference = RandomForestClassifier(8, random_state=5).fit(features, labels)
    np.testing.assert_array_equal(ours.predict_proba(features), reference.predict_proba(features))
    there = clone(ours).set_params(workers=2).fit(features, labels)
    assert there.parameters_sha256_ == ours.parameters_sha256_


def test_a_part_of_one_means_all_features_as_in_scikit_learn() -> None:
    features, targets = load_diabetes(return_X_y=True)
    kind = phalanx.sklearn.PhalanxForestRegressor
    found = kind(5, tree={"max_features": 1.0}).fit(features, targets)
    theirs = RandomForestRegressor(5, max_features=1.0, random_state=0).fit(features, targets)
    np.testing.assert_array_equal(found.predict(features), theirs.predict(features))


def test_the_importances_of_a_forest_choose_features() -> None:
    features, targets = load_diabetes(return_X_y=True)
    found = phalanx.sklearn.PhalanxForestRegressor(5)
    with pytest.raises(NotFittedError):
        _ = found.feature_importances_
    chosen = SelectFromModel(found).fit(features, targets)
    assert not hasattr(chosen.estimator_, "n_iter_")  # tasks are no iterations
    theirs = SelectFromModel(RandomForestRegressor(5, random_state=0)).fit(features, targets)
    np.testing.assert_array_equal(
        chosen.estimator_.feature_importances_, theirs.estimator_.feature_importances_
    )
    np.testing.assert_array_equal(chosen.get_support(), theirs.get_support())


def test_settings_may_be_numbers_and_arrays_of_numpy() -> None:
    """Searches draw them, as from `np.arange` and from distributions."""
    features, targets = load_diabetes(return_X_y=True)
    kind = phalanx.sklearn.PhalanxRegressor
    plain = kind((4, 3), epochs=2, seed=3, l2=0.5).fit(features, targets)
    drawn = kind(np.array([4, 3]), epochs=np.int64(2), seed=np.int64(3), l2=np.float32(0.5))
    assert drawn.fit(features, targets).parameters_sha256_ == plain.parameters_sha256_
    one = kind(4, epochs=2).fit(features, targets)
    listed = kind([4], epochs=2).fit(features, targets)
    assert one.parameters_sha256_ == listed.parameters_sha256_
    grown = phalanx.sklearn.PhalanxForestRegressor(
        np.int64(2), tree={"max_depth": np.int64(2), "min_samples_leaf": np.float64(0.1)}
    )
    assert grown.fit(features, targets).score(features, targets) > 0


def test_its_linear_machine_reaches_the_optimum_of_liblinear() -> None:
    features, labels = digits(500)
    features, labels = features - features.mean(axis=0), labels > "digit 4"
    # Without a loss it takes the one that cocoa solves.
    ours = phalanx.sklearn.PhalanxLinearSVC(algorithm="cocoa", l2=0.01)
    ours.fit(features, labels)
    reference = LinearSVC(
        C=1 / (0.01 * len(labels)), loss="hinge", fit_intercept=False, tol=1e-8, max_iter=100_000
    ).fit(ours_scaled := _standardised(features), labels)
    weights = reference.coef_[0]
    assert ours.metrics_["train/duality_gap"] <= 1e-3
    assert _objective(ours.model_.parameters, ours_scaled, labels) <= 1e-3 + _objective(
        weights, ours_scaled, labels
    )
    assert ours.predict(features).tolist() == (ours.decision_function(features) > 0).tolist()
    squared, usual = (
        phalanx.sklearn.PhalanxLinearSVC(loss=loss, steps=2).fit(features, labels)
        for loss in ("squared_hinge", None)
    )
    assert usual.parameters_sha256_ == squared.parameters_sha256_
    with pytest.raises(ValueError, match="Only binary classification"):
        phalanx.sklearn.PhalanxLinearSVC().fit(*digits(100))


def _standardised(features: np.ndarray) -> np.ndarray:
    """Rows as the job sees them: constant columns are left as they are."""
    deviation = features.std(axis=0)
    return features / np.where(deviation > 0, deviation, 1)


def _objective(weights: np.ndarray, features: np.ndarray, labels: np.ndarray) -> float:
    margins = 1 - np.where(labels, 1, -1) * (features @ weights)
    return float(np.maximum(margins, 0).mean() + 0.005 * weights @ weights)


def test_it_works_in_pipelines_searches_and_pickles() -> None:
    features, labels = digits(300)
    pipeline = make_pipeline(MinMaxScaler(), phalanx.sklearn.PhalanxClassifier(epochs=20))
    assert cross_val_score(pipeline, features, labels, cv=3).mean() > 0.8
    search = GridSearchCV(phalanx.sklearn.PhalanxClassifier(epochs=10), {"l2": [0.0, 10.0]}, cv=2)
    search.fit(features, labels)
    assert search.best_params_ == {"l2": 0.0}
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(features), search.predict(features))


@pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)
def test_a_fitted_one_becomes_an_object_of_scikit_learns_own(kind: Any) -> None:
    if is_classifier(kind()):
        features, labels = digits(300)
        few = np.isin(labels, ["digit 3", "digit 8"])
        features, labels = features[few], labels[few]
    else:
        features, labels = load_diabetes(return_X_y=True)
    ours = kind().fit(features, labels)
    theirs = ours.to_sklearn()
    np.testing.assert_allclose(
        *(_numbers(each, features) for each in (theirs, ours)), rtol=1e-12, atol=1e-12
    )
    if is_classifier(ours):
        assert theirs.classes_.tolist() == ["digit 3", "digit 8"]
        np.testing.assert_array_equal(theirs.predict(features), ours.predict(features))
    with pytest.raises(NotFittedError):
        clone(ours).to_sklearn()


def _numbers(estimator: Any, features: np.ndarray) -> np.ndarray:
    """What an estimator computes for rows before there are labels."""
    names = ("predict_proba", "decision_function", "predict")
    function = next(getattr(estimator, name) for name in names if hasattr(estimator, name))
    return np.asarray(function(features))


def test_a_job_that_cannot_be_is_told_and_leaves_nothing() -> None:
    features, labels = digits(100)
    with phalanx.LocalCluster(workers=1) as cluster:
        wrong = phalanx.sklearn.PhalanxClassifier(
            optimizer={"sgd": {"learning_rate": -1}}, cluster=cluster
        )
        with pytest.raises(phalanx.PhalanxError, match="learning_rate"):
            wrong.fit(features, labels)
        assert cluster.data.list() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_that_is_given_up_leaves_nothing(workers: int) -> None:
    features, labels = digits(100)
    with phalanx.LocalCluster(workers=workers) as cluster:
        endless = phalanx.sklearn.PhalanxClassifier(epochs=1e6, timeout_s=0.5, cluster=cluster)
        with pytest.raises(phalanx.PhalanxError, match="is still"):
            endless.fit(features, labels)
        assert cluster.jobs() == []
        assert cluster.data.list() == []
        assert cluster.models.list() == []


def test_tools_copy_estimators_that_hold_a_cluster() -> None:
    features, labels = digits(120)
    with phalanx.LocalCluster(workers=0) as cluster:
        held = phalanx.sklearn.PhalanxClassifier(epochs=2, cluster=cluster)
        assert clone(held).cluster is cluster
        assert len(cross_val_score(held, features, labels, cv=2)) == 2
        assert cluster.data.list() == []
