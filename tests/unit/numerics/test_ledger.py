"""The ledger counts rows: whatever is taken twice, taken away or put elsewhere does not balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from phalanx.errors import DataLoss
from phalanx.testing.datasets import StoredDataset, store
from phalanx.testing.plans import plan_for
from phalanx.training.expected import expected_of_shard
from phalanx.training.ledger import Books, Ledger, LeftOut, applied_by, take_stock
from phalanx.training.replay import ReplayLog
from phalanx.v1.training_pb2 import JobPlan

SHARDS, ROWS, EPOCHS = 4, 203, 3

Change = Callable[[list[int]], object]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    generator = np.random.default_rng(0)
    classes = np.repeat(["many", "some", "few"], [150, 40, 13])
    features = generator.normal(size=(ROWS, 3))
    return store(tmp_path_factory.mktemp("rows"), features, classes, chunk_bytes=1024)


def plan_of(stored: StoredDataset, data: dict[str, Any] | None = None, **train: Any) -> JobPlan:
    program = {
        "model": {"softmax_regression": {}},
        "batch_size": 64,
        "stop": {"epochs": EPOCHS},
        **train,
    }
    return plan_for(stored, program, data={"name": "data", "shards": SHARDS, **(data or {})})


def books_of(plan: JobPlan, steps: int) -> Books:
    """What an undisturbed job writes."""
    each = max(1, plan.local_steps)
    counts = [
        expected_of_shard(plan, shard, own)
        for shard in range(SHARDS)
        for own in range(steps * each)
    ]
    return Books((steps,) * SHARDS, sum(counts))


def stock(stored: StoredDataset, plan: JobPlan, books: Books) -> Ledger:
    return take_stock(plan, stored.reader(), books)


BALANCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shuffled": ({}, {}),
    "whole shards": ({}, {"batch_size": 0}),
    "stratified": ({"rows": {"stratified": True}}, {}),
    "oversampled": ({"oversample": {}}, {}),
    "local steps": ({}, {"local": {"steps": 3}}),
}


@pytest.mark.parametrize("name", BALANCES)
def test_every_example_is_used_once_in_each_epoch(stored: StoredDataset, name: str) -> None:
    data, train = BALANCES[name]
    plan = plan_of(stored, data, **train)
    ledger = stock(stored, plan, books_of(plan, plan.total_steps))
    assert ledger.problems == ()
    assert ledger.epochs == ledger.exact_epochs == EPOCHS
    assert ledger.used == EPOCHS * plan.train_rows == EPOCHS * ledger.epoch_examples
    assert (ledger.left_out, ledger.doubled, ledger.missing) == (0, 0, 0)


def test_an_epoch_that_the_job_ended_in_has_examples_once_at_most(stored: StoredDataset) -> None:
    plan = plan_of(stored)
    ledger = stock(stored, plan, books_of(plan, plan.total_steps - 1))
    assert ledger.balanced
    assert (ledger.epochs, ledger.exact_epochs) == (EPOCHS - 1, EPOCHS - 1)
    assert (EPOCHS - 1) * ROWS < ledger.used < EPOCHS * ROWS


def test_no_step_at_all_balances(stored: StoredDataset) -> None:
    ledger = stock(stored, plan_of(stored), Books((0,) * SHARDS, 0))
    assert ledger.balanced
    assert (ledger.epochs, ledger.used) == (0, 0)


@pytest.mark.parametrize("change", [-1, 1])
def test_what_the_root_counted_is_what_was_used(stored: StoredDataset, change: int) -> None:
    plan = plan_of(stored)
    books = books_of(plan, plan.total_steps)
    assert books.examples is not None
    assert not stock(stored, plan, replace(books, examples=books.examples + change)).balanced
    assert not stock(stored, plan, replace(books, doubled=1)).balanced
    assert stock(stored, plan, replace(books, examples=None)).balanced


def test_a_sampler_that_gives_a_row_twice_is_found(
    stored: StoredDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(stored)
    books = books_of(plan, plan.total_steps)
    ask = "phalanx.training.ledger.leaf_rows"
    from phalanx.training.leaf import leaf_rows

    def same_step(plan: JobPlan, split: Any, shard: int, step: int) -> Any:
        # As many rows as are due, but those of the step before in every second step.
        return leaf_rows(plan, split, shard, step - step % 2)

    monkeypatch.setattr(ask, same_step)
    ledger = stock(stored, plan, books)
    assert not ledger.balanced
    assert ledger.doubled > 0
    assert ledger.missing > 0


def test_contributions_that_were_left_out_are_named(stored: StoredDataset) -> None:
    plan = plan_of(stored)
    books = books_of(plan, plan.total_steps)
    assert books.examples is not None
    out = frozenset({(2, 0), (0, plan.steps_per_epoch), (3, 1)})
    lost = sum(expected_of_shard(plan, *each) for each in out)
    told = replace(books, examples=books.examples - lost, lost=lost, left_out=out, all_named=True)
    ledger = stock(stored, plan, told)
    assert ledger.problems == ()
    assert (ledger.left_out, ledger.missing, ledger.doubled) == (lost, 0, 0)
    assert (ledger.epochs, ledger.exact_epochs) == (EPOCHS, EPOCHS - 2)
    assert ledger.named == tuple(
        LeftOut(shard, step + 1, expected_of_shard(plan, shard, step))
        for shard, step in ((2, 0), (3, 1), (0, plan.steps_per_epoch))
    )
    fewer = replace(told, left_out=frozenset({(2, 0)}))
    assert not stock(stored, plan, fewer).balanced
    unnamed = stock(stored, plan, replace(fewer, all_named=False))
    assert unnamed.balanced
    assert (unnamed.used, unnamed.left_out) == (ledger.used, lost)
    assert unnamed.exact_epochs == 0
    more = replace(told, left_out=out | {(1, 1)}, all_named=False)
    assert not stock(stored, plan, more).balanced


def commits_of(steps: int) -> list[int]:
    return [commit % SHARDS for commit in range(steps * SHARDS)]


def log_of(shards: list[int], reads: dict[int, int] | None = None) -> ReplayLog:
    """The shards in this order, each at the newest version but where `reads` says otherwise."""
    log = ReplayLog()
    for number, shard in enumerate(shards):
        log.add(shard, number - (reads or {}).get(number, number))
    return log


def logged(stored: StoredDataset, log: ReplayLog) -> Ledger:
    plan = plan_of(stored, asynchronous={"replay_log": True})
    books = books_of(plan, plan.total_steps)
    return stock(stored, plan, replace(books, applied=applied_by(log, SHARDS)))


def test_a_log_in_any_order_balances(stored: StoredDataset) -> None:
    steps = plan_of(stored).total_steps
    assert logged(stored, log_of(commits_of(steps))).balanced
    ahead = sorted(commits_of(steps))
    first = dict.fromkeys(range(0, steps * SHARDS, steps), 0)
    assert logged(stored, log_of(ahead, first)).balanced
    late = {number: number - SHARDS + 1 for number in range(SHARDS, steps * SHARDS)}
    ledger = logged(stored, log_of(commits_of(steps), late))
    assert ledger.balanced
    assert ledger.exact_epochs == EPOCHS


TAMPERED: dict[str, Change] = {
    "a step twice and another missing": lambda shards: shards.__setitem__(9, shards[8]),
    "a step twice": lambda shards: shards.insert(9, shards[8]),
    "a step missing": lambda shards: shards.pop(9),
    "one shard for another": lambda shards: shards.__setitem__(-1, shards[0]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_log_that_was_tampered_with_does_not_balance(stored: StoredDataset, name: str) -> None:
    shards = commits_of(plan_of(stored).total_steps)
    TAMPERED[name](shards)
    assert not logged(stored, log_of(shards)).balanced


def test_a_second_contribution_to_a_step_has_read_a_version_without_the_first(
    stored: StoredDataset,
) -> None:
    """Then the shard has as many contributions as steps: only what it has read tells."""
    shards = commits_of(plan_of(stored).total_steps)
    ledger = logged(stored, log_of(shards, {SHARDS * 3: SHARDS * 2}))
    assert not ledger.balanced
    rows = ledger.epoch_examples // SHARDS
    assert 0 < ledger.doubled <= rows
    assert 0 < ledger.missing <= rows
    assert any("used more often than an epoch has them" in each for each in ledger.problems)
    assert any("of whole epochs not used" in each for each in ledger.problems)
    applied = applied_by(log_of(shards, {SHARDS * 3: SHARDS * 2}), SHARDS)
    assert (applied[0, 2], applied[0, 3]) == (2, 0)


def test_a_log_goes_as_far_as_the_steps_that_shards_have_completed(stored: StoredDataset) -> None:
    """Also in the epoch that the job ended in, where nothing has to be complete."""
    plan = plan_of(stored, asynchronous={"replay_log": True})
    steps = plan.total_steps - 2
    shards = commits_of(steps)
    shards[-1] = shards[0]
    applied = applied_by(log_of(shards), SHARDS)
    ledger = stock(stored, plan, Books((steps,) * SHARDS, None, applied=applied))
    assert (ledger.doubled, ledger.missing) == (0, 0)
    assert ledger.problems == (
        f"shard 0 has completed {steps} steps, and the log has {steps + 1} contributions of it",
        f"shard 3 has completed {steps} steps, and the log has {steps - 1} contributions of it",
    )


def test_the_plan_and_the_data_set_have_as_many_rows(stored: StoredDataset) -> None:
    plan = plan_of(stored)
    plan.train_rows += 1
    ledger = stock(stored, plan, replace(books_of(plan, plan.total_steps), examples=None))
    assert ledger.problems == ("an epoch has 203 examples, and the job was planned for 204",)


def test_shards_may_end_at_different_steps(stored: StoredDataset) -> None:
    """As where a clock ends a job whose contributions commit one by one."""
    plan = plan_of(stored, asynchronous={"replay_log": True})
    completed = [plan.steps_per_epoch + more for more in (1, 0, 2, 5)]
    counts = Counter({(s, c): 1 for s in range(SHARDS) for c in range(completed[s])})
    examples = sum(expected_of_shard(plan, *each) for each in counts)
    for applied in (None, counts):
        ledger = stock(stored, plan, Books(tuple(completed), examples, applied=applied))
        assert ledger.problems == ()
        assert ledger.epochs == ledger.exact_epochs == 1
        assert ledger.used == examples


@pytest.mark.parametrize(("shard", "staleness"), [(SHARDS, 0), (-1, 0), (0, 1), (0, -1)])
def test_commits_that_cannot_be_are_refused(shard: int, staleness: int) -> None:
    log = ReplayLog()
    log.add(shard, staleness)
    with pytest.raises(DataLoss, match="commit 0 of the replay log"):
        applied_by(log, SHARDS)
