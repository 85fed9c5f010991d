"""Training inside one process: the algorithm itself, and everything that must not change it."""

import functools
import hashlib
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.blas import one_blas_thread
from phalanx.data.statistics import manifest_mean_and_scale
from phalanx.errors import FailedPrecondition
from phalanx.models import DataSchema, build_model
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer
from phalanx.reduction import Node, TreeReducer, cover, full_mask, reduce_leaves
from phalanx.testing.datasets import (
    StoredDataset,
    classification,
    regression,
    sparse_classification,
    store,
)
from phalanx.testing.plans import plan_for
from phalanx.training.leaf import run_leaf
from phalanx.training.local import Progress, TrainedModel, train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

MLP = {"mlp": {"hidden": [9]}}
ADAM = {"adam": {"learning_rate": 0.01}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(700, 8, 3)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2, chunk_bytes=4096)


def small_plan(dataset: StoredDataset, **train: Any) -> JobPlan:
    known = {"model": MLP, "optimizer": ADAM, "batch_size": 112, "stop": {"steps": 7}, "l2": 0.01}
    return plan_for(dataset, {**known, **train}, data={"name": "data", "shards": 7}, seed=3)


def train(dataset: StoredDataset, plan: JobPlan, **options: Any) -> TrainedModel:
    return train_in_process(plan, dataset.manifest, dataset.fetch, **options)


def on_workers(dataset: StoredDataset, plan: JobPlan, seed: int, arrival_order: bool) -> str:
    """The same job on pretended workers and ranges, which change at every step.

    Nodes arrive shuffled and some of them twice. ``arrival_order`` sums as they arrive instead of
    along the tree, which is what the tree is there to avoid.
    """
    draw = random.Random(seed)
    spec = JobSpec.FromString(plan.spec)
    schema = DataSchema(dataset.manifest.features, len(dataset.manifest.classes), spec.train.dtype)
    model, reader = build_model(spec, schema), dataset.reader("train", spec.train.dtype)
    optimizer, decay = build_optimizer(spec.train, plan.total_steps), decay_mask(model.layout)
    assert decay is not None
    w = model.initial_parameters(spec.seed)
    state = {name: np.zeros_like(w) for name in optimizer.state_names}
    for step in range(plan.total_steps):
        cuts = sorted({0, plan.shards, *draw.choices(range(1, plan.shards), k=3)})
        arrivals = [n for a, b in itertools.pairwise(cuts) for n in cover(a, b, plan.shards)]
        arrivals += draw.choices(arrivals, k=2) if not arrival_order else []
        draw.shuffle(arrivals)
        tree, count = TreeReducer(plan.shards), 0
        running = np.zeros_like(w)
        leaf = functools.partial(run_leaf, model, w, reader, plan)
        for node in arrivals:
            vector, examples = node_payload(node, plan, leaf, step, w)
            running += vector
            if tree.fill(node, vector, full_mask(node, plan.shards)):
                count += examples
        gradient = running if arrival_order else tree.result[0]
        updated = np.empty_like(w)
        ends = sorted({0, len(w), *draw.choices(range(1, len(w)), k=2)})
        for first, stop in itertools.pairwise(ends):
            piece = slice(first, stop)
            pieces = {name: vector[piece] for name, vector in state.items()}
            optimizer.apply(
                w[piece], gradient[piece], count, decay[piece], pieces, step, updated[piece]
            )
        w = updated
    return hashlib.sha256(w.tobytes()).hexdigest()


def node_payload(node: Node, plan: JobPlan, leaf: Any, step: int, like: Any) -> tuple[Any, int]:
    """What a worker that hosts a node sends: its leaves, reduced."""
    payloads, count = {}, 0
    for shard in range(node.first, min(node.first + node.span, plan.shards)):
        out = np.empty_like(like)
        count += leaf(shard, step, out).count
        payloads[shard - node.first] = out
    return reduce_leaves(payloads, node.span), count


