"""What old parameters cost in accuracy on digits, and what the rules for staleness win back.

The log that a run is replayed from says which version each contribution has read, so one that is
written by hand gives every contribution the same staleness.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.errors import FailedPrecondition
from phalanx.testing.datasets import StoredDataset, store_digits
from phalanx.testing.plans import plan_for
from phalanx.training.local import train_in_process
from phalanx.training.replay import ReplayLog

pytestmark = pytest.mark.slow

SHARDS = 8
UPDATES = 3000
DIVERGED = ("NON_FINITE", "PARAMETERS_NON_FINITE")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store_digits(tmp_path_factory.mktemp("digits"))


def turns(staleness: int) -> ReplayLog:
    """Eight shards that take turns, each `staleness` versions behind."""
    log = ReplayLog()
    for commit in range(UPDATES):
        log.add(commit % SHARDS, min(commit, staleness))
    return log


def accuracy(stored: StoredDataset, rule: str, staleness: int = SHARDS - 1, seed: int = 0) -> float:
    plan = plan_for(
        stored,
        {
            "model": {"mlp": {"hidden": [64]}, "standardise": False},
            "optimizer": {"sgd": {"learning_rate": 0.3}},
            "asynchronous": {rule: {}},
            "batch_size": 32 * SHARDS,
            "dtype": "float64",
            "stop": {"steps": UPDATES // SHARDS},
            "evaluation": {"every_steps": UPDATES // SHARDS},
        },
        data={"name": "data", "shards": SHARDS},
        seed=seed,
    )
    try:
        with np.errstate(all="ignore"):
            trained = train_in_process(plan, stored.manifest, stored.fetch, replay=turns(staleness))
    except FailedPrecondition as error:
        if error.reason not in DIVERGED:
            raise
        return 0.0
    assert trained.steps * SHARDS == UPDATES
    if staleness:
        points = [value for _, name, value in trained.points if name == "train/staleness"]
        assert points[-1] == staleness
    print(f"{rule} at staleness {staleness}, seed {seed}: {trained.metrics['test/accuracy']:.4f}")
    return trained.metrics["test/accuracy"]


SOAK = pytest.mark.soak


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SOAK), pytest.param(2, marks=SOAK)])
def test_what_is_done_about_staleness_decides(stored: StoredDataset, seed: int) -> None:
    scaled = accuracy(stored, "scaled", seed=seed)
    compensated = accuracy(stored, "delay_compensated", seed=seed)
    plain = accuracy(stored, "plain", seed=seed)
    assert plain < 0.5
    assert scaled >= 0.95
    assert compensated >= 0.97


@pytest.mark.soak
def test_without_staleness_all_rules_are_the_same(stored: StoredDataset) -> None:
    found: dict[str, Any] = {
        rule: accuracy(stored, rule, staleness=0)
        for rule in ("plain", "scaled", "delay_compensated")
    }
    assert len(set(found.values())) == 1
    assert found["plain"] > 0.97
