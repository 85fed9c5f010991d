"""PyTorch modules as models: gradients, buffers, chance, losses, and what cannot be a model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.models import Batch, DataSchema, Model, build_model
from phalanx.models.base import views
from phalanx.testing.datasets import classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.leaf import leaf_batch
from phalanx.training.local import train_in_process
from phalanx.training.metrics import metrics_from_sums
from phalanx.v1.job_spec_pb2 import JobSpec

FEATURES, CLASSES, ROWS = 6, 3, 20

NET = '''
"""Modules for the tests; all take what the data look like first."""

import torch
from torch import nn


def linear(schema, outputs=0, bias=True):
    return nn.Linear(schema.features, outputs or max(schema.classes, 1), bias=bias)


def mlp(schema, width=8, dropout=0.0):
    return nn.Sequential(
        nn.Linear(schema.features, width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, max(schema.classes, 1)))


class Normed(nn.Module):
    """Batch normalisation, a buffer that is not stored, and one of whole numbers."""

    def __init__(self, schema, frozen=False, momentum=0.1):
        super().__init__()
        self.first = nn.Linear(schema.features, 5)
        self.norm = nn.BatchNorm1d(5, momentum=momentum)
        self.last = nn.Linear(5, schema.classes)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("calls", torch.tensor(0))
        self.first.weight.requires_grad_(not frozen)

    def forward(self, x):
        self.calls += 1
        self.scale *= 1 if self.calls == 1 else 100
        return self.last(self.norm(self.first(x)) * self.scale)


def log_softmax(schema):
    return nn.Sequential(linear(schema), nn.LogSoftmax(dim=1))


def lazy(schema):
    return nn.LazyLinear(schema.classes)


def not_one(schema):
    return "a module"


def pair(schema):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear(schema)

        def forward(self, x):
            return self.inner(x), None
    return Pair()


class Words(nn.Module):
    """Its gradient is a sparse tensor."""

    def __init__(self, schema, sparse):
        super().__init__()
        self.words = nn.Embedding(4, schema.classes, sparse=sparse)

    def forward(self, x):
        return self.words((x[:, 0] > 0).long())


class Greedy(nn.Module):
    def __init__(self, schema):
        super().__init__()
        self.layer = linear(schema)

    def forward(self, x):
        return self.layer(x) + torch.ones(1 << 48).sum()


COUNT = [0]


def another_each_time(schema):
    COUNT[0] += 1
    return nn.Linear(schema.features, schema.classes, bias=COUNT[0] == 1)


def smoothed(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="none")


def mean_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)
'''

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: pip install 'phalanx[torch]'",
)

Make = Callable[..., Model]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.fixture
def make(code: Path) -> Make:
    def build(
        function: str = "linear",
        loss: str = "cross_entropy",
        classes: int = CLASSES,
        dtype: str = "float64",
        gpus: int = 0,
        **arguments: Any,
    ) -> Model:
        spec = JobSpec(name="job", seed=5)
        spec.resources.gpus = gpus
        spec.train.model.torch.module = f"net:{function}"
        spec.train.model.torch.loss = loss
        spec.train.model.torch.arguments.update(arguments)
        return build_model(spec, DataSchema(FEATURES, classes, dtype), code)

    return build


def batch(classes: int = CLASSES, rows: int = ROWS, dtype: str = "float64", **more: Any) -> Batch:
    random = np.random.default_rng(7)
    features = random.normal(size=(rows, FEATURES)).astype(dtype)
    targets = np.arange(rows) % classes if classes else random.normal(size=rows).astype(dtype)
    return Batch(features, targets, **more)


def gradient_of(model: Model, parameters: Any, rows: Batch) -> tuple[Any, float]:
    out = np.full_like(parameters, np.nan)
    sums = model.gradient(parameters, rows, out)
    assert sums.count == rows.rows
    return out, sums.loss_sum


@needs_torch
@pytest.mark.parametrize(
    ("function", "loss", "classes"),
    [
        ("mlp", "cross_entropy", 3),
        ("log_softmax", "nll_loss", 3),
        ("mlp", "net:smoothed", 3),
        ("mlp", "mse_loss", 0),
        ("mlp", "huber_loss", 0),
        ("linear", "poisson_nll_loss", 0),
    ],
)
def test_the_gradient_is_that_of_the_sum_over_the_rows(
    make: Make, function: str, loss: str, classes: int
) -> None:
    model, rows = make(function, loss, classes), batch(classes)
    parameters = model.initial_parameters(1)
    gradient, _ = gradient_of(model, parameters, rows)
    for index in range(0, len(parameters), 5):
        ends = []
        for change in (1e-6, -1e-6):
            moved = parameters.copy()
            moved[index] += change
            ends.append(gradient_of(model, moved, rows)[1])
        assert gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-6)


@needs_torch
def test_rows_count_by_their_weights(make: Make) -> None:
    model = make("mlp")
    parameters = model.initial_parameters(1)
    rows = batch(rows=6)
    weights = np.array([2.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    weighed, loss = gradient_of(model, parameters, batch(rows=6, weights=weights))
    twice = np.array([0, 0, 2, 5])
    chosen = Batch(rows.features[twice], rows.targets[twice])
    written, same_loss = gradient_of(model, parameters, chosen)
    np.testing.assert_allclose(weighed, written, rtol=0, atol=1e-12)
    assert loss == pytest.approx(same_loss, abs=1e-12)


@needs_torch
def test_the_seed_of_the_job_is_that_of_torch(make: Make) -> None:
    import torch

    model = make("linear", dtype="float32")
    torch.manual_seed(11)
    by_hand = torch.nn.Linear(FEATURES, CLASSES)
    vector = model.initial_parameters(11)
    assert [each.name for each in model.layout.tensors] == ["weight", "bias"]
    assert [each.decay for each in model.layout.tensors] == [True, False]
    np.testing.assert_array_equal(
        views(model.layout, vector)["weight"], by_hand.weight.detach().numpy()
    )
    assert (model.initial_parameters(12) != vector).any()


@needs_torch
def test_a_leaf_depends_on_nothing_but_its_arguments(make: Make) -> None:
    model = make("Normed", momentum=None)
    rows, parameters = batch(key=(1, 2, 3)), model.initial_parameters(1)
    first, loss = gradient_of(model, parameters, rows)
    for other in (parameters * 2, parameters):
        model.evaluate(other, rows)
        gradient_of(model, other, rows)
    again, same_loss = gradient_of(model, parameters, rows)
    assert first.tobytes() == again.tobytes()
    assert loss == same_loss
    fresh, _ = gradient_of(make("Normed", momentum=None), parameters, rows)
    assert first.tobytes() == fresh.tobytes()


@needs_torch
def test_running_statistics_become_those_of_the_rows_times_the_examples(make: Make) -> None:
    model, rows = make("Normed"), batch()
    buffers = [each.name for each in model.layout.tensors if each.buffer]
    assert buffers == ["norm.running_mean", "norm.running_var"]
    assert not any(each.decay for each in model.layout.tensors if each.buffer)
    parameters = model.initial_parameters(1)
    named = views(model.layout, parameters)
    out = views(model.layout, gradient_of(model, parameters, rows)[0])
    hidden = rows.features @ named["first.weight"].T + named["first.bias"]
    expected = 0.9 * named["norm.running_mean"] + 0.1 * hidden.mean(axis=0)
    np.testing.assert_allclose(out["norm.running_mean"], expected * ROWS, rtol=1e-12)
    expected = 0.9 * named["norm.running_var"] + 0.1 * hidden.var(axis=0, ddof=1)
    np.testing.assert_allclose(out["norm.running_var"], expected * ROWS, rtol=1e-12)


@needs_torch
def test_batch_normalisation_over_a_whole_job(
    make: Make, code: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The running mean of the last version is the mean over the rows of the last step."""
    features, targets = classification(560, FEATURES, CLASSES)
    stored = store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2)
    document = {
        "model": {"torch": {"module": "net:Normed", "loss": "cross_entropy"}},
        "optimizer": {"adam": {"learning_rate": 0.05}},
        "batch_size": 96,
        "stop": {"steps": 30},
        "dtype": "float64",
        "evaluation": {"every_steps": 30},
    }
    plan = plan_for(stored, document, data={"name": "data", "shards": 3}, seed=5)
    trained = train_in_process(plan, stored.manifest, stored.fetch, code_dir=code)
    assert trained.metrics["test/accuracy"] > 0.9
    shorter = train_in_process(plan, stored.manifest, stored.fetch, code_dir=code, until_step=29)
    model = make("Normed")
    ends, counts = [], []
    for shard in range(3):
        rows = leaf_batch(stored.reader("train", np.float64), plan, shard, 29)
        assert rows is not None
        out, _ = gradient_of(model, shorter.parameters, rows)
        ends.append(views(model.layout, out)["norm.running_mean"] / rows.rows)
        counts.append(rows.rows)
    found = views(model.layout, trained.parameters)["norm.running_mean"]
    np.testing.assert_allclose(found, np.average(ends, axis=0, weights=counts), rtol=0, atol=1e-12)


