"""Algorithms whose versions no elementwise optimizer makes, against independent references."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from phalanx.data.statistics import manifest_mean_and_scale
from phalanx.errors import InvalidArgument
from phalanx.layouts import model_layout, size_bytes
from phalanx.models import build_model, passes
from phalanx.models.base import views
from phalanx.specs.copies import PARAMETER_COPIES
from phalanx.specs.plan import worker_bytes
from phalanx.testing.datasets import StoredDataset, classification, regression, store
from phalanx.testing.plans import dataset_message, plan_for
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.training.schema import job_schema
from phalanx.v1.job_spec_pb2 import JobSpec
from worker.leaf.work import JobWork, Paths

K_MEANS = {"k_means": {"clusters": 4}}
CLOSED_FORM = {"model": {"linear_regression": {}}, "optimizer": {"closed_form": {}}}


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(700, 8, 3)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2, chunk_bytes=4096)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = regression(500, 6)
    return store(tmp_path_factory.mktemp("numbers"), features, targets, chunk_bytes=4096)


def run(dataset: StoredDataset, shards: int = 5, **train: Any) -> TrainedModel:
    plan = plan_for(dataset, train, data={"name": "data", "shards": shards})
    return train_in_process(plan, dataset.manifest, dataset.fetch)


def tensors(model: TrainedModel) -> dict[str, np.ndarray]:
    return views(model.layout, model.parameters)


def rows_of(dataset: StoredDataset, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """All rows of a split, standardised as jobs see them, and the targets."""
    from phalanx.data.reader import ChunkReader
    from phalanx.training.sampler import rows_in_order, shard_rows

    reader = ChunkReader(dataset.manifest, split, dataset.fetch, dtype="float64")
    batch = reader.rows(rows_in_order(shard_rows(0, 1, reader.chunk_rows)))
    features = np.array(batch.features)
    scales = manifest_mean_and_scale(dataset.manifest, np.dtype("float64"))
    if scales is not None:
        features = (features - scales[0]) * scales[1]
    return features, batch.targets


def test_k_means_moves_its_centers_as_scikit_learn_does(clouds: StoredDataset) -> None:
    features, _ = rows_of(clouds)
    drawn = tensors(run(clouds, model=K_MEANS, stop={"steps": 1}))["centers"]
    assert len(np.unique(drawn, axis=0)) == 4
    assert all((np.abs(features - center).sum(axis=1) < 1e-9).any() for center in drawn)
    for steps in (1, 2, 7):
        model = run(clouds, model=K_MEANS, stop={"steps": 1 + steps})
        reference = KMeans(4, init=drawn, n_init=1, max_iter=steps, tol=0, algorithm="lloyd")
        reference.fit(features)
        np.testing.assert_allclose(
            tensors(model)["centers"], reference.cluster_centers_, rtol=0, atol=1e-9
        )
    # The loss of a step is that of the version before it.
    again = run(clouds, model=K_MEANS, stop={"steps": 9})
    assert again.metrics["train/loss"] <= reference.inertia_ / len(features) + 1e-9


def test_k_means_ends_once_its_loss_stands_still(numbers: StoredDataset) -> None:
    """The step that draws the centers has no loss that later ones could be compared with."""
    rule = {"plateau": {"metric": "train/loss", "evaluations": 1}}
    model = run(numbers, model=K_MEANS, stop=rule)
    assert model.reason == "STOP_PLATEAU"
    longer = run(numbers, model=K_MEANS, stop={"steps": model.steps + 3})
    assert longer.parameters_sha256 == model.parameters_sha256
    assert min(step for step, name, _ in model.points if name == "train/loss") == 2


def test_k_means_without_centers_is_below_no_threshold(numbers: StoredDataset) -> None:
    rule = {"steps": 3, "thresholds": [{"metric": "train/loss", "at_most": 1e-3}]}
    assert run(numbers, model=K_MEANS, stop=rule).reason == "STOP_STEPS"


def test_a_cluster_that_loses_all_rows_keeps_its_center(tmp_path: Path) -> None:
    features = np.repeat(np.array([[0.0, 0.0], [1.0, 1.0]]), 30, axis=0)
    dataset = store(tmp_path, features, np.arange(60.0), chunk_bytes=4096)
    model = run(dataset, shards=2, model={"k_means": {"clusters": 3}}, stop={"steps": 4})
    assert sorted(tensors(model)["sizes"].tolist()) == [0, 30, 30]
    assert np.isfinite(model.parameters).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_components_are_those_of_scikit_learn(sparse: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(400, 9)) @ rng.normal(size=(9, 9))
    features = features.astype(np.float32).astype(np.float64)  # as sparse data is stored
    data = scipy.sparse.csr_array(features) if sparse else features
    dataset = store(tmp_path, data, np.arange(400.0) / 7, chunk_bytes=8192)
    model = run(dataset, model={"pca": {"components": 4}, "standardise": not sparse})
    features = np.asarray(data.toarray()) if sparse else rows_of(dataset)[0]
    reference = PCA(4, svd_solver="full").fit(features)
    ours = tensors(model)
    np.testing.assert_allclose(ours["variances"], reference.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(ours["mean"], reference.mean_, atol=1e-12)
    cosines = np.abs((ours["components"] * reference.components_).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    largest = np.abs(ours["components"]).argmax(axis=1)
    assert (ours["components"][np.arange(4), largest] > 0).all()


def test_the_closed_form_solves_the_least_squares(numbers: StoredDataset) -> None:
    features, targets = rows_of(numbers)
    with_ones = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    expected = np.linalg.lstsq(with_ones, targets, rcond=None)[0]
    found = tensors(run(numbers, **CLOSED_FORM))
    np.testing.assert_allclose(found["weights"], expected[:-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["bias"], expected[-1:], rtol=0, atol=1e-12)


def test_l2_makes_it_a_ridge_regression(numbers: StoredDataset) -> None:
    features, targets = rows_of(numbers)
    found = tensors(run(numbers, **CLOSED_FORM, l2=0.3))
    reference = Ridge(alpha=0.3 * len(features)).fit(features, targets)
    np.testing.assert_allclose(found["weights"], reference.coef_, rtol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_of_the_closed_form_is_that_of_its_model(
    bias: bool, numbers: StoredDataset
) -> None:
    features, targets = rows_of(numbers)
    train = {"model": {"linear_regression": {"bias": bias}}, "optimizer": {"closed_form": {}}}
    model = run(numbers, **train, l2=0.2)
    found = tensors(model)
    errors = features @ found["weights"] + found.get("bias", 0) - targets
    assert model.metrics["train/loss"] == pytest.approx(0.5 * (errors**2).mean(), rel=1e-9)
    assert [step for step, name, _ in model.points if name == "train/loss"] == [2]


def test_sums_in_float32_tell_no_loss(numbers: StoredDataset) -> None:
    """They would round off what errors are to targets far from zero."""
    assert "train/loss" not in run(numbers, **CLOSED_FORM, dtype="float32").metrics


@pytest.mark.parametrize("components", [2, 8])
def test_the_loss_of_components_is_what_they_leave_out(
    components: int, clouds: StoredDataset
) -> None:
    features, _ = rows_of(clouds)
    model = run(clouds, model={"pca": {"components": components}})
    found = tensors(model)
    centred = features - found["mean"]
    left = centred - centred @ found["components"].T @ found["components"]
    expected = (left**2).sum(axis=1).mean()
    assert model.metrics["train/loss"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert [step for step, name, _ in model.points if name == "train/loss"] == [2]


@pytest.mark.parametrize(
    ("train", "solver"),
    [({"model": {"pca": {"components": 2}}}, "eigh"), (CLOSED_FORM, "lstsq")],
    ids=["pca", "closed form"],
)
def test_workers_that_solve_to_other_bits_are_told_apart(
    train: dict[str, Any],
    solver: str,
    numbers: StoredDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The leaf that a job is described with is of the first pass, and solves nothing."""
    plan = plan_for(numbers, train, data={"name": "data", "shards": 2})
    manifest = tmp_path / "manifest"
    manifest.write_bytes(numbers.manifest.to_json())

    def leaf() -> str:
        passes.solutions.cache_clear()
        work = JobWork(plan, Paths(manifest), lambda chunk: numbers.fetch(chunk.digest))
        return work.describe().leaf_sha256

    one, exact = leaf(), getattr(np.linalg, solver)
    assert leaf() == one
    monkeypatch.setattr(np.linalg, solver, lambda *given, **named: _nudged(exact(*given, **named)))
    assert leaf() != one
    passes.solutions.cache_clear()


