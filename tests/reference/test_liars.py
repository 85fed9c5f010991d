"""Two of eleven shards send -10 times their gradient: the mean fails, robust rules do not."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.errors import FailedPrecondition
from phalanx.testing.datasets import StoredDataset, store_digits
from phalanx.testing.plans import plan_for
from phalanx.training import local
from phalanx.training.leaf import LeafOutcome, run_leaf

SHARDS, LIARS = 11, (3, 7)
ENOUGH = 0.95
STEPS = 600

RULES: dict[str, tuple[dict[str, Any], float]] = {
    "median": ({"median": {}}, 0.5),
    "trimmed mean": ({"trimmed_mean": {"trim": 2}}, 0.5),
    "krum": ({"krum": {"faulty": 2}}, 0.5),
    "multi-krum": ({"krum": {"faulty": 2, "keep": 9}}, 0.5),
    "clip": ({"clip_norm": 0.2}, 1.0),
}
"""Reducer and learning rate."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def liars(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> LeafOutcome:
        outcome, (_, _, _, _, shard, _, out) = run_leaf(*arguments), arguments
        if shard in LIARS:
            out *= -10
        return outcome

    monkeypatch.setattr(local, "run_leaf", run)


def train(stored: StoredDataset, reduction: dict[str, Any], rate: float) -> Any:
    plan = plan_for(
        stored,
        {
            "model": {"mlp": {"hidden": [64]}, "standardise": False},
            "optimizer": {"sgd": {"learning_rate": rate}},
            "batch_size": 32 * SHARDS,
            "stop": {
                "steps": STEPS,
                "thresholds": [{"metric": "test/accuracy", "at_least": ENOUGH}],
            },
            "evaluation": {"every_steps": 40},
            "reduction": reduction,
        },
        data={"name": "data", "shards": SHARDS},
    )
    return local.train_in_process(plan, stored.manifest, stored.fetch)


def test_the_mean_fails(stored: StoredDataset) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        train(stored, {"weighted_mean": {}}, 0.3)
    assert caught.value.reason == "NON_FINITE"


@pytest.mark.parametrize("rule", RULES)
def test_a_robust_rule_learns(stored: StoredDataset, rule: str) -> None:
    trained = train(stored, *RULES[rule])
    assert trained.metrics["test/accuracy"] >= ENOUGH, trained.metrics