@needs_torch
def test_what_is_frozen_keeps_its_value(make: Make) -> None:
    model = make("Normed", frozen=True)
    parameters = model.initial_parameters(1)
    out = views(model.layout, gradient_of(model, parameters, batch())[0])
    assert not out["first.weight"].any()
    assert out["first.bias"].any()
    assert not model.layout.tensors[0].decay


@needs_torch
def test_chance_goes_by_seed_shard_and_step_and_leaves_others_alone(make: Make) -> None:
    import torch

    model = make("mlp", dropout=0.5)
    parameters = model.initial_parameters(1)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]
    drawn = {key: gradient_of(model, parameters, batch(key=key))[0].tobytes() for key in keys}
    assert len(set(drawn.values())) == len(keys)
    for key in keys:
        assert gradient_of(model, parameters, batch(key=key))[0].tobytes() == drawn[key]
    model.predict(parameters, batch().features)
    assert torch.equal(torch.rand(4), expected)


@needs_torch
def test_settings_are_put_back(make: Make) -> None:
    import torch

    threads = torch.get_num_threads()
    model = make("mlp")
    torch.set_num_threads(2)
    try:
        gradient_of(model, model.initial_parameters(1), batch())
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)


@needs_torch
def test_sparse_rows_are_made_dense(make: Make) -> None:
    model, rows = make("mlp"), batch()
    parameters = model.initial_parameters(1)
    sparse = Batch(scipy.sparse.csr_array(rows.features), rows.targets)
    dense, _ = gradient_of(model, parameters, rows)
    assert gradient_of(model, parameters, sparse)[0].tobytes() == dense.tobytes()


