"""Gradients by central differences, sums, predictions, and errors that say what is wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from phalanx.errors import InvalidArgument
from phalanx.models import Batch, DataSchema, Model, UserModel, build_model
from phalanx.specs import catalog
from phalanx.v1.job_spec_pb2 import JobSpec

FEATURES = 6
ROWS = 9

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"linear_regression": {"bias": True}}, 0),
    "logistic": ({"logistic_regression": {"bias": True}}, 2),
    "logistic without bias": ({"logistic_regression": {"bias": False}}, 2),
    "svm": ({"linear_svm": {"bias": True}}, 2),
    "svm without bias": ({"linear_svm": {"loss": "hinge"}}, 2),
    "svm squared": ({"linear_svm": {"bias": True, "loss": "squared_hinge"}}, 2),
    "softmax": ({"softmax_regression": {"bias": True}}, 4),
    "mlp relu": ({"mlp": {"hidden": [5, 3], "activation": "relu"}}, 4),
    "mlp tanh": ({"mlp": {"hidden": [5], "activation": "tanh"}}, 3),
    "mlp sigmoid": ({"mlp": {"hidden": [4], "activation": "sigmoid"}}, 2),
    "mlp regression": ({"mlp": {"hidden": [5], "loss": "squared_error"}}, 0),
}


def make(name: str, dtype: str = "float64") -> tuple[Model, int]:
    spec, classes = MODELS[name]
    model = build_model(JobSpec(train={"model": spec}), DataSchema(FEATURES, classes, dtype))
    return model, classes


@pytest.mark.parametrize("name", MODELS)
def test_what_job_files_are_checked_against_is_what_is_built(name: str) -> None:
    spec, classes = MODELS[name]
    known = catalog.tensor_shapes(JobSpec(train={"model": spec}).train.model, FEATURES, classes)
    layout = make(name)[0].layout
    assert list(known.items()) == [(each.name, tuple(each.shape)) for each in layout.tensors]


def batch_for(classes: int, sparse: bool, dtype: str = "float64") -> Batch:
    rng = np.random.default_rng(11)
    dense = rng.standard_normal((ROWS, FEATURES)).astype(dtype)
    dense[rng.random(dense.shape) < 0.4] = 0
    targets = rng.integers(0, classes, ROWS) if classes else rng.standard_normal(ROWS).astype(dtype)
    return Batch(scipy.sparse.csr_array(dense) if sparse else dense, targets)


def start(model: Model) -> np.ndarray:
    rng = np.random.default_rng(2)
    return rng.standard_normal(model.layout.element_count) * 0.5


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_agree_with_central_differences(name: str, sparse: bool) -> None:
    model, classes = make(name)
    batch, w = batch_for(classes, sparse), start(model)
    gradient = np.empty_like(w)
    sums = model.gradient(w, batch, gradient)
    assert sums.count == ROWS
    scratch = np.empty_like(w)
    for index in range(len(w)):
        high, low = w.copy(), w.copy()
        high[index] += 1e-6
        low[index] -= 1e-6
        rise = model.gradient(high, batch, scratch).loss_sum
        fall = model.gradient(low, batch, scratch).loss_sum
        assert gradient[index] == pytest.approx((rise - fall) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_is_a_sum_over_rows(name: str) -> None:
    model, classes = make(name)
    batch, w = batch_for(classes, sparse=False), start(model)
    whole = np.empty_like(w)
    sums = model.gradient(w, batch, whole)
    parts, loss = np.zeros_like(w), 0.0
    for row in range(ROWS):
        one = np.empty_like(w)
        features = batch.features[row : row + 1]
        loss += model.gradient(w, Batch(features, batch.targets[row : row + 1]), one).loss_sum
        parts += one
    np.testing.assert_allclose(whole, parts, rtol=1e-10, atol=1e-12)
    assert sums.loss_sum == pytest.approx(loss)


@pytest.mark.parametrize("name", MODELS)
def test_equal_arguments_give_equal_bits(name: str) -> None:
    model, classes = make(name, "float32")
    batch, w = batch_for(classes, False, "float32"), start(model).astype(np.float32)
    first, second = np.empty_like(w), np.empty_like(w)
    one = model.gradient(w, batch, first)
    model.evaluate(w, batch)
    two = make(name, "float32")[0].gradient(w, batch, second)
    assert first.tobytes() == second.tobytes()
    assert one == two
    assert first.dtype == np.float32


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_agrees_with_gradient_and_prediction(name: str) -> None:
    model, classes = make(name)
    batch, w = batch_for(classes, sparse=False), start(model)
    sums = dict(zip(model.evaluation_sums, model.evaluate(w, batch), strict=True))
    loss = model.gradient(w, batch, np.empty_like(w)).loss_sum
    assert sums["loss"] == pytest.approx(loss)
    predictions = model.predict(w, batch.features)
    if name.startswith("svm"):
        assert predictions.shape == (ROWS,)
        assert sums["correct"] == ((predictions > 0) == batch.targets).sum()
    elif classes:
        assert predictions.shape == (ROWS, classes)
        np.testing.assert_allclose(predictions.sum(axis=1), 1)
        assert sums["correct"] == (predictions.argmax(axis=1) == batch.targets).sum()
    else:
        error = predictions - batch.targets
        assert sums["squared_error"] == pytest.approx((error**2).sum())
        assert sums["absolute_error"] == pytest.approx(np.abs(error).sum())


@pytest.mark.parametrize("name", ["logistic without bias", "softmax"])
def test_accuracy_counts_what_is_predicted_also_where_classes_tie(name: str) -> None:
    """Scores so close that the probabilities round to the same number."""
    model, classes = make(name, "float32")
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(model.layout.element_count) * 3e-8).astype(np.float32)
    features = rng.standard_normal((500, FEATURES)).astype(np.float32)
    targets = rng.integers(0, classes, 500)
    predicted = model.predict(w, features).argmax(axis=1)
    sums = dict(
        zip(model.evaluation_sums, model.evaluate(w, Batch(features, targets)), strict=True)
    )
    assert sums["correct"] == (predicted == targets).sum()
    assert len(set(model.predict(w, features).max(axis=1))) < 10


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_the_margin_are_those_of_their_formulas(loss: str, weighted: bool) -> None:
    model, _ = make("svm squared" if loss == "squared_hinge" else "svm")
    batch, w = batch_for(2, sparse=False), start(model)
    weights = np.linspace(0.5, 2, ROWS) if weighted else None
    signs = np.where(batch.targets == 1, 1.0, -1.0)
    margins = signs * (batch.features @ w[:FEATURES] + w[FEATURES])
    short = np.maximum(0, 1 - margins)
    assert 0 < np.count_nonzero(short) < ROWS
    each = short if loss == "hinge" else short**2
    slopes = -signs * (short > 0) if loss == "hinge" else -2 * signs * short
    by_row = np.ones(ROWS) if weights is None else weights
    out = np.empty_like(w)
    sums = model.gradient(w, Batch(batch.features, batch.targets, weights), out)
    assert sums.loss_sum == pytest.approx(each @ by_row, rel=1e-14)
    np.testing.assert_allclose(out[:FEATURES], batch.features.T @ (slopes * by_row), rtol=1e-12)
    assert out[FEATURES] == pytest.approx(slopes @ by_row)


def test_the_gradient_of_a_hinge_is_a_subgradient_also_at_its_kinks() -> None:
    """It supports the convex loss from below: loss(v) >= loss(w) + g · (v - w) for all v."""
    model, _ = make("svm without bias")
    features = np.array([[1.0, 0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    batch = Batch(features, np.array([1, 0, 1]))
    kinks = np.array([1.0, -0.5, 0, 0, 0, 0])  # both first rows have a margin of exactly 1
    out, scratch = np.empty(FEATURES), np.empty(FEATURES)
    loss = model.gradient(kinks, batch, out).loss_sum
    assert out.tolist() == [-1, -1, 0, 0, 0, 0], "of the third row alone"
    rng = np.random.default_rng(3)
    for scale in (1e-3, 1.0, 30.0):
        for _ in range(50):
            other = kinks + scale * rng.standard_normal(FEATURES)
            lower = loss + out @ (other - kinks)
            assert model.gradient(other, batch, scratch).loss_sum >= lower - 1e-12


def test_extreme_scores_stay_finite() -> None:
    for name in ("logistic", "softmax", "svm"):
        model, classes = make(name, "float32")
        w = np.full(model.layout.element_count, 1e4, np.float32)
        batch = batch_for(classes, False, "float32")
        out = np.empty_like(w)
        sums = model.gradient(w, batch, out)
        assert np.isfinite(out).all()
        assert np.isfinite(sums.loss_sum)


def test_initial_parameters_are_keyed_by_seed_and_biases_do_not_decay() -> None:
    model, _ = make("mlp relu")
    assert np.array_equal(model.initial_parameters(3), model.initial_parameters(3))
    assert not np.array_equal(model.initial_parameters(3), model.initial_parameters(4))
    decays = {tensor.name: tensor.decay for tensor in model.layout.tensors}
    assert decays["layers.0.weights"]
    assert not decays["layers.0.bias"]


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        ({"logistic_regression": {}}, 3, "needs 2 classes, the data has 3"),
        ({"linear_svm": {}}, 3, "needs 2 classes, the data has 3; softmax_regression takes any"),
        ({"linear_regression": {}}, 2, "predicts numbers, but the data has 2 classes"),
        ({"softmax_regression": {}}, 0, "needs 2 classes or more"),
        ({"mlp": {"hidden": [3], "activation": "softsign"}}, 2, "'softsign' is not one of"),
        ({}, 2, "no model is named"),
    ],
)
def test_models_that_do_not_fit_the_data(model: dict[str, Any], classes: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build_model(JobSpec(train={"model": model}), DataSchema(4, classes))


class Scaled(UserModel):
    """A user's model: one weight per feature, absolute loss."""

    def __init__(self, schema: DataSchema, gain: int = 1) -> None:
        super().__init__(schema, {"w": (schema.features, 1)})
        self.gain = gain

    def initial(self, seed: int) -> Mapping[str, Any]:
        return {"w": np.full((4, 1), float(self.gain))}

    def loss_and_gradients(
        self, parameters: Mapping[str, Any], features: Any, targets: Any
    ) -> tuple[float, Mapping[str, Any]]:
        error = (features @ parameters["w"])[:, 0] - targets
        return float(np.abs(error).sum()), {"w": features.T @ np.sign(error)[:, None]}


