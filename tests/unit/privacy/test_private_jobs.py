"""Private jobs in one process: their ledger, what they tell, and when they end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.data.described import described
from phalanx.privacy.accountant import Accountant
from phalanx.privacy.secret import sampler_key
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.decisions import EPSILON, RootDecider
from phalanx.training.expected import expected_examples, expected_of_shard
from phalanx.training.leaf import leaf_rows
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.v1.training_pb2 import GoRecord, JobPlan

SECRET, OTHER = bytes(range(32)), bytes(32)
PRIVACY = {"clip_norm": 0.8, "noise_multiplier": 1.1, "delta": 1e-5}
BATCH = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(700, 8, 3)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2, chunk_bytes=4096)


def private_plan(dataset: StoredDataset, shards: int = 7, **train: Any) -> JobPlan:
    known = {
        "model": {"mlp": {"hidden": [9]}},
        "optimizer": {"sgd": {"learning_rate": 0.5}},
        "batch_size": BATCH,
        "stop": {"steps": 12},
        "privacy": PRIVACY,
    }
    return plan_for(dataset, {**known, **train}, data={"name": "data", "shards": shards}, seed=3)


def train(dataset: StoredDataset, plan: JobPlan, secret: bytes = SECRET) -> TrainedModel:
    return train_in_process(plan, dataset.manifest, dataset.fetch, secret=secret)


def rows(dataset: StoredDataset) -> int:
    return described(dataset.manifest, "").rows["train"]


def test_the_same_secret_gives_the_same_bits_and_another_one_others(dataset: StoredDataset) -> None:
    plan = private_plan(dataset)
    first = train(dataset, plan)
    assert first.parameters_sha256 == train(dataset, plan).parameters_sha256
    assert first.parameters_sha256 != train(dataset, plan, OTHER).parameters_sha256
    drawn = train_in_process(plan, dataset.manifest, dataset.fetch).parameters_sha256
    assert drawn != train_in_process(plan, dataset.manifest, dataset.fetch).parameters_sha256


def test_the_root_expects_just_what_the_sampler_draws(dataset: StoredDataset) -> None:
    plan = private_plan(dataset, shards=60, stop={"steps": 30})  # leaves without any row as well
    trained = train(dataset, plan)
    plan.sampler_key = sampler_key(SECRET)
    reader = dataset.reader("train", "float32")
    for step in range(12):
        counts = [
            sum(len(each.rows) for each in leaf_rows(plan, reader, shard, step))
            for shard in range(plan.shards)
        ]
        assert counts == [expected_of_shard(plan, shard, step) for shard in range(plan.shards)]
        assert sum(counts) == expected_examples(plan, step)
        assert 0 in counts
    assert trained.examples == sum(expected_examples(plan, step) for step in range(30))
    assert trained.examples == pytest.approx(30 * BATCH, rel=0.2)
    assert trained.examples != 30 * BATCH


def test_the_epsilon_of_each_step_is_told_and_no_loss(dataset: StoredDataset) -> None:
    trained = train(dataset, private_plan(dataset))
    accountant = Accountant(BATCH / rows(dataset), 1.1, 1e-5)
    told = {step: value for step, name, value in trained.points if name == EPSILON}
    assert told == {step: accountant.epsilon(step) for step in range(1, 13)}
    assert trained.metrics[EPSILON] == accountant.epsilon(12)
    assert set(trained.metrics) == {EPSILON, "test/loss", "test/accuracy"}
    assert {name for _, name, _ in trained.points} == set(trained.metrics)


@pytest.mark.parametrize("steps", [None, 500])
def test_it_ends_before_the_step_that_would_exceed_the_bound(
    dataset: StoredDataset, steps: int | None
) -> None:
    stop = {} if steps is None else {"steps": steps}
    plan = private_plan(dataset, stop=stop, privacy={**PRIVACY, "max_epsilon": 4.0})
    trained = train(dataset, plan)
    accountant = Accountant(BATCH / rows(dataset), 1.1, 1e-5)
    assert trained.reason == "STOP_EPSILON"
    assert trained.steps == plan.total_steps > 2
    assert accountant.epsilon(trained.steps) <= 4.0 < accountant.epsilon(trained.steps + 1)


def test_it_ends_there_also_after_a_roll_back(dataset: StoredDataset) -> None:
    plan = private_plan(dataset, stop={}, privacy={**PRIVACY, "max_epsilon": 4.0})
    plan.evaluation_shards = 0
    ended = []
    for stops in (None, 3):
        decider = RootDecider(plan, term=1)
        decider.start()
        go = decider.initialised(0.0)
        while go.action == GoRecord.ACTION_TRAIN:
            go = decider.committed(go.version + 1, 0, 0.0, 0.0)
            if go.version == stops:
                state, decider = decider.state(), RootDecider(plan, term=2)
                go = decider.restore(3, state)
        ended.append((go.version, go.reason, decider.metrics))
    assert ended[0] == ended[1]
    assert ended[0][:2] == (plan.total_steps, "STOP_EPSILON")


def test_one_row_more_moves_no_step_by_more_than_the_norm(tmp_path: Path) -> None:
    """With the noise taken off: what the deviation of the noise is measured by."""
    features, targets = classification(300, 5, 2)
    sums = []
    for count in (299, 300):
        stored = store(tmp_path / str(count), features[:count], targets[:count])
        plan = plan_for(
            stored,
            {
                "model": {"logistic_regression": {}},
                "optimizer": {"sgd": {"learning_rate": 1.0}},
                "privacy": {**PRIVACY, "noise_multiplier": 1e-9},
                "stop": {"steps": 1},
            },
            data={"name": "data", "shards": 1},
        )
        trained = train(stored, plan)
        sums.append(trained.parameters.astype(np.float64) * count)
    apart = np.linalg.norm(sums[1] - sums[0])
    assert 0.01 < apart <= 0.8 * (1 + 1e-4)


def test_the_best_of_all_steps_does_not_tell_less_than_they_have_spent(
    dataset: StoredDataset,
) -> None:
    plan = plan_for(
        dataset,
        {
            "model": {"mlp": {"hidden": [9]}},
            "batch_size": BATCH,
            "evaluation": {"every_steps": 2},
            "stop": {"steps": 9},
            "privacy": PRIVACY,
        },
        data={"name": "data", "shards": 7},
        output={"best": {"metric": "test/loss"}},
    )
    trained = train(dataset, plan)
    assert trained.best is not None
    assert EPSILON not in trained.metrics
    assert trained.steps == 9


def test_shards_of_equal_classes_draw_their_rows_as_well(dataset: StoredDataset) -> None:
    plan = plan_for(
        dataset,
        {
            "model": {"mlp": {"hidden": [4]}},
            "batch_size": BATCH,
            "privacy": PRIVACY,
            "stop": {"steps": 5},
        },
        data={"name": "data", "shards": 4, "rows": {"stratified": True}},
    )
    trained = train(dataset, plan)
    plan.sampler_key = sampler_key(SECRET)
    assert trained.examples == sum(expected_examples(plan, step) for step in range(5))