@needs_torch
@pytest.mark.parametrize(
    ("function", "loss", "classes", "outputs"),
    [
        ("linear", "cross_entropy", 3, 0),
        ("log_softmax", "nll_loss", 3, 0),
        ("linear", "binary_cross_entropy_with_logits", 2, 1),
        ("linear", "net:smoothed", 3, 0),
    ],
)
def test_predictions_are_probabilities_and_metrics_count_them(
    make: Make, function: str, loss: str, classes: int, outputs: int
) -> None:
    arguments = {"outputs": outputs} if outputs else {}
    model, rows = make(function, loss, classes, **arguments), batch(classes)
    parameters = model.initial_parameters(1)
    probabilities = model.predict(parameters, rows.features)
    assert probabilities.shape == (ROWS, classes)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    named = dict(zip(model.evaluation_sums, model.evaluate(parameters, rows), strict=True))
    assert named["correct"] == (probabilities.argmax(axis=1) == rows.targets).sum()
    assert named["loss"] == pytest.approx(gradient_of(model, parameters, rows)[1], rel=1e-12)
    if loss != "net:smoothed":
        chosen = probabilities[np.arange(ROWS), rows.targets]
        assert named["loss"] == pytest.approx(-np.log(chosen).sum(), rel=1e-9)


@needs_torch
def test_numbers_are_predicted_and_measured(make: Make) -> None:
    model, rows = make("linear", "mse_loss", 0), batch(0)
    parameters = model.initial_parameters(1)
    values = model.predict(parameters, rows.features)
    named = views(model.layout, parameters)
    expected = rows.features @ named["weight"][0] + named["bias"]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    sums = model.evaluate(parameters, rows)
    metrics = metrics_from_sums("test", model.evaluation_sums, sums.tolist(), ROWS)
    assert metrics["test/rmse"] == pytest.approx(np.sqrt(np.mean((values - rows.targets) ** 2)))
    rates = make("linear", "poisson_nll_loss", 0).predict(parameters, rows.features)
    np.testing.assert_allclose(rates, np.exp(values), rtol=1e-12)