def test_a_user_model_comes_from_a_file_and_gets_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "my_net_a.py").write_text(
        "import numpy as np\n"
        "from phalanx.models import UserModel\n"
        "class Net(UserModel):\n"
        "    def __init__(self, schema, gain):\n"
        "        assert type(gain) is int\n"
        "        super().__init__(schema, {'w': (schema.features,)})\n"
        "    def initial(self, seed):\n"
        "        return {'w': np.ones(4)}\n"
        "    def loss_and_gradients(self, p, x, y):\n"
        "        e = x @ p['w'] - y\n"
        "        return float(e @ e) / 2, {'w': x.T @ e}\n"
        "build = Net\n"
    )
    spec = JobSpec()
    spec.train.model.custom.entrypoint = "my_net_a:build"
    spec.train.model.custom.arguments.update({"gain": 3})
    model = build_model(spec, DataSchema(4, 0, "float64"), tmp_path)
    w = model.initial_parameters(0)
    x, y = np.eye(4), np.zeros(4)
    out = np.empty_like(w)
    assert model.gradient(w, Batch(x, y), out).loss_sum == 2.0
    assert out.tolist() == [1.0] * 4
    assert model.evaluate(w, Batch(x, y)).tolist() == [2.0]


@pytest.mark.parametrize(
    ("source", "entrypoint", "message"),
    [
        ("", "nowhere_b:build", "no module 'nowhere_b'"),
        ("x = 1\n", "my_net_c:build", "no function 'build'"),
        ("", "my_net_d", "not of the form module:function"),
        ("def build(schema): return object()\n", "my_net_e:build", "without layout"),
    ],
)
def test_entrypoints_that_are_not_there(
    tmp_path: Path, source: str, entrypoint: str, message: str
) -> None:
    name = entrypoint.partition(":")[0]
    if not name.startswith("nowhere"):
        (tmp_path / f"{name}.py").write_text(source)
    spec = JobSpec()
    spec.train.model.custom.entrypoint = entrypoint
    with pytest.raises(InvalidArgument, match=message):
        build_model(spec, DataSchema(4, 0), tmp_path)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"v": np.zeros((4, 1))}, r"returned the tensors \['v'\]; the model has \['w'\]"),
        ({"w": np.zeros(4)}, r"shape \(4,\) instead of \(4, 1\)"),
    ],
)
def test_a_user_model_with_wrong_gradients_is_named(
    gradients: Mapping[str, Sequence[float]], message: str
) -> None:
    class Wrong(Scaled):
        def loss_and_gradients(self, parameters: Any, features: Any, targets: Any) -> Any:
            return 0.0, gradients

    model = Wrong(DataSchema(4, 0, "float64"))
    w = model.initial_parameters(0)
    with pytest.raises(InvalidArgument, match=message):
        model.gradient(w, Batch(np.eye(4), np.zeros(4)), np.empty_like(w))
