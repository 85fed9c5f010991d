"""A training that goes on from what another process kept of its first steps: the same bits."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from phalanx.blas import one_blas_thread
from phalanx.errors import FailedPrecondition
from phalanx.models import build_model
from phalanx.programs.data import BlobUnavailable
from phalanx.sweeps.going_on import of_rows, packed, prefix_in
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.leaf import LeafOutcome, run_leaf
from phalanx.training.local import TrainedModel, run_job
from phalanx.training.prefixes import Prefix
from phalanx.training.schema import job_schema
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

MLP = {"mlp": {"hidden": [9]}}
ADAM = {"adam": {"learning_rate": 0.01}}
MOMENTUM = {"sgd": {"learning_rate": 0.05, "momentum": 0.9}}
COSINE = {"cosine": {"final_fraction": 0.1}}
LOSS = {"metric": "train/loss", "at_most": 0.7}
FLAT = {"metric": "train/accuracy", "evaluations": 2, "min_change": 0.03}
EVALUATION = {"split": "train", "every_steps": 4}
STEPS = 11

WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "Adam": ({"optimizer": ADAM}, "optimizer/"),
    "AdamW": ({"optimizer": {"adamw": {"learning_rate": 0.01}}, "l2": 0.01}, "optimizer/"),
    "Adagrad": ({"optimizer": {"adagrad": {"learning_rate": 0.1}}}, "optimizer/"),
    "momentum": ({"optimizer": MOMENTUM}, "optimizer/"),
    "no state": ({"optimizer": {"sgd": {"learning_rate": 0.1}}}, ""),
    "float64": ({"optimizer": ADAM, "dtype": "float64"}, "optimizer/"),
    "local Adam": ({"local": {"steps": 2, "outer": MOMENTUM}, "optimizer": ADAM}, "inner/"),
    "outer momentum": ({"local": {"steps": 2, "outer": MOMENTUM}}, "optimizer/"),
    "top-k": ({"compression": {"top_k": {"fraction": 0.1}}}, "residuals/"),
    "sign": ({"compression": {"sign": {}}}, "residuals/"),
    "int8": ({"compression": {"int8": {}}}, ""),
    "Krum": ({"reduction": {"krum": {"faulty": 1, "keep": 3}}}, ""),
    "evaluated": ({"optimizer": ADAM, "evaluation": EVALUATION}, "optimizer/"),
    "k-means": ({"model": {"k_means": {"clusters": 4}}}, ""),
    "boosting": ({"model": {"boosting": {"trees": 2, "depth": 2}}}, ""),
    "dual": ({"model": {"linear_svm": {}}, "optimizer": {"cocoa": {}}, "l2": 0.01}, ""),
    "projected": ({"model": {"linear_svm": {}}, "optimizer": {"pegasos": {}}, "l2": 0.01}, ""),
}
"""By name: what is said under `train`, and the names of what is remembered beside parameters."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(500, 8, 2)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, chunk_bytes=4096)


def planned(dataset: StoredDataset, **train: Any) -> JobPlan:
    known = {"model": MLP, "batch_size": 112, "stop": {"steps": STEPS}}
    known |= {"evaluation": {"split": "train"}}
    if "model" in train:
        del known["batch_size"]  # these read all rows in each step
    return plan_for(dataset, {**known, **train}, data={"name": "data", "shards": 7}, seed=3)


def trained(
    dataset: StoredDataset,
    plan: JobPlan,
    prefix: Prefix | None = None,
    until_step: int | None = None,
    steps: list[int] | None = None,
) -> TrainedModel:
    """Train as a trial of a sweep is trained: what is evaluated are the rows that train."""
    spec = JobSpec.FromString(plan.spec)
    reader = dataset.reader("train", spec.train.dtype)
    model = build_model(spec, job_schema(plan, spec, dataset.manifest))
    seen = [] if steps is None else steps
    with one_blas_thread():
        return run_job(
            plan,
            model,
            lambda _shard: reader,
            reader,
            until_step=until_step,
            prefix=prefix,
            on_progress=lambda now: seen.append(now.step),
        )


def passed_on(model: TrainedModel) -> Prefix:
    """What another process reads of what was kept."""
    assert model.prefix is not None
    content = packed(model.prefix, "this")
    found = prefix_in(lambda: content, "this")
    assert found is not None
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_training_goes_on_to_the_same_bits(dataset: StoredDataset, way: str) -> None:
    train, remembered = WAYS[way]
    plan = planned(dataset, **train)
    whole = trained(dataset, plan)
    assert whole.steps > 4
    assert whole.prefix is None, "nobody goes on from the end"
    prefix = None
    for until_step in (2, 4, None):
        steps: list[int] = []
        begun = 0 if prefix is None else 2 if until_step == 4 else 4
        part = trained(dataset, plan, prefix, until_step, steps)
        # The same process would come to as much, were it to begin anew.
        assert min(steps) >= begun
        if until_step is None:
            break
        fresh = trained(dataset, plan, None, until_step)
        assert part.parameters_sha256 == fresh.parameters_sha256
        prefix = passed_on(part)
    assert part.parameters_sha256 == whole.parameters_sha256
    assert (part.steps, part.examples, part.reason) == (whole.steps, whole.examples, whole.reason)
    assert part.metrics == whole.metrics
    if not remembered:
        return
    assert prefix is not None
    names = [name for name in prefix.arrays if name.startswith(remembered)]
    assert names
    forgotten = {name: np.zeros_like(prefix.arrays[name]) for name in names}
    without = Prefix({**prefix.arrays, **forgotten}, prefix.root)
    found = trained(dataset, plan, without)
    assert found.parameters_sha256 != whole.parameters_sha256, "this has to be kept"