@needs_torch
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("not_one", r"net:not_one returned a str; it must return a torch\.nn\.Module"),
        ("lazy", "the parameter 'weight' has no shape before the module has seen rows"),
    ],
)
def test_what_is_no_module_of_known_shape(make: Make, function: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make(function)


@needs_torch
def test_a_module_that_depends_on_more_than_its_arguments(make: Make) -> None:
    model = make("another_each_time")
    with pytest.raises(InvalidArgument, match="built two modules with different tensors"):
        model.initial_parameters(1)


@needs_torch
@pytest.mark.parametrize(
    ("function", "loss", "classes", "message"),
    [
        ("pair", "cross_entropy", 3, "must return a tensor, not tuple"),
        ("linear", "net:mean_loss", 3, r"the loss of each row, \(20,\), and returned the shape"),
        ("linear", "binary_cross_entropy_with_logits", 2, r"the shape \(20,\) or \(20, 1\)"),
    ],
)
def test_wrong_outputs_and_losses_are_told_with_the_shape(
    make: Make, function: str, loss: str, classes: int, message: str
) -> None:
    model = make(function, loss, classes)
    with pytest.raises(InvalidArgument, match=message):
        gradient_of(model, model.initial_parameters(1), batch(classes))


@needs_torch
@pytest.mark.parametrize(
    ("loss", "classes", "message"),
    [
        ("mse_loss", 3, "is no loss for classification; use one of cross_entropy, nll_loss"),
        ("cross_entropy", 0, "is no loss for regression; use one of mse_loss, l1_loss"),
        ("binary_cross_entropy_with_logits", 3, "needs 2 classes, the data has 3"),
        ("net:nothing", 3, "module 'net' has no function 'nothing'"),
    ],
)
def test_losses_that_do_not_fit(make: Make, loss: str, classes: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make("linear", loss, classes)


@needs_torch
def test_a_job_that_asks_for_a_gpu_computes_on_nothing_else(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPrecondition, match=r"PyTorch .* sees none here") as caught:
        make("mlp", gpus=1)
    assert caught.value.reason == "NO_GPU"


@needs_torch
def test_a_loss_may_be_a_module_with_weights_in_any_dtype(make: Make) -> None:
    model, rows = make("mlp", "net:weighted"), batch()
    parameters = model.initial_parameters(1)
    weights = np.array([1.0, 2.0, 3.0])[rows.targets]
    weighed = gradient_of(model, parameters, rows)
    by_hand = gradient_of(make("mlp"), parameters, batch(weights=weights))
    np.testing.assert_allclose(weighed[0], by_hand[0], rtol=1e-12, atol=1e-12)
    assert weighed[1] == pytest.approx(by_hand[1], rel=1e-12)


@needs_torch
def test_sparse_gradients_are_written_like_others(make: Make) -> None:
    dense, sparse = make("Words", sparse=False), make("Words", sparse=True)
    parameters = dense.initial_parameters(1)
    expected, _ = gradient_of(dense, parameters, batch())
    found, _ = gradient_of(sparse, parameters, batch())
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert found.any()


@needs_torch
def test_a_leaf_without_enough_memory_says_what_to_change(make: Make) -> None:
    model = make("Greedy")
    with pytest.raises(MemoryError, match="use a smaller batch_size or more shards") as caught:
        gradient_of(model, model.initial_parameters(1), batch())
    assert "you tried to allocate" in str(caught.value)


@needs_torch
def test_gradients_are_computed_where_somebody_has_switched_them_off(make: Make) -> None:
    import torch

    model = make("mlp")
    parameters = model.initial_parameters(1)
    expected, _ = gradient_of(model, parameters, batch())
    with torch.no_grad():
        found, _ = gradient_of(model, parameters, batch())
        assert not torch.is_grad_enabled()
    assert found.tobytes() == expected.tobytes()


@needs_torch
def test_the_version_of_torch_is_part_of_what_workers_have_in_common(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from phalanx.models.torch_golden import golden

    first = getattr(make("mlp"), "numeric_fingerprint")  # noqa: B009 - no part of the protocol
    golden.cache_clear()
    assert golden("cpu") == first
    golden.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert golden("cpu") != first
    golden.cache_clear()


def test_without_torch_the_job_says_what_to_install(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'phalanx\[torch\]'") as caught:
        make("linear")
    assert caught.value.reason == "EXTRA_MISSING"
