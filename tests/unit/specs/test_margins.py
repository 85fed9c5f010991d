"""The linear SVM and the optimizers that are made for it: defaults, and what goes together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.specs.parts import needs_one_range
from phalanx.specs.plan import worker_bytes
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = "name: job\ndata: {name: two}\ntrain: {model: {linear_svm: {}}, batch_size: 512, l2: 1e-3}"


@pytest.fixture
def two_classes(make_dataset: MakeDataset) -> Dataset:
    return make_dataset(name="two", classes=["no", "yes"], format="csr")


def prepared(dataset: Dataset, *settings: str) -> JobSpec:
    return specs.prepare(specs.apply_sets(specs.load_yaml(BASE), settings), dataset)


def complaints(dataset: Dataset, *settings: str) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        prepared(dataset, *settings)
    return {each.field: each.message for each in caught.value.violations}


def test_an_svm_has_a_bias_and_the_hinge_loss_unless_something_else_is_said(
    two_classes: Dataset,
) -> None:
    svm = prepared(two_classes).train.model.linear_svm
    assert (svm.bias, svm.loss) == (True, "hinge")
    setting = "train.model={linear_svm: {bias: false, loss: squared_hinge}}"
    svm = prepared(two_classes, setting).train.model.linear_svm
    assert (svm.bias, svm.loss) == (False, "squared_hinge")


def test_an_svm_is_for_two_classes_and_its_losses(
    make_dataset: MakeDataset, two_classes: Dataset
) -> None:
    found = complaints(make_dataset(name="two"))
    assert found["train.model.linear_svm"] == (
        "needs 2 classes, and two@3 has 10; use softmax_regression"
    )
    numbers = make_dataset(name="two", task="regression", classes=[])
    assert "is for classification" in complaints(numbers)["train.model.linear_svm"]
    found = complaints(two_classes, "train.model.linear_svm.loss=logistic")
    assert "use hinge or squared_hinge" in found["train.model.linear_svm.loss"]


def test_thresholds_may_name_the_metrics_of_an_svm(two_classes: Dataset) -> None:
    threshold = "train.stop.thresholds=[{metric: test/accuracy, at_least: 0.9}]"
    assert prepared(two_classes, threshold).train.evaluation.split == "test"


PEGASOS = "train.optimizer={pegasos: {}}"


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        (["train.model={mlp: {hidden: [3]}}"], "optimizer.pegasos", "linear_svm, not for mlp"),
        (["train.model.linear_svm.loss=squared_hinge"], "optimizer.pegasos", "slope is bounded"),
        (["train.l2=0"], "l2", "solves the problem with a penalty"),
        (
            ["train.optimizer.schedule={inverse_time: {decay: 1}}"],
            "optimizer.schedule",
            "1 / (l2 · step); leave it out",
        ),
        (
            ["train.optimizer.schedule={warm_up_steps: 3}"],
            "optimizer.schedule",
            "learning rate of pegasos",
        ),
        (
            ["train.local={steps: 2, outer: {pegasos: {}}}"],
            "local.outer.pegasos",
            "the outer optimizer applies differences",
        ),
    ],
)
def test_what_pegasos_does_not_go_together_with(
    two_classes: Dataset, settings: list[str], field: str, says: str
) -> None:
    assert says in complaints(two_classes, PEGASOS, *settings)[f"train.{field}"]


@pytest.mark.parametrize(
    "setting",
    [
        "train.synchronous={}",
        "train.asynchronous={}",
        "train.local={steps: 4}",
        "train.all_reduce={}",
        "train.compression={int8: {}}",
        "train.reduction={median: {}}",
        "train.optimizer.clip_norm=2",
        "data.oversample={}",
        "data.class_weights={}",
    ],
)
def test_pegasos_is_elementwise_and_goes_together_with_the_rest(
    two_classes: Dataset, setting: str
) -> None:
    resolved = prepared(two_classes, "data.shards=4", PEGASOS, setting)
    assert resolved.train.optimizer.WhichOneof("kind") == "pegasos"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.asynchronous={}", "with asynchronous each goes on by itself"),
        ("train.stale={bound: 2}", "with stale each goes on by itself"),
        ("train.local={steps: 2}", "with local each goes on by itself"),
        ("train.all_reduce={}", "each worker makes one range"),
    ],
)
def test_what_its_projection_does_not_go_together_with(
    two_classes: Dataset, setting: str, says: str
) -> None:
    found = complaints(two_classes, "train.optimizer={pegasos: {project: true}}", setting)
    assert says in found["train.optimizer.pegasos.project"]


@pytest.mark.parametrize(
    "setting",
    [
        "train.synchronous={}",
        "train.compression={int8: {}}",
        "train.reduction={median: {}}",
        "train.verification={replicas: 3}",
        "train.optimizer.clip_norm=2",
        "data.class_weights={}",
    ],
)
def test_a_projection_comes_after_whatever_makes_the_mean(
    two_classes: Dataset, setting: str
) -> None:
    projected = "train.optimizer={pegasos: {project: true}}"
    resolved = prepared(two_classes, "data.shards=4", projected, setting)
    assert needs_one_range(resolved)
    assert resolved.train.dtype == "float32", "as without the projection"
    assert not needs_one_range(prepared(two_classes, PEGASOS))


COCOA = ("train.optimizer={cocoa: {}}", "train.batch_size=0", "data.shards=6")


def test_defaults_of_cocoa(two_classes: Dataset) -> None:
    resolved = prepared(two_classes, *COCOA)
    train = resolved.train
    assert (train.optimizer.cocoa.local_passes, train.optimizer.cocoa.sigma) == (1, 6)
    assert not train.model.linear_svm.bias
    assert train.dtype == "float64"
    assert train.evaluation.split == "test"
    assert specs.prepare(resolved, two_classes) == resolved, "resolving again changes nothing"
    assert needs_one_range(resolved)


def test_without_held_out_rows_cocoa_is_evaluated_on_its_own(make_dataset: MakeDataset) -> None:
    alone = make_dataset(name="two", classes=["no", "yes"], rows={"train": 10_000})
    assert prepared(alone, *COCOA).train.evaluation.split == "train"
    assert not prepared(alone).train.HasField("evaluation")


@pytest.mark.parametrize("metric", ["primal", "dual", "duality_gap"])
def test_certificates_are_of_the_rows_that_cocoa_trains_on(
    two_classes: Dataset, metric: str
) -> None:
    rule = f"train.stop.thresholds=[{{metric: train/{metric}, at_most: 0.01}}]"
    assert prepared(two_classes, *COCOA, rule).train.evaluation.split == "train"
    best = f"output.best={{metric: train/{metric}, at_most: 0.01}}"
    assert prepared(two_classes, *COCOA, best).train.evaluation.split == "train"
    found = complaints(two_classes, *COCOA, rule.replace("train/", "test/"))
    assert "is never computed" in found["train.stop.thresholds[0].metric"]
    found = complaints(two_classes, *COCOA, rule, "train.evaluation.split=test")
    assert "is never computed" in found["train.stop.thresholds[0].metric"]
    assert "is never computed" in complaints(two_classes, rule)["train.stop.thresholds[0].metric"]


@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("train.model={logistic_regression: {}}", "train.optimizer.cocoa", "is for linear_svm"),
        ("train.model.linear_svm.loss=squared_hinge", "train.optimizer.cocoa", "are bounded"),
        ("train.model.linear_svm.bias=true", "train.model.linear_svm.bias", "must be false"),
        ("train.l2=0", "train.l2", "is missing"),
        ("train.optimizer.cocoa.local_passes=0", "train.optimizer.cocoa.local_passes", "least 1"),
        ("train.optimizer.cocoa.sigma=0", "train.optimizer.cocoa.sigma", "above 0"),
        ("train.optimizer.schedule={warm_up_steps: 2}", "train.optimizer.schedule", "none"),
        ("train.optimizer.clip_norm=1", "train.optimizer.clip_norm", "no gradient"),
        ("train.batch_size=512", "train.batch_size", "each step of cocoa reads all rows"),
        ("train.asynchronous={}", "train.asynchronous", "all contributions of a step at once"),
        ("train.stale={bound: 2}", "train.stale", "all contributions of a step at once"),
        ("train.local={steps: 2}", "train.local", "all contributions of a step at once"),
        (
            "train.local={steps: 2, outer: {cocoa: {}}}",
            "train.local.outer.cocoa",
            "applies differences",
        ),
        ("train.all_reduce={}", "train.all_reduce", "use parameter_server"),
        ("train.reduction={median: {}}", "train.reduction.median", "as they are"),
        ("train.reduction={clip_norm: 1}", "train.reduction.clip_norm", "as they are"),
        ("train.compression={int8: {}}", "train.compression.int8", "as they are"),
        (
            "train.compression={down_cast_to: float16}",
            "train.compression.down_cast_to",
            "as they are",
        ),
        ("train.on_nonfinite={skip: {}}", "train.on_nonfinite.skip", "use fail"),
        ("train.start={model: two}", "train.start.model", "dual variables"),
        ("data.class_weights={}", "data.class_weights", "counts every row once"),
        ("data.oversample={}", "data.oversample", "counts every row once"),
    ],
)
def test_what_cocoa_does_not_go_together_with(
    two_classes: Dataset, setting: str, field: str, says: str
) -> None:
    assert says in complaints(two_classes, *COCOA, setting)[field]


@pytest.mark.parametrize(
    "setting", ["train.verification={replicas: 3}", "data.rows={stratified: true}"]
)
def test_copies_and_even_shards_change_nothing_for_cocoa(
    two_classes: Dataset, setting: str
) -> None:
    two_classes.class_rows["train"].rows.extend([5000, 5000])
    assert prepared(two_classes, *COCOA, setting).train.optimizer.HasField("cocoa")


def test_a_curvature_that_is_not_safe_is_warned_of(two_classes: Dataset) -> None:
    unsafe = prepared(two_classes, *COCOA, "train.optimizer.cocoa.sigma=1")
    assert any("the job diverge" in each for each in specs.plan(unsafe, two_classes).warnings)
    safe = prepared(two_classes, *COCOA)
    assert not any("diverge" in each for each in specs.plan(safe, two_classes).warnings)


def test_the_dual_variables_of_all_rows_take_memory(two_classes: Dataset) -> None:
    cocoa = prepared(two_classes, *COCOA)
    plain = prepared(two_classes, "data.shards=6", "train.batch_size=0", "train.dtype=float64")
    more = worker_bytes(cocoa, two_classes) - worker_bytes(plain, two_classes)
    assert more > 4 * 10_000 * 8
