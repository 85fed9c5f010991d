"""Boosted trees: the same model however the rows are cut, and as good as scikit-learn's."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_svmlight_file, make_friedman1
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from phalanx.data.reader import ChunkReader
from phalanx.models import DataSchema
from phalanx.models.base import views
from phalanx.models.boosting import EDGES, FEATURE, NEVER, THRESHOLD, VALUE, Boosting
from phalanx.testing.datasets import StoredDataset, digits, shared_data, store
from phalanx.testing.plans import plan_for
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.training.sampler import rows_in_order, shard_rows
from phalanx.v1.job_spec_pb2 import Boosting as Settings


def run(dataset: StoredDataset, shards: int, **boosting: Any) -> TrainedModel:
    train = {"model": {"boosting": boosting}}
    plan = plan_for(dataset, train, data={"name": "data", "shards": shards})
    return train_in_process(plan, dataset.manifest, dataset.fetch)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = make_friedman1(900, noise=0.5, random_state=0)
    folder = tmp_path_factory.mktemp("friedman")
    return store(folder, features, targets, test=0.25, chunk_bytes=8192)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = digits()
    return store(tmp_path_factory.mktemp("digits"), features[:700], targets[:700], test=0.25)


def rows_of(dataset: StoredDataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The stored rows of a split; trees do not mind that they are not standardised."""
    reader = ChunkReader(dataset.manifest, split, dataset.fetch, dtype="float64")
    batch = reader.rows(rows_in_order(shard_rows(0, 1, reader.chunk_rows)))
    return np.array(batch.features), batch.targets


def score_of(reference: Any, dataset: StoredDataset) -> float:
    """What scikit-learn reaches on the same rows."""
    with threadpool_limits(1):
        return float(reference.fit(*rows_of(dataset, "train")).score(*rows_of(dataset, "test")))