@pytest.mark.parametrize("schedule", [COSINE, {"warm_up_steps": 6}])
def test_a_schedule_goes_on_where_it_was(dataset: StoredDataset, schedule: dict[str, Any]) -> None:
    plan = planned(dataset, optimizer={"sgd": {"learning_rate": 0.1}, "schedule": schedule})
    prefix = passed_on(trained(dataset, plan, until_step=4))
    found = trained(dataset, plan, prefix)
    assert found.parameters_sha256 == trained(dataset, plan).parameters_sha256


@pytest.mark.parametrize("rule", [{"thresholds": [LOSS]}, {"plateau": FLAT}])
def test_a_rule_ends_it_at_the_same_step_wherever_it_was_interrupted(
    dataset: StoredDataset, rule: dict[str, Any]
) -> None:
    """Also where the rule holds at that very step, and what it looked at is not measured again."""
    stop = {"steps": 40, **rule}
    plan = planned(dataset, optimizer=ADAM, stop=stop, evaluation=EVALUATION)
    whole = trained(dataset, plan)
    assert 2 < whole.steps < 40
    for until_step in range(1, whole.steps + 1):
        part = trained(dataset, plan, until_step=until_step)
        found = trained(dataset, plan, passed_on(part))
        assert (found.steps, found.reason) == (whole.steps, whole.reason)
        assert found.parameters_sha256 == whole.parameters_sha256
        assert found.metrics == whole.metrics


def test_steps_that_were_skipped_count_on(
    dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaf(*of: Any) -> LeafOutcome:
        outcome = run_leaf(*of)
        *_, shard, step, _out = of
        return replace(outcome, finite=(shard, step) not in ((2, 1), (3, 1), (2, 6)))

    monkeypatch.setattr("phalanx.training.local.run_leaf", leaf)
    two, one = (planned(dataset, on_nonfinite={"skip": {"max_steps": most}}) for most in (2, 1))
    assert trained(dataset, two).left_out == {(2, 1), (3, 1), (2, 6)}
    prefix = passed_on(trained(dataset, one, until_step=4))
    with pytest.raises(FailedPrecondition, match=r"shard 2 .* in step 7 is not finite"):
        trained(dataset, one, prefix)


def test_what_is_not_there_or_of_another_training_is_not_gone_on_from(
    dataset: StoredDataset,
) -> None:
    plan = planned(dataset, optimizer=ADAM)
    prefix = trained(dataset, plan, until_step=2).prefix
    assert prefix is not None
    name = of_rows(plan, np.arange(5))
    content = packed(prefix, name)
    assert prefix_in(lambda: content, name) is not None
    others = [of_rows(plan, np.arange(4)), of_rows(plan, None)]
    others.append(of_rows(planned(dataset, optimizer=MOMENTUM), np.arange(5)))
    assert len({name, *others}) == 4
    for other in others:
        assert prefix_in(lambda: content, other) is None
    heads = (b"{}", b"[]", b"7", b'{"__metadata__":7}', b'{"__metadata__":null}', b"[" * 100_000)
    others_content = [len(head).to_bytes(8, "little") + head for head in heads]
    for damaged in (b"", content[:20], content[:-8], b"\xff" * 100, *others_content):
        assert prefix_in(lambda damaged=damaged: damaged, name) is None
    for error in (BlobUnavailable("gone"), FileNotFoundError("gone")):

        def gone(error: Exception = error) -> bytes:
            raise error

        assert prefix_in(gone, name) is None


def test_memory_that_is_too_short_for_what_is_kept_costs_no_result(
    dataset: StoredDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = trained(dataset, planned(dataset, optimizer=ADAM), until_step=4).prefix
    assert prefix is not None
    content = packed(prefix, "this")

    def too_much(*_: object) -> Any:
        raise MemoryError

    assert prefix_in(too_much, "this") is None
    monkeypatch.setattr("phalanx.programs.arrays.unpack", too_much)
    assert prefix_in(lambda: content, "this") is None
    monkeypatch.setattr("phalanx.programs.arrays.pack", too_much)
    assert packed(prefix, "this") == b""


def test_what_a_training_goes_on_from_is_not_held_while_it_goes_on(dataset: StoredDataset) -> None:
    plan = planned(dataset, optimizer=ADAM)
    held = [passed_on(trained(dataset, plan, until_step=4))]
    first = weakref.ref(held[0])
    spec = JobSpec.FromString(plan.spec)
    reader = dataset.reader("train", spec.train.dtype)
    model = build_model(spec, job_schema(plan, spec, dataset.manifest))
    there: list[bool] = []
    with one_blas_thread():
        run_job(
            plan,
            model,
            lambda _shard: reader,
            reader,
            prefix=held.pop(),
            on_progress=lambda _now: there.append(first() is not None),
        )
    assert there
    assert not any(there)


def test_contributions_that_commit_one_by_one_have_no_first_steps(dataset: StoredDataset) -> None:
    plan = planned(dataset, asynchronous={})
    assert trained(dataset, plan, until_step=2).prefix is None
