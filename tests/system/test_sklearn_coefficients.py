"""Coefficients and weights of classes of estimators, against those of scikit-learn."""

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from phalanx.sklearn import PhalanxClassifier, PhalanxLinearSVC, PhalanxRegressor

pytestmark = pytest.mark.slow

L2 = 0.01
BALANCES = [None, "balanced", {"setosa": 3.0, "versicolor": 0.25}]


def flowers(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Irises, fewer of each class than of the one before, with columns in units of their own."""
    data = load_iris()
    rows = np.concatenate([np.flatnonzero(data.target == k)[: 50 - 15 * k] for k in range(classes)])
    features = data.data[rows] * [1, 10, 100, 1] + [0, 5, 1000, -3]
    return features, data.target_names[data.target[rows]]


def to_the_optimum(features: np.ndarray, **settings: Any) -> PhalanxClassifier:
    """A softmax regression by all rows at once, as far as it gets."""
    return PhalanxClassifier(
        optimizer={"sgd": {"learning_rate": 1.0, "momentum": 0.9}},
        batch_size=len(features),
        epochs=1500,
        l2=L2,
        **settings,
    )


@pytest.mark.parametrize("balance", BALANCES, ids=["plain", "balanced", "given"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_softmax_regression_has_the_coefficients_of_scikit_learn(
    classes: int, balance: Any
) -> None:
    features, labels = flowers(classes)
    ours = to_the_optimum(features, class_weight=balance).fit(features, labels)
    scaler = StandardScaler().fit(features)
    strength = (2 if classes == 2 else 1) / (L2 * len(features))
    theirs = LogisticRegression(C=strength, class_weight=balance, tol=1e-12, max_iter=10_000)
    theirs.fit(scaler.transform(features), labels)
    # Theirs are of standardised columns; the same in those of the rows.
    weights = theirs.coef_ / scaler.scale_
    intercept = theirs.intercept_ - weights @ scaler.mean_
    assert (ours.coef_.shape, ours.intercept_.shape) == (weights.shape, intercept.shape)
    np.testing.assert_allclose(ours.coef_ * scaler.scale_, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(ours.intercept_, intercept, rtol=1e-4)
    assert ours.n_iter_ == 1500
    scores = features @ ours.coef_.T + ours.intercept_
    named = scores[:, 0] > 0 if classes == 2 else scores.argmax(axis=1)
    np.testing.assert_array_equal(ours.classes_[named.astype(int)], ours.predict(features))


def test_a_linear_regression_has_the_coefficients_of_scikit_learn() -> None:
    features, targets = load_diabetes(return_X_y=True, scaled=False)
    ours = PhalanxRegressor().fit(features, targets)
    theirs = LinearRegression().fit(features, targets)
    assert ours.coef_.shape == theirs.coef_.shape
    assert np.shape(ours.intercept_) == np.shape(theirs.intercept_) == ()
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8)


@pytest.mark.parametrize("algorithm", ["gradient", "cocoa"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_linear_machine_decides_by_its_coefficients(algorithm: str, sparse: bool) -> None:
    features, labels = flowers(2)
    rows = csr_array(features / 100) if sparse else features
    ours = PhalanxLinearSVC(algorithm=algorithm, l2=L2).fit(rows, labels)
    theirs = LinearSVC().fit(rows, labels)
    assert (ours.coef_.shape, ours.intercept_.shape) == (
        theirs.coef_.shape,
        theirs.intercept_.shape,
    )
    np.testing.assert_allclose(
        (rows @ ours.coef_.T + ours.intercept_)[:, 0], ours.decision_function(rows), atol=1e-9
    )
    # Only columns that are centred have a constant to take back where there is no bias.
    assert (ours.intercept_ == 0).all() == (sparse and algorithm == "cocoa")


@pytest.mark.parametrize("balance", ["balanced", {"versicolor": 20.0}], ids=["balanced", "given"])
def test_a_linear_machine_weighs_classes_as_scikit_learn_does(balance: Any) -> None:
    generator = np.random.default_rng(5)
    labels = np.repeat(["setosa", "versicolor"], [300, 40])
    features = generator.normal(size=(340, 3)) + (labels == "versicolor")[:, None]
    features = StandardScaler().fit_transform(features)
    ours = PhalanxLinearSVC(l2=L2, steps=200, class_weight=balance).fit(features, labels)
    plain = PhalanxLinearSVC(l2=L2, steps=200).fit(features, labels)
    # As good as no penalty of the intercept, which ours has not.
    theirs = LinearSVC(
        C=1 / (L2 * 340), class_weight=balance, intercept_scaling=1e3, tol=1e-8, max_iter=100_000
    ).fit(features, labels)
    weighed = np.append(ours.coef_, ours.intercept_)
    expected = np.append(theirs.coef_, theirs.intercept_)
    assert np.abs(weighed - expected).max() < 0.1
    assert np.abs(np.append(plain.coef_, plain.intercept_) - expected).max() > 0.3


def test_weights_of_classes_that_cannot_be_are_told() -> None:
    features, labels = flowers(2)
    wrong: list[tuple[Any, str]] = [
        ({"setosa": -1.0}, "class_weight of setosa must be a number of at least 0, not -1"),
        ({"setosa": float("nan")}, "class_weight of setosa .* not nan"),
        ({"setosa": 0, "versicolor": 0}, "no row would count"),
        ({"rosa": 1.0}, "not in class_weight"),
        ("equal", "class_weight"),
    ]
    for balance, message in wrong:
        with pytest.raises(ValueError, match=message):
            PhalanxClassifier(class_weight=balance).fit(features, labels)
    with pytest.raises(ValueError, match='goes with algorithm="gradient" only'):
        PhalanxLinearSVC(algorithm="cocoa", class_weight="balanced").fit(features, labels)


def test_coefficients_choose_columns() -> None:
    features, targets = load_diabetes(return_X_y=True)
    for kind in (SelectFromModel, RFE):
        ours = kind(PhalanxRegressor()).fit(features, targets)
        theirs = kind(LinearRegression()).fit(features, targets)
        np.testing.assert_array_equal(ours.get_support(), theirs.get_support())
    rows, labels = flowers(3)
    chosen = make_pipeline(StandardScaler(), RFE(PhalanxClassifier(), n_features_to_select=2))
    assert chosen.fit(rows, labels).score(rows, labels) > 0.8


def test_networks_have_no_coefficients() -> None:
    features, labels = flowers(2)
    fitted = PhalanxClassifier(3, epochs=1).fit(features, labels)
    assert not hasattr(fitted, "coef_")
    with pytest.raises(AttributeError, match="has intercept_ without hidden layers only"):
        _ = fitted.intercept_
    for kind in (PhalanxClassifier, PhalanxRegressor, PhalanxLinearSVC):
        with pytest.raises(NotFittedError):
            _ = kind().coef_
