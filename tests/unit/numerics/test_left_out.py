"""The log of what steps left out, and a run in the process that leaves out the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.errors import DataLoss, FailedPrecondition
from phalanx.reduction import reduce_leaves
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.left_out import COUNTS, SHARDS, LeftOutLog
from phalanx.training.local import TrainedModel, train_in_process

WIDTH, STEPS, RATE = 4, 6, 0.1


def log_of(*steps: tuple[int, ...]) -> LeftOutLog:
    log = LeftOutLog()
    for shards in steps:
        log.add(shards)
    return log


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_it_survives_a_checkpoint(dtype: str) -> None:
    for steps in ([], [(), ()], [(3, 1), (), (0,)]):
        log = log_of(*steps)
        again = LeftOutLog.restored(log.vectors(np.dtype(dtype)), len(steps))
        assert len(again) == len(steps)
        assert [again.of(step) for step in range(len(steps))] == [tuple(sorted(s)) for s in steps]
    assert log.contributions == {(1, 0), (3, 0), (0, 2)}


def test_what_does_not_fit_is_refused() -> None:
    vectors = log_of((3, 1), (0,)).vectors(np.dtype("<f4"))
    for name in (COUNTS, SHARDS):
        with pytest.raises(DataLoss, match="does not say"):
            LeftOutLog.restored({other: vectors[other] for other in vectors if other != name}, 2)
        with pytest.raises(DataLoss, match="the log of what was left out has"):
            LeftOutLog.restored({**vectors, name: vectors[name][:-1]}, 2)
    with pytest.raises(DataLoss, match="has 2 steps and 3 shards, and there were 3"):
        LeftOutLog.restored(vectors, 3)
    with pytest.raises(FailedPrecondition, match="ends after 1 step,"):
        log_of(()).of(1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store(tmp_path_factory.mktemp("rows"), *classification(rows=160))


def train(stored: StoredDataset, left_out: LeftOutLog | None, **fields: Any) -> TrainedModel:
    program = {
        "model": {"softmax_regression": {}},
        "optimizer": {"sgd": {"learning_rate": RATE}},
        "synchronous": {"backup_shards": 2},
        "batch_size": 0,
        "stop": {"steps": STEPS},
        **fields,
    }
    plan = plan_for(
        stored,
        program,
        data={"name": "data", "shards": WIDTH},
        reproducibility={"tolerant": {}},
    )
    return train_in_process(plan, stored.manifest, stored.fetch, left_out=left_out)


def test_nothing_left_out_changes_nothing(stored: StoredDataset) -> None:
    wanted = train(stored, None)
    found = train(stored, log_of(*[()] * STEPS))
    assert found.parameters_sha256 == wanted.parameters_sha256
    assert found.left_out == frozenset()
    with pytest.raises(FailedPrecondition, match="ends after 2 steps"):
        train(stored, log_of((), ()))


def test_a_step_is_the_mean_over_the_shards_that_are_left(stored: StoredDataset) -> None:
    """One step of each shard alone gives its sum; those of a step are added up as the tree does."""
    sums = {}
    begin = np.zeros_like(train(stored, log_of((0, 1)), stop={"steps": 1}).parameters)
    for shard in range(WIDTH):
        others = [each for each in range(WIDTH) if each != shard]
        alone = train(stored, log_of(tuple(others)), stop={"steps": 1})
        assert alone.examples == 160 // WIDTH
        sums[shard] = (begin - alone.parameters).astype(np.float64) / RATE * alone.examples
    for late in ((2,), (0, 3), ()):
        total = reduce_leaves({s: sums[s] for s in sums if s not in late}, WIDTH)
        assert total is not None
        found = train(stored, log_of(late), stop={"steps": 1})
        assert found.left_out == {(shard, 0) for shard in late}
        assert found.examples == 160 // WIDTH * (WIDTH - len(late))
        wanted = begin - RATE * total / found.examples
        np.testing.assert_allclose(found.parameters, wanted, rtol=2e-5, atol=1e-7)
