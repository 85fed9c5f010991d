"""Keeping the best evaluation: what a job file may ask for, and what it then means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.specs.plan import worker_bytes
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = "name: job\ndata: {name: fashion}\ntrain: {model: {mlp: {hidden: [8]}}, batch_size: 1024}"
SPLITS = {"train": 10_000, "test": 2_000, "validation": 2_000}


def keeping(*settings: str, best: str = "{metric: test/accuracy}") -> JobSpec:
    return specs.apply_sets(specs.load_yaml(BASE), [f"output.best={best}", *settings])


def complaints(spec: JobSpec, dataset: Dataset) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(spec, dataset)
    return {each.field: each.message for each in caught.value.violations}


@pytest.mark.parametrize(
    "best",
    [
        "{metric: test/accuracy}",
        "{metric: test/loss}",
        "{metric: test/accuracy, at_least: 0.8}",
        "{metric: test/loss, at_most: 1}",
    ],
)
@pytest.mark.parametrize(
    "mode",
    [
        "train.synchronous={}",
        "train.asynchronous={}",
        "train.stale={bound: 2}",
        "train.local={steps: 5}",
        "train.all_reduce={}",
        "train.compression={top_k: {fraction: 0.1}}",
        "train.verification={replicas: 3}",
        "train.reduction={median: {}}",
    ],
)
def test_it_goes_with_everything_that_is_evaluated(
    make_dataset: MakeDataset, best: str, mode: str
) -> None:
    resolved = specs.prepare(keeping(mode, best=best), make_dataset())
    assert resolved.output.best == keeping(best=best).output.best, "it stays as it was written"
    assert specs.prepare(resolved, make_dataset()) == resolved


@pytest.mark.parametrize(
    ("best", "field", "says"),
    [
        ("{}", "output.best.metric", "SPLIT/NAME"),
        ("{metric: accuracy}", "output.best.metric", "SPLIT/NAME"),
        ("{metric: test/f1}", "output.best.metric", "give test/loss, test/accuracy"),
        ("{metric: train/loss}", "output.best.metric", "of the rows of one step"),
        ("{metric: train/accuracy}", "output.best.metric", "never computed"),
        ("{metric: validation/loss}", "output.best.metric", "no rows of fashion@3 are held out"),
        ("{metric: test/lift}", "output.best", "needs at_least or at_most"),
        ("{metric: test/loss, at_most: .nan}", "output.best.at_most", "finite"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_path(
    make_dataset: MakeDataset, best: str, field: str, says: str
) -> None:
    assert says in complaints(keeping(best=best), make_dataset())[field]


@pytest.mark.parametrize("metric", ["train/loss", "test/accuracy"])
def test_without_an_evaluation_there_is_no_best_one(make_dataset: MakeDataset, metric: str) -> None:
    spec = keeping(best=f"{{metric: {metric}}}")
    found = complaints(spec, make_dataset(rows={"train": 10_000}))
    assert "no rows of fashion@3 are held out" in found["output.best.metric"]


def test_the_rows_that_are_compared_on_are_those_that_are_evaluated(
    make_dataset: MakeDataset,
) -> None:
    dataset = make_dataset(rows=SPLITS)
    resolved = specs.prepare(keeping(best="{metric: validation/loss}"), dataset)
    assert resolved.train.evaluation.split == "validation"
    # A stop rule that watches other rows comes first, and then these are never evaluated.
    watching = "train.stop.thresholds=[{metric: test/loss, at_most: 0.1}]"
    found = complaints(keeping(watching, best="{metric: validation/loss}"), dataset)
    assert "give test/loss, test/accuracy" in found["output.best.metric"]
    trained_on = keeping("train.evaluation.split=train", best="{metric: train/loss}")
    assert specs.prepare(trained_on, dataset).train.evaluation.split == "train"


def test_what_user_code_measures_is_known_only_once_it_runs(make_dataset: MakeDataset) -> None:
    custom = "train.model={custom: {entrypoint: 'net:build'}}"
    specs.prepare(keeping(custom, best="{metric: test/lift, at_least: 0}"), make_dataset())


def test_a_set_of_tasks_has_no_evaluations() -> None:
    spec = specs.load_yaml(
        "name: job\noutput: {best: {metric: test/loss}}\n"
        "tasks: {entrypoint: 'work:run', arguments: [{x: 1}]}"
    )
    with pytest.raises(InvalidArgument) as caught:
        specs.check_spec(spec)
    assert [each.field for each in caught.value.violations] == ["output"]


@pytest.mark.parametrize(
    ("best", "settings", "says"),
    [
        ("{metric: test/accuracy, at_most: 1}", [], "keeps the lowest test/accuracy"),
        ("{metric: test/loss, at_least: 0}", [], "keeps the highest test/loss"),
        (
            "{metric: test/loss}",
            ["train.stop.steps=10", "train.evaluation.every_steps=10"],
            "the only evaluation is at the end",
        ),
    ],
)
def test_the_plan_warns_of_what_is_hardly_meant(
    make_dataset: MakeDataset, best: str, settings: list[str], says: str
) -> None:
    dataset = make_dataset()
    resolved = specs.prepare(keeping(*settings, best=best), dataset)
    assert [each for each in specs.plan(resolved, dataset).warnings if says in each]
    usual = specs.prepare(keeping(), dataset)
    assert not [each for each in specs.plan(usual, dataset).warnings if "output.best" in each]


def test_members_of_an_all_reduce_job_need_memory_for_it(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()

    def needed(*settings: Any) -> int:
        spec = specs.apply_sets(specs.load_yaml(BASE), settings)
        return worker_bytes(specs.prepare(spec, dataset), dataset)

    best = "output.best={metric: test/loss}"
    elements = 784 * 8 + 8 + 8 * 10 + 10
    assert needed("train.all_reduce={}", best) - needed("train.all_reduce={}") == 2 * 4 * elements
    assert needed(best) == needed(), "with a parameter server it is not theirs to keep"
