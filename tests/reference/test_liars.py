"""Two of eleven shards send -10 times their gradient: the mean fails, robust rules do not.

Nothing stops a job early: what counts is the evaluation after the last step. Krum with `keep` 1 is
why the batches are small and the rate falls to 0. It takes the contribution that is nearest to the
others; with large batches that is nearly always one of the same few shards, whose own rows are
learned by heart, and it sees little of the rows of the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.errors import FailedPrecondition
from phalanx.testing.datasets import StoredDataset, store_digits
from phalanx.testing.plans import plan_for
from phalanx.training import local
from phalanx.training.leaf import LeafOutcome, run_leaf

pytestmark = pytest.mark.slow

SHARDS, LIARS = 11, (3, 7)
ENOUGH = 0.95
STEPS = 2000

RULES: dict[str, dict[str, Any]] = {
    "median": {"median": {}},
    "trimmed mean": {"trimmed_mean": {"trim": 2}},
    "krum": {"krum": {"faulty": 2}},
    "multi-krum": {"krum": {"faulty": 2, "keep": 9}},
    "clip": {"clip_norm": 0.3},
}

SOAK = pytest.mark.soak
SEEDS = [0, pytest.param(1, marks=SOAK), pytest.param(2, marks=SOAK)]


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


def train(stored: StoredDataset, reduction: dict[str, Any], seed: int) -> float:
    """The test accuracy after the last step."""
    plan = plan_for(
        stored,
        {
            "model": {"mlp": {"hidden": [256]}, "standardise": False},
            "optimizer": {"sgd": {"learning_rate": 0.5}, "schedule": {"cosine": {}}},
            "batch_size": 20 * SHARDS,
            "stop": {"steps": STEPS},
            "evaluation": {"every_steps": STEPS},
            "reduction": reduction,
        },
        data={"name": "data", "shards": SHARDS},
        seed=seed,
    )
    with np.errstate(all="ignore"):
        trained = local.train_in_process(plan, stored.manifest, stored.fetch)
    assert trained.steps == STEPS
    return trained.metrics["test/accuracy"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_fails(stored: StoredDataset, seed: int) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        train(stored, {"weighted_mean": {}}, seed)
    assert caught.value.reason == "NON_FINITE"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_robust_rule_learns(stored: StoredDataset, rule: str, seed: int) -> None:
    accuracy = train(stored, RULES[rule], seed)
    print(f"{rule}, seed {seed}: {accuracy:.4f}")
    assert accuracy >= ENOUGH
