"""Rule 6 in a leaf process: what is bad, left out or empty never becomes a payload."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phalanx.testing.datasets import regression, store
from phalanx.testing.plans import plan_for
from phalanx.v1 import training_pb2
from phalanx.v1.coordination_service_pb2 import JobDescribed
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


@pytest.mark.parametrize(("width", "fits"), [(8, True), (9, False)])
@pytest.mark.parametrize("chosen", [[], ["x2", "x7"]], ids=["all", "chosen"])
def test_a_model_to_start_from_is_compared_when_the_job_is_described(
    tmp_path: Path, width: int, fits: bool, chosen: list[str]
) -> None:
    """Before any step, and by whoever builds the model: only that knows what user code has."""
    needed = len(chosen) or 8
    width += needed - 8
    dataset = store(tmp_path, *regression(40, 8))
    train = {"model": {"linear_regression": {"bias": False}}, "batch_size": 8, "stop": {"steps": 1}}
    plan = plan_for(dataset, train, data={"name": "data", "shards": 2, "features": chosen})
    plan.ClearField("layout")
    start_model, manifest = tmp_path / "model.safetensors", tmp_path / "manifest.json"
    save_file({"weights": np.zeros(width, np.float32)}, start_model)
    manifest.write_bytes(dataset.manifest.to_json())
    said: list[bytes] = []
    connection: Any = SimpleNamespace(send=lambda _, body: said.append(body))
    loop = LeafLoop(connection, SimpleNamespace())  # type: ignore[arg-type]
    loop._fetch = lambda chunk: dataset.fetch(chunk.digest)  # type: ignore[method-assign]
    files = {"manifest": str(manifest), "code": "", "start_model": str(start_model)}
    body = ipc.pack_json({"job": 1, "fits": True, **files}, plan.SerializeToString())
    loop._describe(ipc.Message(ipc.Kind.DESCRIBE, body))
    described = JobDescribed.FromString(ipc.unpack_json(said[-1])[1])
    assert described.HasField("failure") is not fits
    if not fits:
        assert described.failure.code == "START_MODEL_MISFIT"
        found = f"train.start.model does not fit: it has 'weights' in the shape [{width}] and the"
        assert f"{found} model of this job needs [{needed}]" in described.failure.message


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
