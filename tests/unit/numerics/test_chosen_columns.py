"""A job that chose columns has the bits of the same job on a data set with these columns alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.data.ingest import ingest
from phalanx.data.options import IngestOptions
from phalanx.data.writer import DirectoryBlobs
from phalanx.testing.datasets import (
    StoredDataset,
    classification,
    regression,
    sparse_classification,
    store,
)
from phalanx.testing.plans import plan_for
from phalanx.training.local import TrainedModel, train_in_process

CHUNK_ROWS = 128
COLUMNS = (0, 2, 3, 7)
NAMES = [f"x{column + 1}" for column in COLUMNS]
JOB: dict[str, Any] = {
    "optimizer": {"adam": {"learning_rate": 0.01}},
    "batch_size": 112,
    "stop": {"steps": 7},
    "evaluation": {"every_steps": 3},
}
MLP = {"model": {"mlp": {"hidden": [9]}}}
LINEAR = {"model": {"softmax_regression": {}}}

CODE = """
import numpy as np
from phalanx.models import UserModel

class Squares(UserModel):
    def __init__(self, schema):
        super().__init__(schema, {"w": (schema.features, schema.classes)})
    def initial(self, seed):
        return {"w": np.full((self.schema.features, self.schema.classes), 0.1, np.float32)}
    def loss_and_gradients(self, parameters, features, targets):
        error = features @ parameters["w"] - np.eye(self.schema.classes)[targets]
        return float((error**2).sum()), {"w": (features.T @ error).astype(np.float32)}
    def predictions(self, parameters, features):
        return features @ parameters["w"]
