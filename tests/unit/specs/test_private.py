"""What a private job may say, and what it is told before it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.privacy.accountant import Accountant
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = """
name: job
data: {name: fashion}
train:
  model: {mlp: {hidden: [8]}}
  batch_size: 256
  stop: {epochs: 3}
  privacy: {clip_norm: 1, noise_multiplier: 1.1, delta: 1e-5}
"""


def edited(*settings: str) -> JobSpec:
    return specs.apply_sets(specs.load_yaml(BASE), settings)


def complaints(dataset: Dataset, *settings: str) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(edited(*settings), dataset)
    return {each.field: each.message for each in caught.value.violations}


@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("train.asynchronous={}", "train.asynchronous", "use synchronous"),
        ("train.stale={bound: 2}", "train.stale", "use synchronous"),
        ("train.local={steps: 4}", "train.local", "use synchronous"),
        (
            "train.synchronous={backup_shards: 1}",
            "train.synchronous.backup_shards",
            "another probability",
        ),
        ("train.all_reduce={}", "train.all_reduce", "use parameter_server"),
        ("train.on_nonfinite={skip: {}}", "train.on_nonfinite.skip", "counts as 0"),
        ("train.reduction={median: {}}", "train.reduction.median", "no noise yet"),
        ("train.reduction={krum: {faulty: 1}}", "train.reduction.krum", "no noise yet"),
        ("train.reduction={clip_norm: 1}", "train.reduction.clip_norm", "each example's gradient"),
        ("train.optimizer={clip_norm: 1}", "train.optimizer.clip_norm", "privacy.clip_norm"),
        ("train.compression={int8: {}}", "train.compression.int8", "before the noise"),
        ("train.compression={cast_to: float16}", "train.compression.cast_to", "before the noise"),
        ("train.model.standardise=true", "train.model.standardise", "scale the data before"),
        ("data.oversample={}", "data.oversample", "more often than"),
        ("data.class_weights={}", "data.class_weights", "give the weight of each class"),
        ("train.start={job: job-1}", "train.start.job", "does not count"),
        ("reproducibility={tolerant: {}}", "reproducibility.tolerant", "use bitwise"),
        (
            "reproducibility={bitwise: {fall_back_after: 60s}}",
            "reproducibility.bitwise.fall_back_after",
            "the same noise",
        ),
        ("train.evaluation={split: train}", "train.evaluation.split", "metrics have no noise"),
        ("train.privacy.clip_norm=-2", "train.privacy.clip_norm", "at least 1e-09"),
        ("train.privacy.clip_norm=1e38", "train.privacy.clip_norm", "at most 1000000000"),
        ("train.privacy.noise_multiplier=-1", "train.privacy.noise_multiplier", "at least 1e-09"),
        ("train.privacy.noise_multiplier=1e300", "train.privacy.noise_multiplier", "at most 100"),
        ("train.privacy.delta=1", "train.privacy.delta", "below 1"),
        ("train.privacy.delta=5e-324", "train.privacy.delta", "at least 1e-50"),
        ("train.privacy.max_epsilon=0", "train.privacy.max_epsilon", "above 0"),
        ("train.privacy.max_epsilon=1e9", "train.privacy.max_epsilon", "at most 1000000"),
        ("train.privacy.max_epsilon=0.03", "train.privacy.max_epsilon", "one step alone spends"),
        (
            "train.stop={thresholds: [{metric: train/loss, at_most: 1}]}",
            "train.stop.thresholds[0].metric",
            "never computed; this job has test/loss, test/accuracy",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(
    make_dataset: MakeDataset, setting: str, field: str, says: str
) -> None:
    assert says in complaints(make_dataset(), setting)[field]


def test_what_is_missing_is_named(make_dataset: MakeDataset) -> None:
    found = complaints(make_dataset(), "train.privacy={}")
    for name in ("clip_norm", "noise_multiplier", "delta"):
        assert f"train.privacy.{name}" in found


@pytest.mark.parametrize(
    "setting",
    [
        "train.verification={replicas: 3}",
        "train.compression={down_cast_to: bfloat16}",
        "data.class_weights={weights: {'3': 2}}",
        "data.rows={stratified: true}",
        "train.optimizer={adam: {}}",
        "train.l2=0.01",
        "train.batch_size=0",
        "data.shards=1000",  # more shards than rows of a step: some leaves are empty
        "output.best={metric: test/accuracy}",
        "train.start={model: other@1}",
    ],
)
def test_what_does_go_together_is_taken(make_dataset: MakeDataset, setting: str) -> None:
    dataset = make_dataset()
    dataset.class_rows["train"].rows.extend([1000] * 10)
    resolved = specs.prepare(edited(setting), dataset)
    assert specs.prepare(resolved, dataset) == resolved


def test_an_epoch_is_as_many_steps_as_use_each_row_once_on_average(
    make_dataset: MakeDataset,
) -> None:
    resolved = specs.prepare(edited(), make_dataset())
    plan = specs.job_plan(resolved, make_dataset(), "job-1")
    assert plan.steps_per_epoch == 39  # 10,000 / 256
    assert plan.total_steps == 117
    assert not resolved.train.model.standardise
    assert not plan.sampler_key


def test_the_plan_tells_what_all_steps_spend(make_dataset: MakeDataset) -> None:
    told = specs.plan(specs.prepare(edited(), make_dataset()), make_dataset())
    accountant = Accountant(256 / 10_000, 1.1, 1e-5)
    assert told.epsilon == accountant.epsilon(117)
    assert told.warnings == []
    bounded = edited("train.privacy.max_epsilon=1.5", "train.stop={}")
    told = specs.plan(specs.prepare(bounded, make_dataset()), make_dataset())
    assert told.steps == accountant.steps_within(1.5)
    assert told.epsilon <= 1.5
    plain = specs.load_yaml(BASE)
    plain.train.ClearField("privacy")
    assert specs.plan(specs.prepare(plain, make_dataset()), make_dataset()).epsilon == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.privacy.delta=0.001"], "so much allows to publish a row"),
        (["train.privacy.max_epsilon=50"], "max_epsilon never fires"),
        (["train.stop={plateau: {evaluations: 2}}"], "nothing bounds what the job spends"),
    ],
)
def test_what_is_probably_not_meant_is_warned_of(
    make_dataset: MakeDataset, settings: list[str], says: str
) -> None:
    told = specs.plan(specs.prepare(edited(*settings), make_dataset()), make_dataset())
    assert any(says in each for each in told.warnings), told.warnings
