"""CoCoA+ and the projection of Pegasos: leaves and updates against plain NumPy."""

from typing import Any

import numpy as np
import pytest

from phalanx.models import Batch, DataSchema, build_model
from phalanx.models.base import TensorViews, views
from phalanx.testing.datasets import StoredDataset, classification, sparse_classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.leaf import leaf_batch
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.updates import build_update
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

L2 = 0.02


@pytest.fixture(scope="module", params=["dense", "csr"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "dense":
        features, targets = classification(300, 6, 2)
        return store(folder, features, targets, dtype="float64", chunk_bytes=4096)
    rows, labels = sparse_classification(300, 30)
    return store(folder, rows, labels, dtype="float64", chunk_bytes=4096)


def program(optimizer: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "model": {"linear_svm": {}},
        "optimizer": optimizer,
        "l2": L2,
        "stop": {"steps": 6},
        "dtype": "float64",
        **train,
    }


def cocoa_plan(
    stored: StoredDataset, cocoa: dict[str, Any], stratified: bool = False, **train: Any
) -> JobPlan:
    data = {"name": "data", "shards": 5, "rows": {"stratified": stratified}}
    return plan_for(stored, program({"cocoa": cocoa}, **train), data=data)


def train(stored: StoredDataset, plan: JobPlan) -> TrainedModel:
    return train_in_process(plan, stored.manifest, stored.fetch)


def rounds(
    stored: StoredDataset, plan: JobPlan, steps: int
) -> tuple[np.ndarray, list[Batch], TensorViews]:
    """The whole vector after so many steps, made of the leaves one by one."""
    schema = DataSchema(
        stored.manifest.features, 2, "float64", rows=plan.train_rows, shards=plan.shards
    )
    model = build_model(JobSpec.FromString(plan.spec), schema)
    described = JobPlan()
    described.CopyFrom(plan)
    described.layout.CopyFrom(model.layout)
    update = build_update(described)
    assert update is not None
    vector, reader = model.initial_parameters(0), stored.reader(dtype=np.float64)
    batches: list[Batch] = []
    for step in range(steps):
        found = [leaf_batch(reader, plan, shard, step) for shard in range(plan.shards)]
        batches = [each for each in found if each is not None]
        total = np.zeros_like(vector)
        for batch in batches:
            out = np.full_like(vector, np.nan)
            assert model.gradient(vector, batch, out).count == batch.rows
            total += out
        vector = update.apply(vector, total, plan.train_rows, step)
    return vector, batches, TensorViews(model.layout)


@pytest.mark.parametrize("stratified", [False, True])
def test_weights_stay_those_of_the_dual_variables(stored: StoredDataset, stratified: bool) -> None:
    """Each shard has written in places of its own, however the rows were dealt out."""
    plan = cocoa_plan(stored, {"local_passes": 2}, stratified)
    vector, batches, cut = rounds(stored, plan, 6)
    tensors, expected = cut(vector), 0
    for batch in batches:
        alpha = tensors["duals"][batch.positions]
        signs = 2 * batch.targets - 1
        expected = expected + batch.features.T @ (signs * alpha) / (L2 * 300)
        assert ((alpha >= 0) & (alpha <= 1)).all()
    np.testing.assert_allclose(tensors["weights"], expected, rtol=0, atol=1e-12)
    assert len(np.unique(np.concatenate([batch.positions for batch in batches]))) == 300
    assert tensors["rounds"].tolist() == [6]
    trained = train(stored, plan)
    np.testing.assert_allclose(trained.parameters, tensors["weights"], rtol=0, atol=1e-12)
    assert [tensor.name for tensor in trained.layout.tensors] == ["weights"]


def test_certificates_are_those_of_their_formulas(stored: StoredDataset) -> None:
    plan = cocoa_plan(stored, {"local_passes": 2}, evaluation={"split": "train"})
    trained = train(stored, plan)
    vector, batches, cut = rounds(stored, plan, 6)
    tensors = cut(vector)
    w, alpha = tensors["weights"], tensors["duals"]
    short = np.concatenate(
        [np.maximum(0, 1 - (2 * each.targets - 1) * (each.features @ w)) for each in batches]
    )
    primal, dual = short.mean() + L2 / 2 * w @ w, alpha.mean() - L2 / 2 * w @ w
    for name, value in {"primal": primal, "dual": dual, "duality_gap": primal - dual}.items():
        assert trained.metrics[f"train/{name}"] == pytest.approx(value, abs=1e-12)
    assert trained.metrics["train/duality_gap"] > 0


def test_rows_come_in_another_order_in_each_shard_round_and_pass(stored: StoredDataset) -> None:
    plan = cocoa_plan(stored, {"local_passes": 3})
    schema = DataSchema(stored.manifest.features, 2, "float64", rows=300, shards=5)
    model: Any = build_model(JobSpec.FromString(plan.spec), schema)
    reader = stored.reader(dtype=np.float64)
    seen: set[bytes] = set()
    for shard in range(5):
        batch = leaf_batch(reader, plan, shard, 0)
        for over in range(2):
            orders = list(model._orders(batch, over))
            assert all(sorted(each.tolist()) == list(range(60)) for each in orders)
            seen.update(each.tobytes() for each in orders)
    assert len(seen) == 5 * 2 * 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gap_closes_in_either_precision(stored: StoredDataset, dtype: str) -> None:
    settings = {
        "dtype": dtype,
        "stop": {"steps": 300, "thresholds": [{"metric": "train/duality_gap", "at_most": 1e-2}]},
    }
    trained = train(stored, cocoa_plan(stored, {"local_passes": 5}, **settings))
    assert trained.reason == "STOP_THRESHOLD"
    assert -1e-6 < trained.metrics["train/duality_gap"] <= 1e-2


def test_the_number_of_shards_is_the_curvature_unless_another_is_given(
    stored: StoredDataset,
) -> None:
    plain = train(stored, cocoa_plan(stored, {}))
    said = train(stored, cocoa_plan(stored, {"sigma": 5}))
    other = train(stored, cocoa_plan(stored, {"sigma": 7.5}))
    assert plain.parameters_sha256 == said.parameters_sha256 != other.parameters_sha256


def test_a_projected_version_is_a_step_and_then_no_longer_than_the_ball(
    stored: StoredDataset,
) -> None:
    bias = {"linear_svm": {"bias": True}}

    def after(steps: int, project: bool, **settings: Any) -> dict[str, np.ndarray]:
        optimizer = {"pegasos": {"project": project}, **settings}
        job = program(optimizer, model=bias, stop={"steps": steps}, batch_size=60)
        trained = train(stored, plan_for(stored, job, data={"name": "data", "shards": 3}))
        return views(trained.layout, trained.parameters)

    free, kept = after(1, False), after(1, True)
    radius = 1 / np.sqrt(L2)
    norm = float(np.linalg.norm(free["weights"]))
    assert norm > radius
    np.testing.assert_allclose(kept["weights"], free["weights"] * radius / norm, rtol=1e-12)
    assert kept["bias"] == free["bias"], "the ball is one of weights"
    later = after(40, True)
    assert np.linalg.norm(later["weights"]) < radius
    assert not np.allclose(later["weights"], after(40, False)["weights"])
    # Short gradients stay in the ball from the first step on; then projecting changes nothing.
    short, same = after(5, False, clip_norm=0.01), after(5, True, clip_norm=0.01)
    np.testing.assert_array_equal(short["weights"], same["weights"])
