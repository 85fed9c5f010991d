"""The linear SVM and the optimizers that are made for it: defaults, and what goes together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
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
    ],
)
def test_pegasos_is_elementwise_and_goes_together_with_the_rest(
    two_classes: Dataset, setting: str
) -> None:
    resolved = prepared(two_classes, "data.shards=4", PEGASOS, setting)
    assert resolved.train.optimizer.WhichOneof("kind") == "pegasos"