"""


def stored(folder: Path, features: Any, targets: Any) -> StoredDataset:
    """In chunks of as many rows, however wide they are: the order of the rows follows chunks."""
    if isinstance(features, np.ndarray):
        row_bytes = features.shape[1] * features.itemsize + 8
        data = store(folder, features, targets, test=0.2, chunk_bytes=CHUNK_ROWS * row_bytes)
        assert len(data.reader().chunks) > 3
        return data
    return store(folder, features, targets, test=0.2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredDataset, StoredDataset]:
    features, targets = classification(700, 8, 3)
    folder = tmp_path_factory.mktemp("dense")
    fewer = np.ascontiguousarray(features[:, COLUMNS])
    return stored(folder / "all", features, targets), stored(folder / "few", fewer, targets)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredDataset, StoredDataset]:
    features, targets = sparse_classification(700, 8, density=0.4)
    folder = tmp_path_factory.mktemp("sparse")
    fewer = features[:, COLUMNS]
    return stored(folder / "all", features, targets), stored(folder / "few", fewer, targets)


def trained(
    stored: StoredDataset,
    train: dict[str, Any],
    columns: list[str],
    code_dir: Path | None = None,
    **spec: Any,
) -> TrainedModel:
    data = {"name": "data", "shards": 7, "features": columns, **spec.pop("data", {})}
    plan = plan_for(stored, {**JOB, **train}, data=data, seed=3, **spec)
    return train_in_process(plan, stored.manifest, stored.fetch, code_dir=code_dir)


def assert_same(one: TrainedModel, other: TrainedModel) -> None:
    assert one.parameters_sha256 == other.parameters_sha256
    assert one.layout == other.layout
    assert one.points == other.points
    assert one.metrics == other.metrics
    assert one.metrics


TRAININGS = {
    "linear": LINEAR,
    "mlp": MLP,
    "float64": {**MLP, "dtype": "float64"},
    "not standardised": {"model": {"mlp": {"hidden": [9]}, "standardise": False}},
    "all-reduce": {**MLP, "all_reduce": {}},
    "int8": {**MLP, "compression": {"int8": {}}},
    "top-k": {**MLP, "compression": {"top_k": {"fraction": 0.3}}},
    "local steps": {**MLP, "local": {"steps": 3}},
    "asynchronous": {**MLP, "asynchronous": {}},
    "verified": {**MLP, "verification": {"replicas": 3}},
    "median": {**MLP, "reduction": {"median": {}}},
}


@pytest.mark.parametrize("train", TRAININGS.values(), ids=TRAININGS)
def test_dense(dense: tuple[StoredDataset, StoredDataset], train: dict[str, Any]) -> None:
    whole, fewer = dense
    assert_same(trained(whole, train, NAMES), trained(fewer, train, []))


@pytest.mark.parametrize("name", ["linear", "mlp", "float64", "int8"])
def test_sparse(sparse: tuple[StoredDataset, StoredDataset], name: str) -> None:
    whole, fewer = sparse
    for standardise in (True, False):
        model = {**TRAININGS[name]["model"], "standardise": standardise}
        train = {**TRAININGS[name], "model": model}
        assert_same(trained(whole, train, NAMES), trained(fewer, train, []))


@pytest.mark.parametrize(
    "balance",
    [{"class_weights": {}}, {"oversample": {}}, {"rows": {"stratified": True}}],
    ids=lambda balance: next(iter(balance)),
)
def test_balanced_classes(
    dense: tuple[StoredDataset, StoredDataset], balance: dict[str, Any]
) -> None:
    whole, fewer = dense
    one = trained(whole, MLP, NAMES, data=balance)
    assert_same(one, trained(fewer, MLP, [], data=balance))


def test_regression(tmp_path: Path) -> None:
    features, targets = regression(700, 8)
    whole = stored(tmp_path / "all", features, targets)
    fewer = stored(tmp_path / "few", np.ascontiguousarray(features[:, COLUMNS]), targets)
    train = {"model": {"linear_regression": {}}}
    assert_same(trained(whole, train, NAMES), trained(fewer, train, []))


def test_user_code_is_told_how_many_features_there_are(
    dense: tuple[StoredDataset, StoredDataset], tmp_path: Path
) -> None:
    (tmp_path / "squares_of_few.py").write_text(CODE)
    train = {"model": {"custom": {"entrypoint": "squares_of_few:Squares"}}}
    code = {"files": {"squares_of_few.py": CODE}}
    whole, fewer = (
        trained(data, train, columns, code=code, code_dir=tmp_path)
        for data, columns in zip(dense, (NAMES, []), strict=True)
    )
    assert list(whole.layout.tensors[0].shape) == [4, 3]
    assert_same(whole, fewer)


def test_a_table_with_categories(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    towns = generator.choice(["Ulm", "Bonn", "Jena", ""], 400)
    jobs = generator.choice(["clerk", "smith"], 400)
    rows = [
        f"{age},{job},{town},{hours},{'high' if hours > 40 else 'low'}"
        for age, job, town, hours in zip(
            generator.integers(18, 70, 400),
            jobs,
            towns,
            generator.integers(10, 60, 400),
            strict=True,
        )
    ]
    options = IngestOptions(missing="category", test=0.25)
    sets = []
    for name, kept in (("all", (0, 1, 2, 3, 4)), ("few", (2, 3, 4))):
        path = tmp_path / f"{name}.csv"
        lines = ["age,job,town,hours,income", *rows]
        path.write_text("\n".join(",".join(line.split(",")[i] for i in kept) for line in lines))
        blobs = DirectoryBlobs(tmp_path / name)
        sets.append(StoredDataset(ingest(path, options, blobs), blobs))
    train = {"model": {"logistic_regression": {}}}
    one = trained(sets[0], train, ["hours", "town"])
    assert one.layout.element_count == 4 + 1 + 1
    assert_same(one, trained(sets[1], train, []))


def test_the_order_of_the_names_does_not_matter(
    dense: tuple[StoredDataset, StoredDataset],
) -> None:
    assert_same(trained(dense[0], MLP, NAMES), trained(dense[0], MLP, NAMES[::-1]))


def test_other_columns_give_another_model(dense: tuple[StoredDataset, StoredDataset]) -> None:
    one, other = (trained(dense[0], MLP, names) for names in (NAMES, ["x1", "x3", "x4", "x5"]))
    assert one.layout == other.layout
    assert one.parameters_sha256 != other.parameters_sha256
