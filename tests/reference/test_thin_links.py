"""What compression costs in accuracy on digits, and what it saves."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from phalanx.compressors import Codec
from phalanx.compressors.sign import Sign
from phalanx.compressors.sparse import TopK
from phalanx.testing.datasets import StoredDataset, store_digits
from phalanx.testing.plans import plan_for
from phalanx.training.local import train_in_process

pytestmark = pytest.mark.soak

NONE: dict[str, Any] = {}
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"cast_to": "bfloat16", "down_cast_to": "bfloat16"},
    "float16": {"cast_to": "float16", "down_cast_to": "float16"},
    "int8": {"int8": {}},
}
FEEDBACK: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": {"fraction": 0.01}},
    "sign": {"sign": {}},
}
CODECS: dict[str, type[Codec]] = {"top_k": TopK, "sign": Sign}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store_digits(tmp_path_factory.mktemp("digits"))


def accuracy(stored: StoredDataset, compression: dict[str, Any], seed: int = 0) -> float:
    plan = plan_for(
        stored,
        {
            "model": {"mlp": {"hidden": [64]}, "standardise": False},
            "optimizer": {"sgd": {"learning_rate": 0.3}},
            "batch_size": 32,
            "stop": {"steps": 2000},
            "evaluation": {"every_steps": 2000},
            "compression": compression,
        },
        data={"name": "data", "shards": 4},
        seed=seed,
    )
    trained = train_in_process(plan, stored.manifest, stored.fetch)
    print(f"{compression}, seed {seed}: {trained.metrics['test/accuracy']:.4f}")
    return trained.metrics["test/accuracy"]


@pytest.fixture(scope="module")
def plain(stored: StoredDataset) -> float:
    return accuracy(stored, NONE)


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_and_fine_rounding_costs_next_to_nothing(
    stored: StoredDataset, plain: float, kind: str
) -> None:
    assert plain > 0.97
    assert accuracy(stored, KINDS[kind]) > plain - 0.005


def mean_accuracy(stored: StoredDataset, compression: dict[str, Any]) -> float:
    """Over five seeds: a test row is 0.28 points."""
    return statistics.fmean(accuracy(stored, compression, seed) for seed in range(5))


@pytest.fixture(scope="module")
def mean_plain(stored: StoredDataset) -> float:
    return mean_accuracy(stored, NONE)


@pytest.mark.parametrize("kind", FEEDBACK)
def test_what_is_lost_is_made_up_for_by_feedback_and_by_nothing_else(
    stored: StoredDataset, mean_plain: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mean_accuracy(stored, FEEDBACK[kind]) > mean_plain - 0.005
    monkeypatch.setattr(CODECS[kind], "feedback", False)
    assert mean_accuracy(stored, FEEDBACK[kind]) < mean_plain - 0.04
