"""Rule 6 in a leaf process: what is bad, left out or empty never becomes a payload."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phalanx.v1 import training_pb2
from worker import ipc
from worker.leaf.loop import _LeafRun, _NotFinite
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
    return _LeafRun(page, ipc.RunOrder(1, 1, action, version=3, parameters=0, parts=()))


def work(count: int = 5, loss: float = 0.5, finite: bool = True) -> Any:
    outcome = SimpleNamespace(count=count, loss_sum=loss, finite=finite)
    return SimpleNamespace(train=lambda *_: outcome, evaluate=lambda *_: (outcome, OUT))


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