@pytest.mark.parametrize(
    ("data", "shardings", "trees"), [("numbers", range(1, 9), 3), ("images", (1, 3, 8), 1)]
)
def test_any_sharding_gives_the_same_model(
    data: str, shardings: Iterable[int], trees: int, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(data)
    models = [run(dataset, shards, trees=trees, depth=3) for shards in shardings]
    assert len({model.parameters_sha256 for model in models}) == 1
    splits = views(models[0].layout, models[0].parameters)[FEATURE]
    assert (splits >= 0).sum() > 10


def test_numbers_are_predicted_as_well_as_by_scikit_learn(numbers: StoredDataset) -> None:
    model = run(numbers, 2, trees=60, depth=4)
    score = score_of(HistGradientBoostingRegressor(max_iter=60, max_depth=4), numbers)
    assert model.metrics["test/r2"] > score - 0.01


def test_several_classes_are_told_apart_as_well_as_by_scikit_learn(images: StoredDataset) -> None:
    model = run(images, 1, trees=10, depth=3, min_leaf_rows=5)
    reference = HistGradientBoostingClassifier(max_iter=10, max_depth=3, min_samples_leaf=5)
    assert model.metrics["test/accuracy"] > score_of(reference, images) - 0.02


def test_a_plateau_of_the_training_loss_looks_at_whole_rounds(tmp_path: Path) -> None:
    """The loss of a step is that of the trees before it: the same for all levels of a round."""
    features, targets = digits()
    dataset = store(tmp_path, features[:200], targets[:200])
    stop = {"plateau": {"metric": "train/loss", "evaluations": 2}}
    train = {"model": {"boosting": {"trees": 3, "depth": 2}}, "stop": stop}
    plan = plan_for(dataset, train, data={"name": "data", "shards": 2})
    model = train_in_process(plan, dataset.manifest, dataset.fetch)
    assert (model.reason, model.steps) == ("STOP_STEPS", 3 * 10 * 2 + 1)


def test_a_split_is_the_best_of_all(tmp_path: Path) -> None:
    """One tree of one level, against trying every split of every feature."""
    rng = np.random.default_rng(3)
    features = rng.integers(0, 9, size=(120, 3)).astype(float)
    targets = (features[:, 1] > 4) * 2.0 + rng.normal(size=120) * 0.3
    dataset = store(tmp_path, features, targets)
    model = run(dataset, 3, trees=1, depth=1, learning_rate=1.0, l2=0.0, min_leaf_rows=7)
    tensors = views(model.layout, model.parameters)
    errors = {}
    for feature in range(3):
        for value in np.unique(features[:, feature])[:-1]:
            left = features[:, feature] <= value
            if min(left.sum(), (~left).sum()) >= 7:
                sides = (targets[left], targets[~left])
                errors[feature, value] = sum(((each - each.mean()) ** 2).sum() for each in sides)
    feature, value = min(errors, key=lambda split: errors[split])
    assert tensors[FEATURE][0, 0] == feature
    left = features[:, feature] <= value
    base = targets.mean()
    expected = [targets[left].mean() - base, targets[~left].mean() - base]
    np.testing.assert_allclose(tensors[VALUE][0, 1:3], expected, atol=1e-9)
    assert tensors[THRESHOLD][0, 0] in tensors[EDGES][feature]
    assert (tensors[EDGES] < NEVER).sum(axis=1).tolist() == [8, 8, 8]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("standardise", [False, True])
def test_features_may_lie_anywhere(standardise: bool, sparse: bool, tmp_path: Path) -> None:
    """Such as years, which are far from 0 and near to one another, and incomes."""
    rng = np.random.default_rng(4)
    places = np.stack([rng.uniform(1990, 2020, 400), rng.lognormal(10.5, 0.6, 400)], axis=1)
    targets = (places[:, 0] - 2005) / 10 + np.log(places[:, 1])
    dataset = store(tmp_path, scipy.sparse.csr_array(places) if sparse else places, targets)
    model = {"boosting": {"trees": 40, "depth": 3}, "standardise": standardise}
    plan = plan_for(dataset, {"model": model}, data={"name": "data", "shards": 2})
    trained = train_in_process(plan, dataset.manifest, dataset.fetch)
    assert trained.metrics["train/loss"] < 0.02 * targets.var()


def test_targets_may_be_as_small_as_numbers_are(tmp_path: Path) -> None:
    targets = np.repeat([0.0, 5e-324, 1.0], 20)
    dataset = store(tmp_path, np.repeat([[0.0], [1.0], [2.0]], 20, axis=0), targets)
    model = run(dataset, 2, trees=1, depth=1, learning_rate=1.0, l2=0.0)
    assert views(model.layout, model.parameters)[FEATURE][0, 0] == 0


def test_nothing_is_split_where_there_is_nothing_to_gain(tmp_path: Path) -> None:
    features = np.zeros((50, 2))
    dataset = store(tmp_path, features, np.repeat([0.0, 1.0], 25))
    model = run(dataset, 2, trees=2, depth=2)
    tensors = views(model.layout, model.parameters)
    assert (tensors[FEATURE] == -1).all()
    assert np.abs(tensors[VALUE]).max() < 1e-12


@functools.cache
def a9a() -> tuple[scipy.sparse.csr_array, np.ndarray, scipy.sparse.csr_array, np.ndarray]:
    folder = shared_data("a9a")
    train, test = (
        load_svmlight_file(str(next(folder.glob(name))), n_features=123)
        for name in ("a9a", "a9a.t")
    )
    return train[0], train[1], test[0], test[1]


@pytest.mark.soak
def test_a9a_within_a_point_of_scikit_learn(tmp_path: Path) -> None:
    train, labels, test, test_labels = a9a()
    rows = scipy.sparse.vstack([train, test], format="csr")
    dataset = store(tmp_path, rows[: train.shape[0]], (labels > 0).astype(int))
    model = run(dataset, 8, trees=100, depth=6)
    settings = Settings(trees=100, learning_rate=0.1, depth=6, bins=64, l2=1, min_leaf_rows=20)
    ours = Boosting(DataSchema(123, 2, "float64"), settings)
    predicted = ours.predict(model.parameters, test.toarray())[:, 1] > 0.5
    accuracy = float((predicted == (test_labels > 0)).mean())
    reference = HistGradientBoostingClassifier(max_depth=6, random_state=0)
    with threadpool_limits(1):
        reference.fit(train.toarray(), labels)
    score = reference.score(test.toarray(), test_labels)
    print(f"accuracy {accuracy:.4f}, scikit-learn {score:.4f}")
    assert accuracy > score - 0.01
