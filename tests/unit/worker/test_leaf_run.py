"""Rule 6 in a leaf process: what is bad, left out or empty never becomes a payload."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phalanx.v1 import training_pb2
from worker import ipc
from worker.leaf.loop import LeafLoop, _LeafRun, _NotFinite
from worker.leaf.reduce import Sums

OUT = np.zeros(3, np.float32)
GONE = Sums(0, 0.0, 0)
BARE: Any = SimpleNamespace(inner=lambda _: {})


@pytest.fixture
def run() -> _LeafRun:
    page: Any = SimpleNamespace(
        cancelled_task=0, begin_leaf=lambda *_: None, end_leaf=lambda *_: None
    )
    action = int(training_pb2.GoRecord.ACTION_TRAIN)
    return _LeafRun(page, ipc.RunOrder(1, 1, action, version=3, parameters=0, parts=()), 0)


def work(count: int = 5, loss: float = 0.5, finite: bool = True) -> Any:
    outcome = SimpleNamespace(count=count, loss_sum=loss, finite=finite)
    return SimpleNamespace(train=lambda *_: outcome, evaluate=lambda *_: (outcome, OUT))


@pytest.mark.parametrize("error", [MemoryError("cannot map"), OSError(9, "bad file")])
def test_what_fails_before_the_first_leaf_of_a_part_is_told_of_its_first_shard(
    error: Exception,
) -> None:
    """Without a shard nobody would be asked to compute the part again."""

    def cannot_map(_: int) -> Any:
        raise error

    said: list[tuple[ipc.Kind, bytes]] = []
    page: Any = SimpleNamespace(
        begin_task=lambda *_: None,
        end_task=lambda: None,
        no_leaf=lambda: None,
        leaf_seconds=lambda _: 0.0,
        step=3,
        shard=-1,
    )
    connection: Any = SimpleNamespace(send=lambda kind, body: said.append((kind, body)))
    loop = LeafLoop(connection, page)
    broken: Any = SimpleNamespace(plan=training_pb2.JobPlan(shards=8), parameters=cannot_map)
    loop._jobs[1] = broken
    action = int(training_pb2.GoRecord.ACTION_EVALUATE)
    loop._run(ipc.RunOrder(5, 1, action, version=3, parameters=0, parts=((4, 2, 0), (6, 1, 1))))
    failed = [ipc.unpack_json(body)[0] for kind, body in said if kind is ipc.Kind.PART_FAILED]
    assert [(each["index"], each["shard"]) for each in failed] == [(0, 4), (1, 6)]


def test_rule_06_a_leaf_with_examples_is_present(run: _LeafRun) -> None:
    assert run.training(work(), OUT, frozenset(), BARE)(2, OUT) == Sums(5, 0.5, 1)


def test_rule_06_an_exhausted_shard_is_absent(run: _LeafRun) -> None:
    assert run.training(work(count=0, loss=0.0), OUT, frozenset(), BARE)(2, OUT) == GONE
    assert run.evaluation(work(count=0), OUT)(2, OUT.copy()).mask == 0


def test_rule_06_a_shard_that_is_left_out_is_not_computed(run: _LeafRun) -> None:
    assert run.training(None, OUT, frozenset([2]), BARE)(2, OUT) == GONE  # type: ignore[arg-type]


def test_rule_06_a_leaf_that_is_not_finite_ends_its_part(run: _LeafRun) -> None:
    with pytest.raises(_NotFinite):
        run.training(work(finite=False), OUT, frozenset(), BARE)(2, OUT)