@given(seed=st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_who_computes_what_when_and_how_often_does_not_change_a_bit(
    dataset: StoredDataset, seed: int
) -> None:
    plan = small_plan(dataset)
    with one_blas_thread():
        assert on_workers(dataset, plan, seed, False) == train(dataset, plan).parameters_sha256


def test_summing_in_arrival_order_would_change_the_answer(dataset: StoredDataset) -> None:
    plan = small_plan(dataset)
    with one_blas_thread():
        found = {on_workers(dataset, plan, seed, arrival_order=True) for seed in range(5)}
    assert len(found) == 5
    assert train(dataset, plan).parameters_sha256 not in found


def full_batch_reference(dataset: StoredDataset, steps: int, rate: float, l2: float) -> Any:
    """Softmax regression by gradient descent in plain NumPy, on all rows at once."""
    batch = dataset.reader("train", np.float64)
    from phalanx.training.sampler import rows_in_order, shard_rows

    rows = batch.rows(rows_in_order(shard_rows(0, 1, batch.chunk_rows)))
    scales = manifest_mean_and_scale(dataset.manifest, np.float64)
    assert scales is not None
    x = (rows.features - scales[0]) * scales[1]
    y = np.eye(3)[rows.targets]
    w, b = np.zeros((x.shape[1], 3)), np.zeros(3)
    for _ in range(steps):
        z = x @ w + b
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        w, b = (
            w - rate * (x.T @ (p - y) / len(x) + l2 * w),
            b - rate * (p - y).mean(axis=0),
        )
    return np.concatenate([w.ravel(), b])


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8, 64])
def test_any_number_of_shards_agrees_with_one_full_batch_in_numpy(
    dataset: StoredDataset, shards: int
) -> None:
    plan = plan_for(
        dataset,
        {
            "model": {"softmax_regression": {"bias": True}},
            "optimizer": {"sgd": {"learning_rate": 0.5}},
            "stop": {"steps": 40},
            "l2": 0.01,
            "dtype": "float64",
        },
        data={"name": "data", "shards": shards},
    )
    expected = full_batch_reference(dataset, 40, 0.5, 0.01)
    np.testing.assert_allclose(train(dataset, plan).parameters, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "model",
    [
        MLP,
        {"mlp": {"hidden": [6, 5], "activation": "tanh"}},
        {"softmax_regression": {"bias": False}},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_job_run_twice_is_equal_and_learns(
    dataset: StoredDataset, model: dict[str, Any], dtype: str
) -> None:
    plan = small_plan(dataset, model=model, dtype=dtype, stop={"steps": 60})
    first, second = train(dataset, plan), train(dataset, plan)
    assert first.parameters_sha256 == second.parameters_sha256
    assert first.parameters.dtype == dtype
    assert first.parameters_sha256 == hashlib.sha256(first.parameters.tobytes()).hexdigest()
    assert first.metrics["test/accuracy"] > 0.7


def test_the_seed_changes_the_answer(dataset: StoredDataset) -> None:
    plan = small_plan(dataset)
    spec = JobSpec.FromString(plan.spec)
    spec.seed += 1
    other = JobPlan()
    other.CopyFrom(plan)
    other.spec = spec.SerializeToString()
    assert train(dataset, plan).parameters_sha256 != train(dataset, other).parameters_sha256


def test_regression_and_sparse_data(tmp_path: Path) -> None:
    features, numbers = regression(400)
    dense = store(tmp_path / "dense", features, numbers, test=0.25)
    plan = plan_for(
        dense,
        {
            "model": {"linear_regression": {}},
            "optimizer": {"sgd": {"learning_rate": 0.5, "momentum": 0.5, "nesterov": True}},
            "stop": {"steps": 50},
        },
    )
    metrics = train(dense, plan).metrics
    assert metrics["test/r2"] > 0.99
    assert metrics["test/rmse"] ** 2 == pytest.approx(2 * metrics["test/loss"])

    sparse_features, targets = sparse_classification(800, 30)
    sparse = store(tmp_path / "sparse", sparse_features, targets, test=0.25)
    plan = plan_for(
        sparse,
        {
            "model": {"logistic_regression": {}},
            "optimizer": {"adagrad": {"learning_rate": 0.3}},
            "batch_size": 128,
            "stop": {"epochs": 20},
        },
    )
    assert train(sparse, plan).metrics["test/accuracy"] > 0.85


def test_sparse_and_dense_rows_agree(tmp_path: Path) -> None:
    features, targets = sparse_classification(300, 20)
    found = []
    for name, rows in (("sparse", features), ("dense", scipy.sparse.csr_array(features).toarray())):
        stored = store(tmp_path / name, rows, targets)
        model = {"logistic_regression": {}, "standardise": False}
        sgd = {"sgd": {"learning_rate": 0.5}}
        job = {"model": model, "optimizer": sgd, "stop": {"steps": 30}, "dtype": "float64"}
        found.append(train(stored, plan_for(stored, job)).parameters)
    np.testing.assert_allclose(found[0], found[1], atol=1e-12)


def test_stopping_progress_and_points(dataset: StoredDataset) -> None:
    rule = {"metric": "test/accuracy", "at_least": 0.5}
    plan = small_plan(
        dataset, stop={"steps": 200, "thresholds": [rule]}, evaluation={"every_steps": 3}
    )
    seen: list[Progress] = []
    result = train(dataset, plan, on_progress=seen.append)
    assert result.reason == "STOP_THRESHOLD"
    assert result.steps % 3 == 0
    assert result.steps < 200
    assert seen[-1].step == result.steps
    assert seen[-1].metrics == result.metrics
    assert seen[0].examples == 112
    assert result.examples == seen[-1].examples
    names = {name for _, name, _ in result.points}
    assert names == {"train/loss", "test/loss", "test/accuracy"}
    assert result.points[-1][0] == result.steps


def test_wall_time_is_taken_from_the_clock_that_is_handed_in(dataset: StoredDataset) -> None:
    plan = small_plan(dataset, stop={"wall_time": "30s"})
    ticks = itertools.count(0.0, 1.0)
    result = train(dataset, plan, clock=lambda: next(ticks))
    assert result.reason == "STOP_WALL_TIME"
    assert 0 < result.steps <= 30


def test_a_caller_can_end_a_job(dataset: StoredDataset) -> None:
    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise Enough

    with pytest.raises(Enough):
        train(dataset, small_plan(dataset), on_progress=stop)


def test_parameters_that_explode_end_the_job(dataset: StoredDataset) -> None:
    plan = small_plan(
        dataset,
        model={"softmax_regression": {}},
        optimizer={"sgd": {"learning_rate": 1e38}},
        stop={"steps": 50},
        l2=10.0,
    )
    with pytest.raises(FailedPrecondition) as caught:
        train(dataset, plan)
    assert caught.value.reason in {"NON_FINITE", "PARAMETERS_NON_FINITE"}


NAN_AT_STEP = """
import numpy as np
from phalanx.models import UserModel

class Sometimes(UserModel):
    calls = 0

    def __init__(self, schema, bad_from, bad_to):
        super().__init__(schema, {"w": (schema.features, schema.classes)})
        self.bad = range(bad_from, bad_to)

    def initial(self, seed):
        return {"w": np.zeros((self.schema.features, self.schema.classes))}

    def loss_and_gradients(self, parameters, features, targets):
        call, self.calls = self.calls, self.calls + 1
        loss = float("nan") if call in self.bad else 1.0
        return loss, {"w": np.full_like(parameters["w"], len(targets))}
"""


def custom_plan(dataset: StoredDataset, bad: tuple[int, int], **train: Any) -> JobPlan:
    arguments = {"bad_from": bad[0], "bad_to": bad[1]}
    model = {"custom": {"entrypoint": "sometimes_bad:Sometimes", "arguments": arguments}}
    sgd = {"sgd": {"learning_rate": 1.0}}
    return small_plan(
        dataset, model=model, optimizer=sgd, l2=0, evaluation={"every_steps": 100}, **train
    )


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "sometimes_bad.py").write_text(NAN_AT_STEP)
    return tmp_path


def test_a_leaf_that_is_not_finite_fails_the_job_and_is_named(
    dataset: StoredDataset, code: Path
) -> None:
    plan = custom_plan(dataset, (9, 10), stop={"steps": 3})
    with pytest.raises(
        FailedPrecondition, match=r"shard 2 \(rows 160 to 239\) in step 2"
    ) as caught:
        train(dataset, plan, code_dir=code)
    assert caught.value.reason == "NON_FINITE"


def test_or_it_is_left_out_of_its_step(dataset: StoredDataset, code: Path) -> None:
    rule = {"skip": {"max_steps": 1}}
    plan = custom_plan(dataset, (9, 11), stop={"steps": 3}, on_nonfinite=rule)
    result = train(dataset, plan, code_dir=code)
    assert result.examples == 3 * 112 - 2 * 16
    # Every step moves by the mean gradient, 1, whoever was left out.
    assert set(result.parameters) == {-3.0}
    twice = custom_plan(dataset, (9, 15), stop={"steps": 3}, on_nonfinite=rule)
    with pytest.raises(FailedPrecondition, match="not finite; lower the learning rate"):
        train(dataset, twice, code_dir=code)


def test_a_step_in_which_every_leaf_was_left_out_changes_nothing(
    dataset: StoredDataset, code: Path
) -> None:
    rule = {"skip": {}}
    plan = custom_plan(dataset, (7, 14), stop={"steps": 3}, on_nonfinite=rule)
    result = train(dataset, plan, code_dir=code)
    assert result.steps == 3
    assert set(result.parameters) == {-2.0}
    assert [step for step, name, _ in result.points if name == "train/loss"] == [1, 3]


def test_a_warm_start(dataset: StoredDataset, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from phalanx.models.base import views

    first = train(dataset, small_plan(dataset, stop={"steps": 1}))
    path = tmp_path / "model.safetensors"
    tensors = views(first.layout, first.parameters)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    sgd = {"sgd": {"learning_rate": 1e-30}}
    plan = small_plan(dataset, optimizer=sgd, stop={"steps": 1}, l2=0)
    assert train(dataset, plan, start_model=path).parameters_sha256 == first.parameters_sha256
