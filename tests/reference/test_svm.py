"""The linear SVM on a9a against liblinear: by gradient, and with the rate of Pegasos."""

from typing import Any

import numpy as np
import pytest

from phalanx.testing.plans import plan_for
from phalanx.training.local import TrainedModel, train_in_process
from tests.reference.a9a import A9aMargins, margins_of_a9a, optimum


@pytest.fixture(scope="module")
def a9a(tmp_path_factory: pytest.TempPathFactory) -> A9aMargins:
    return margins_of_a9a(tmp_path_factory.mktemp("a9a"))


def train(a9a: A9aMargins, shards: int, **train: Any) -> TrainedModel:
    program = {"dtype": "float64", "model": {"linear_svm": {"bias": False}}, **train}
    plan = plan_for(a9a.stored, program, data={"name": "data", "shards": shards})
    return train_in_process(plan, a9a.stored.manifest, a9a.stored.fetch)


def test_pegasos_comes_within_a_thousandth_of_liblinear(a9a: A9aMargins) -> None:
    """λ = 1e-2, 4 shards of 256 rows, 1,000 iterations; the last one counts, not their mean."""
    l2 = 1e-2
    trained = train(a9a, 4, optimizer={"pegasos": {}}, l2=l2, batch_size=1024, stop={"steps": 1000})
    best, found = optimum(a9a, l2), a9a.primal(trained.parameters, l2)
    print(f"P - P* = {found - best:.2e}, P* = {best:.8f}")
    assert best - 1e-9 < found < best + 1e-3
    assert a9a.accuracy(trained.parameters) > 0.84


def test_the_squared_hinge_comes_to_the_optimum_of_liblinear(a9a: A9aMargins) -> None:
    """It is smooth: Nesterov's method with the constants of the problem."""
    l2 = 1e-2
    gram = (a9a.features.T @ a9a.features).toarray()
    smoothness = float(2 * np.linalg.eigvalsh(gram)[-1] / len(a9a.signs) + l2)
    root = float(np.sqrt(l2 / smoothness))
    sgd = {"learning_rate": 1 / smoothness, "momentum": (1 - root) / (1 + root), "nesterov": True}
    model = {"linear_svm": {"bias": False, "loss": "squared_hinge"}}
    trained = train(a9a, 4, model=model, optimizer={"sgd": sgd}, l2=l2, stop={"steps": 300})
    best = optimum(a9a, l2, squared=True)
    found = a9a.primal(trained.parameters, l2, squared=True)
    print(f"P - P* = {found - best:.2e}, P* = {best:.8f}")
    assert best - 1e-9 < found < best + 1e-6