def _nudged(results: Any) -> Any:
    first, *others = results
    return np.nextafter(first, np.inf), *others


def test_columns_that_say_the_same_get_the_shortest_solution(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    column = rng.normal(size=200)
    features = np.stack([column, column], axis=1)
    dataset = store(tmp_path, features, 3 * column, chunk_bytes=4096)
    found = tensors(run(dataset, shards=3, **CLOSED_FORM))
    assert found["weights"][0] == pytest.approx(found["weights"][1], abs=1e-9)


@pytest.mark.parametrize(
    "train",
    [{"model": K_MEANS}, {"model": {"pca": {"components": 2}}}, CLOSED_FORM],
    ids=["k_means", "pca", "closed form"],
)
def test_the_model_is_without_the_workspace(train: dict[str, Any], numbers: StoredDataset) -> None:
    model = run(numbers, **train)
    assert not any(tensor.workspace for tensor in model.layout.tensors)
    assert len(model.parameters) == model.layout.element_count
    assert model.layout.dtype == "float64"


@pytest.mark.parametrize(
    "train",
    [
        {"model": K_MEANS},
        {"model": {"pca": {"components": 2}}},
        {"model": {"boosting": {}}},
        CLOSED_FORM,
        {"model": {"linear_svm": {}}, "optimizer": {"cocoa": {}}, "l2": 0.1},
    ],
    ids=["k_means", "pca", "boosting", "closed form", "cocoa"],
)
def test_a_worker_has_room_for_the_workspace(train: dict[str, Any], tmp_path: Path) -> None:
    rows = regression if train is CLOSED_FORM else partial(classification, classes=2)
    dataset = store(tmp_path, *rows(90, 40))
    plan = plan_for(dataset, train, data={"name": "data", "shards": 2})
    spec = JobSpec.FromString(plan.spec)
    layout = build_model(spec, job_schema(plan, spec, dataset.manifest)).layout
    vector_bytes = size_bytes(layout)
    assert vector_bytes > size_bytes(model_layout(layout))
    assert worker_bytes(spec, dataset_message(dataset)) > PARAMETER_COPIES * vector_bytes


@pytest.mark.parametrize(
    ("train", "path", "said"),
    [
        ({"model": K_MEANS, "optimizer": {"adam": {}}}, "train.optimizer", "rule of its own"),
        ({"model": K_MEANS, "batch_size": 64}, "train.batch_size", "reads all rows"),
        ({"model": K_MEANS, "l2": 0.1}, "train.l2", "no weights"),
        ({"model": {"k_means": {}}}, "train.model.k_means.clusters", "at least 2, not 0"),
        ({"model": {"k_means": {"clusters": 501}}}, "train.model.k_means.clusters", "501 are more"),
        ({"model": {"pca": {}}}, "train.model.pca.components", "at least 1"),
        ({"model": {"pca": {"components": 7}}}, "train.model.pca.components", "than the 6"),
        ({"model": K_MEANS, "asynchronous": {}}, "train.asynchronous", "use synchronous"),
        ({"model": K_MEANS, "local": {"steps": 2}}, "train.local", "use synchronous"),
        ({"model": K_MEANS, "all_reduce": {}}, "train.all_reduce", "use parameter_server"),
        (
            {"model": K_MEANS, "reduction": {"median": {}}},
            "train.reduction.median",
            "as they are",
        ),
        (
            {"model": K_MEANS, "compression": {"sign": {}}},
            "train.compression.sign",
            "as they are",
        ),
        (
            {"model": K_MEANS, "on_nonfinite": {"skip": {}}},
            "train.on_nonfinite.skip",
            "use fail",
        ),
        ({"model": K_MEANS, "start": {"model": "m"}}, "train.start.model", "sums over all rows"),
        (
            {"model": {"pca": {"components": 1}}, "stop": {"epochs": 3}},
            "train.stop.epochs",
            "pca has 2 steps",
        ),
        (
            {"model": {"mlp": {"hidden": [3]}}, "optimizer": {"closed_form": {}}},
            "train.optimizer.closed_form",
            "linear_regression",
        ),
    ],
)
def test_what_does_not_go_together_is_said(
    train: dict[str, Any], path: str, said: str, numbers: StoredDataset
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan_for(numbers, train, data={"name": "data", "shards": 5})
    messages = {each.field: each.message for each in caught.value.violations}
    assert said in messages[path]
