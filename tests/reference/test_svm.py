"""The linear SVM on a9a against liblinear: by gradient, Pegasos, and CoCoA+ on its dual."""

import itertools
from typing import Any

import numpy as np
import pytest

from phalanx.testing.plans import plan_for
from phalanx.training.local import Progress, TrainedModel, train_in_process
from tests.reference.a9a import A9aMargins, margins_of_a9a, optimum


@pytest.fixture(scope="module")
def a9a(tmp_path_factory: pytest.TempPathFactory) -> A9aMargins:
    return margins_of_a9a(tmp_path_factory.mktemp("a9a"))


def train(a9a: A9aMargins, shards: int, note: Any = None, **train: Any) -> TrainedModel:
    program = {"dtype": "float64", "model": {"linear_svm": {"bias": False}}, **train}
    plan = plan_for(a9a.stored, program, data={"name": "data", "shards": shards})
    return train_in_process(plan, a9a.stored.manifest, a9a.stored.fetch, on_progress=note)


@pytest.mark.parametrize("project", [False, True])
def test_pegasos_comes_within_a_thousandth_of_liblinear(a9a: A9aMargins, project: bool) -> None:
    """λ = 1e-2, 4 shards of 256 rows, 500 iterations; the last one counts, not their mean."""
    l2 = 1e-2
    trained = train(
        a9a,
        4,
        optimizer={"pegasos": {"project": project}},
        l2=l2,
        batch_size=1024,
        stop={"steps": 500},
    )
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


L2, SHARDS = 1e-3, 8


def rounds_of(
    a9a: A9aMargins, stop: dict[str, Any], **cocoa: Any
) -> tuple[TrainedModel, list[dict[str, float]]]:
    """The model, and the metrics after each round."""
    rounds: dict[int, dict[str, float]] = {}

    def note(progress: Progress) -> None:
        # A round is told of before its evaluation, too; the last word counts.
        rounds[progress.step] = progress.metrics

    evaluation = {"split": "train", "every_steps": 1}
    trained = train(
        a9a, SHARDS, note, optimizer={"cocoa": cocoa}, l2=L2, stop=stop, evaluation=evaluation
    )
    assert sorted(rounds) == list(range(1, trained.steps + 1))
    return trained, [rounds[step] for step in sorted(rounds)]


@pytest.mark.parametrize(
    ("passes", "gap"),
    [
        (2, 6e-3),
        pytest.param(1, 2e-3, marks=pytest.mark.soak),
        pytest.param(10, 2e-3, marks=pytest.mark.soak),
    ],
)
def test_cocoa_comes_within_a_thousandth_of_liblinear(
    a9a: A9aMargins, passes: int, gap: float
) -> None:
    """It ends by what it knows itself, the duality gap, and is nearer to the optimum than that."""
    stop = {"steps": 100, "thresholds": [{"metric": "train/duality_gap", "at_most": gap}]}
    trained, rounds = rounds_of(a9a, stop, local_passes=passes)
    best, found = optimum(a9a, L2), a9a.primal(trained.parameters, L2)
    gaps = [each["train/duality_gap"] for each in rounds]
    print(f"{len(rounds)} rounds, P - P* = {found - best:.2e}, gap {gaps[-1]:.2e}, P* = {best:.8f}")
    assert trained.reason == "STOP_THRESHOLD"
    assert gaps[-1] <= gap < min(gaps[:-1])
    assert best - 1e-9 < found < best + 1e-3
    assert rounds[-1]["train/primal"] == pytest.approx(found, abs=1e-12)
    for each in rounds:
        assert each["train/duality_gap"] >= each["train/primal"] - best
        assert each["train/dual"] <= best <= each["train/primal"]
    duals = [each["train/dual"] for each in rounds]
    assert all(a < b for a, b in itertools.pairwise(duals))
    assert a9a.accuracy(trained.parameters) > 0.845


def test_adding_changes_that_know_nothing_of_each_other_diverges(a9a: A9aMargins) -> None:
    trained, rounds = rounds_of(a9a, {"steps": 6}, sigma=1.0)
    duals = [each["train/dual"] for each in rounds]
    print(f"P = {rounds[-1]['train/primal']:.3g}, D = {duals[-1]:.3g}")
    assert any(a > b for a, b in itertools.pairwise(duals))
    assert rounds[-1]["train/primal"] > 20, "weights of zero have 1"
    assert a9a.primal(trained.parameters, L2) == pytest.approx(rounds[-1]["train/primal"])
