"""Clocks, rules for staleness, the replay log, and asynchronous jobs inside the process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.errors import DataLoss, FailedPrecondition, InvalidArgument
from phalanx.optimizers import Late, build_contribution_optimizer
from phalanx.testing.datasets import StoredDataset, store_digits
from phalanx.testing.plans import plan_for
from phalanx.training.asynchronous import NO_LIMIT, Clocks, limit_after
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.training.replay import ReplayLog
from phalanx.v1.job_spec_pb2 import Train

SHARDS = 4


def test_shards_wait_for_the_bound_and_the_limit() -> None:
    clocks = Clocks(3, bound=1)
    assert clocks.first_of([0, 1, 2]) == 0
    clocks.commit(0, 0)
    assert clocks.may_start(0)
    clocks.commit(0, 1)
    assert not clocks.may_start(0)
    assert clocks.first_of([0]) is None
    clocks.commit(1, 0)
    assert not clocks.may_start(0)
    clocks.commit(2, 0)
    assert clocks.may_start(0)
    clocks.limit = 2
    assert not clocks.may_start(0)
    assert clocks.first_of([0, 1, 2]) == 1
    assert (clocks.least, clocks.total, clocks.completed) == (1, 4, (2, 1, 1))


def test_a_step_is_completed_once_and_in_its_turn() -> None:
    clocks = Clocks(2)
    clocks.commit(1, 0)
    for step in (0, 2):
        with pytest.raises(InvalidArgument, match="shard 1 is at step 1"):
            clocks.commit(1, step)


@pytest.mark.parametrize("completed", [[1], [1, -1]])
def test_clocks_start_where_each_shard_was(completed: list[int]) -> None:
    assert Clocks(2, None, [4, 2]).step_of(0) == 4
    with pytest.raises(InvalidArgument, match="are not the steps of 2 shards"):
        Clocks(2, None, completed)


def test_the_limit_is_the_next_multiple_or_the_end() -> None:
    assert limit_after(0, (5, 0), 12) == 5
    assert limit_after(5, (5, 3), 12) == 6
    assert limit_after(10, (5,), 12) == 12
    assert limit_after(10, (0,), 0) == NO_LIMIT


def contribution_optimizer(**fields: Any) -> Any:
    train = Train(**fields)
    train.optimizer.sgd.learning_rate = 0.5
    train.optimizer.schedule.constant.SetInParent()
    return build_contribution_optimizer(train, 10)


def applied(optimizer: Any, state: dict[str, Any], staleness: int) -> Any:
    now, read = np.array([1.0, -2.0, 3.0]), np.array([0.5, -2.0, 4.0])
    gradient_sum, out = np.array([4.0, 2.0, -8.0]), np.empty(3)
    late = Late(step=1, update=7, staleness=staleness)
    optimizer.apply_late(now, gradient_sum, 4, None, state, late, read, out)
    return out


@pytest.mark.parametrize(("staleness", "divisor"), [(0, 1), (1, 1), (2, 2), (7, 7)])
def test_the_rate_is_divided_by_the_staleness(staleness: int, divisor: int) -> None:
    train: dict[str, Any] = {"asynchronous": {"scaled": {}}}
    mean = np.array([1.0, 0.5, -2.0])
    wanted = np.array([1.0, -2.0, 3.0]) - 0.5 / divisor * mean
    assert applied(contribution_optimizer(**train), {}, staleness) == pytest.approx(wanted)
    bounded = contribution_optimizer(stale={"bound": 3})
    assert applied(bounded, {}, staleness) == pytest.approx(wanted)


def test_plain_contributions_are_applied_as_they_are() -> None:
    optimizer = contribution_optimizer(asynchronous={"plain": {}})
    assert applied(optimizer, {}, 7) == pytest.approx([0.5, -2.25, 4.0])


def test_delay_compensation_is_that_of_its_formula() -> None:
    compensated = {"delay_compensated": {"strength": 0.8}}
    optimizer = contribution_optimizer(asynchronous=compensated)
    (name,) = optimizer.state_names
    state = {name: np.array([0.25, 1.0, 0.0])}
    out = applied(optimizer, state, 5)
    mean, change = np.array([1.0, 0.5, -2.0]), np.array([0.5, 0.0, -1.0])
    mean_square = 0.95 * np.array([0.25, 1.0, 0.0]) + 0.05 * mean**2
    gradient = mean + 0.8 / np.sqrt(mean_square + 1e-7) * mean**2 * change
    assert state[name] == pytest.approx(mean_square)
    assert out == pytest.approx(np.array([1.0, -2.0, 3.0]) - 0.5 * gradient)


def test_the_bias_correction_of_adam_counts_updates() -> None:
    train = Train(asynchronous={"plain": {}})
    adam = train.optimizer.adam
    adam.learning_rate, adam.beta1, adam.beta2, adam.epsilon = 0.1, 0.9, 0.999, 0.0
    optimizer = build_contribution_optimizer(train, 10)
    state = {"m": np.zeros(1), "v": np.zeros(1)}
    out, vector = np.empty(1), np.zeros(1)
    for update in range(3):
        late = Late(step=0, update=update, staleness=0)
        optimizer.apply_late(vector, np.ones(1), 1, None, state, late, vector, out)
        # A gradient that stays the same makes steps of the learning rate.
        assert out[0] == pytest.approx(-0.1)


def test_a_log_tells_versions_and_survives_a_checkpoint() -> None:
    log = ReplayLog()
    for shard, staleness in ((0, 0), (2, 1), (1, 0), (2, 3)):
        log.add(shard, staleness)
    assert [log.commit(number) for number in range(4)] == [(0, 0), (2, 0), (1, 2), (2, 0)]
    assert log.last_reads() == {0: 3, 2: 2}
    again = ReplayLog.restored(log.vectors(np.dtype("<f4")), 4)
    assert [again.commit(number) for number in range(4)] == [log.commit(each) for each in range(4)]
    with pytest.raises(DataLoss, match="4 commits, and 5"):
        ReplayLog.restored(log.vectors(np.dtype("<f4")), 5)
    with pytest.raises(DataLoss, match="no replay log"):
        ReplayLog.restored({}, 4)


@pytest.fixture(scope="module")
def digits_set(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store_digits(tmp_path_factory.mktemp("digits"))


def train(
    stored: StoredDataset, replay: ReplayLog | None = None, steps: int = 12, **fields: Any
) -> TrainedModel:
    program = {
        "model": {"mlp": {"hidden": [8]}},
        "optimizer": {"sgd": {"learning_rate": 0.1}},
        "batch_size": 64,
        "stop": {"steps": steps},
        "evaluation": {"every_steps": 5},
        **fields,
    }
    plan = plan_for(stored, program, data={"name": "data", "shards": SHARDS})
    return train_in_process(plan, stored.manifest, stored.fetch, replay=replay)


def test_a_stale_bound_of_zero_is_synchronous_to_the_bit(digits_set: StoredDataset) -> None:
    wanted = train(digits_set).parameters_sha256
    assert train(digits_set, stale={"bound": 0}).parameters_sha256 == wanted
    assert train(digits_set, stale={"bound": 1}).parameters_sha256 != wanted
    assert train(digits_set, asynchronous={}).parameters_sha256 != wanted


def test_one_shard_alone_is_synchronous_to_the_bit(digits_set: StoredDataset) -> None:
    program = {
        "model": {"mlp": {"hidden": [8]}},
        "optimizer": {"adam": {"learning_rate": 0.01}, "schedule": {"cosine": {}}},
        "batch_size": 64,
        "stop": {"steps": 8},
    }
    found = set()
    for mode in ({}, {"asynchronous": {}}, {"stale": {"bound": 2}}):
        plan = plan_for(digits_set, {**program, **mode}, data={"name": "data", "shards": 1})
        found.add(train_in_process(plan, digits_set.manifest, digits_set.fetch).parameters_sha256)
    assert len(found) == 1


def test_a_log_is_followed_to_the_bit(digits_set: StoredDataset) -> None:
    """Turns written into a log are the turns that are taken without one."""
    turns = ReplayLog()
    for commit in range(12 * SHARDS):
        turns.add(commit % SHARDS, 0)
    wanted = train(digits_set, asynchronous={}).parameters_sha256
    assert train(digits_set, turns, asynchronous={}).parameters_sha256 == wanted
    late = ReplayLog()
    for commit in range(12 * SHARDS):
        late.add(commit % SHARDS, min(commit, 3))
    assert train(digits_set, late, asynchronous={}).parameters_sha256 != wanted
    with pytest.raises(FailedPrecondition, match="ends after 48 commits"):
        train(digits_set, turns, steps=13, asynchronous={})


def test_steps_epochs_and_rows_are_those_of_a_synchronous_job(digits_set: StoredDataset) -> None:
    one = train(digits_set, stop={"epochs": 2})
    other = train(digits_set, stop={"epochs": 2}, asynchronous={"barrier_every_clocks": 3})
    assert (one.steps, one.examples) == (other.steps, other.examples)
    assert {point[:2] for point in one.points} == {
        point[:2] for point in other.points if point[1] != "train/staleness"
    }
