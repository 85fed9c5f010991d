"""Shards that are groups of columns, against the same job on whole rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.data.ingest import ingest
from phalanx.data.options import IngestOptions
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import FailedPrecondition
from phalanx.models import build_model
from phalanx.models.base import views
from phalanx.specs.columns import names_of_shards
from phalanx.testing.datasets import (
    StoredDataset,
    classification,
    regression,
    sparse_classification,
    store,
    store_digits,
)
from phalanx.testing.plans import plan_for
from phalanx.training.leaf import leaf_batch, run_leaf
from phalanx.training.ledger import Books, take_stock
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.training.schema import job_schema
from phalanx.training.shard_readers import ShardReaders
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

LINEAR = {"model": {"linear_regression": {}}}
LOGISTIC = {"model": {"logistic_regression": {}}}
MOMENTUM = {"sgd": {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True}}
EVENLY = {"columns": {}, "shards": 3}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = regression(500, 7)
    return store(tmp_path_factory.mktemp("numbers"), features, targets, test=0.2, chunk_bytes=4096)


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(500, 7, 2)
    options: dict[str, Any] = {"test": 0.2, "chunk_bytes": 4096}
    return store(tmp_path_factory.mktemp("clouds"), features, targets, **options)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = sparse_classification(500, 40)
    return store(tmp_path_factory.mktemp("sparse"), features, targets, chunk_bytes=4096)


def plan(dataset: StoredDataset, data: dict[str, Any], **train: Any) -> JobPlan:
    train = {"dtype": "float64", "stop": {"steps": 25}, **train}
    return plan_for(dataset, train, data={"name": "data", **data})


def run(dataset: StoredDataset, data: dict[str, Any], **train: Any) -> TrainedModel:
    return train_in_process(plan(dataset, data, **train), dataset.manifest, dataset.fetch)


def assert_equal_to_rows(
    dataset: StoredDataset,
    data: dict[str, Any] | None = None,
    *,
    columns: dict[str, Any] | None = None,
    **train: Any,
) -> TrainedModel:
    """The job over columns and the one over the same rows have the same steps and parameters."""
    data, columns = data or {}, columns or EVENLY
    split = run(dataset, {**data, **columns}, **train)
    whole = run(dataset, {**data, "shards": 1}, **train)
    assert split.layout == whole.layout
    assert np.abs(split.parameters - whole.parameters).max() < 1e-12
    assert (split.steps, split.examples, split.reason) == (
        whole.steps,
        whole.examples,
        whole.reason,
    )
    ours, theirs = ([(step, name) for step, name, _ in each.points] for each in (split, whole))
    assert ours == theirs
    values = ([value for _, _, value in each.points] for each in (split, whole))
    np.testing.assert_allclose(*values, rtol=1e-12, atol=1e-12)
    return split


@pytest.mark.parametrize("batch_size", [0, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": MOMENTUM, "l2": 0.01},
        {"optimizer": {"adam": {"learning_rate": 0.01}, "schedule": {"cosine": {}}}, "l2": 0.01},
        {"optimizer": {"adamw": {}}, "stop": {"epochs": 2.5}},
        {"optimizer": {"adagrad": {"learning_rate": 0.1}, "clip_norm": 0.2}},
    ],
    ids=["sgd", "momentum", "adam", "adamw", "adagrad"],
)
@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_columns_are_equal_to_rows(
    kind: str,
    settings: dict[str, Any],
    batch_size: int,
    numbers: StoredDataset,
    clouds: StoredDataset,
) -> None:
    dataset, model = (numbers, LINEAR) if kind == "linear" else (clouds, LOGISTIC)
    assert_equal_to_rows(dataset, **model, **settings, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [0, 64])
def test_sparse_rows(batch_size: int, sparse: StoredDataset) -> None:
    groups = {"columns": {"groups": ["x1,x40,x7-x20", "x2-x6", "x21-x39"]}}
    for standardise in (False, True):
        model = {"model": {**LOGISTIC["model"], "standardise": standardise}}
        assert_equal_to_rows(
            sparse, columns=groups, **model, optimizer=MOMENTUM, batch_size=batch_size
        )


def test_digits(tmp_path: Path) -> None:
    """Real pixels, some of which are constant; classes above 4 against the others."""
    digits = store_digits(tmp_path / "all")
    reader = digits.reader(dtype="float64")
    rows = [np.asarray(reader.rows([_Whole(index, n)]).features) for index, n in _chunks(reader)]
    targets = [reader.rows([_Whole(index, n)]).targets > 4 for index, n in _chunks(reader)]
    pixels, halves = np.concatenate(rows), np.concatenate(targets).astype(np.int64)
    dataset = store(tmp_path / "two", pixels, halves, test=0.2)
    optimizer = {"sgd": {"learning_rate": 0.2, "momentum": 0.9}}
    columns = {"columns": {}, "shards": 5}
    for batch_size in (0, 128):
        model = assert_equal_to_rows(
            dataset,
            columns=columns,
            **LOGISTIC,
            optimizer=optimizer,
            l2=1e-3,
            batch_size=batch_size,
            stop={"steps": 40},
        )
    assert model.metrics["test/accuracy"] > 0.8


class _Whole:
    """All rows of a chunk."""

    label = None

    def __init__(self, index: int, rows: int) -> None:
        self.chunk_index = index
        self.rows = np.arange(rows)


def _chunks(reader: ChunkReader) -> list[tuple[int, int]]:
    return list(enumerate(reader.chunk_rows))


@pytest.mark.parametrize(
    "balance", [{"class_weights": {"weights": {"0": 3.0}}}, {"oversample": {}}]
)
def test_classes_of_unequal_size(balance: dict[str, Any], tmp_path: Path) -> None:
    features, targets = classification(400, 5, 2)
    few = np.concatenate([np.flatnonzero(targets == 0)[:40], np.flatnonzero(targets == 1)])
    dataset = store(tmp_path, features[few], targets[few], chunk_bytes=4096)
    assert_equal_to_rows(dataset, balance, **LOGISTIC, optimizer=MOMENTUM, batch_size=50)


def test_named_columns_with_categories(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    lines = ["age,town,hours,shoe,pay"]
    for _ in range(200):
        age, hours = int(rng.integers(18, 70)), int(rng.integers(1, 60))
        town = ("bonn", "rome", "oslo")[rng.integers(3)]
        lines.append(f"{age},{town},{hours},{int(rng.integers(36, 48))},{age * 0.31 + hours:.2f}")
    path = tmp_path / "people.csv"
    path.write_text("\n".join(lines))
    blobs = DirectoryBlobs(tmp_path / "blobs")
    people = StoredDataset(ingest([path], IngestOptions(), blobs), blobs)
    groups = {"columns": {"groups": ["shoe,town", "hours, age"]}}
    assert_equal_to_rows(people, columns=groups, **LINEAR, optimizer=MOMENTUM)
    few = {"columns": {"groups": ["town", "age"]}}
    chosen = {"features": ["town", "age"]}
    assert_equal_to_rows(people, chosen, columns=few, **LINEAR, optimizer=MOMENTUM)
    assert_equal_to_rows(people, chosen, columns={"columns": {}, "shards": 2}, **LINEAR)


def test_without_a_bias_and_with_one_group(clouds: StoredDataset) -> None:
    model = {"model": {"logistic_regression": {"bias": False}}}
    assert_equal_to_rows(clouds, **model, optimizer=MOMENTUM)
    assert_equal_to_rows(clouds, columns={"columns": {}, "shards": 1}, **LOGISTIC)


def test_a_leaf_reads_the_columns_of_its_shard_and_no_others(clouds: StoredDataset) -> None:
    job = plan(clouds, EVENLY, **LOGISTIC, batch_size=64)
    spec = JobSpec.FromString(job.spec)
    assert names_of_shards(spec.data, clouds.manifest) == [
        ["x1", "x2"],
        ["x3", "x4"],
        ["x5", "x6", "x7"],
    ]
    readers, rows = _readers(clouds, job), plan(clouds, {"shards": 1}, **LOGISTIC, batch_size=64)
    for step in (0, 3, 8):
        whole = leaf_batch(clouds.reader(dtype="float64"), rows, 0, step)
        assert whole is not None
        parts = [leaf_batch(readers.of(shard), job, shard, step) for shard in range(3)]
        assert [part.features.shape[1] for part in parts if part] == [2, 2, 3]
        together = np.concatenate([part.features for part in parts if part], axis=1)
        assert together.tobytes() == np.asarray(whole.features).tobytes()


def test_other_columns_do_not_enter_what_a_shard_contributes(tmp_path: Path) -> None:
    features, targets = classification(300, 6, 2)
    other = np.array(features)
    other[:, 2:] = np.random.default_rng(1).normal(size=(300, 4)) * 9
    sent = []
    for name, rows in (("one", features), ("other", other)):
        dataset = store(tmp_path / name, rows, targets, chunk_bytes=4096)
        job = plan(dataset, EVENLY, **LOGISTIC, batch_size=64)
        model = build_model(
            JobSpec.FromString(job.spec),
            job_schema(job, JobSpec.FromString(job.spec), dataset.manifest),
        )
        parameters = np.random.default_rng(2).normal(size=model.layout.element_count)
        for scored in (0, 1):
            views(model.layout, parameters)["scored"][...] = scored
            out = np.empty_like(parameters)
            run_leaf(model, parameters, _readers(dataset, job).of(0), job, 0, 5, out)
            own = views(model.layout, out)
            assert not own["weights"][2:].any()
            sent.append(out.tobytes())
    assert sent[:2] == sent[2:]


def _readers(dataset: StoredDataset, job: JobPlan) -> ShardReaders[ChunkReader]:
    def make(columns: Any) -> ChunkReader:
        manifest, fetch = dataset.manifest, dataset.fetch
        return ChunkReader(manifest, "train", fetch, dtype="float64", columns=columns)

    return ShardReaders(JobSpec.FromString(job.spec).data, dataset.manifest, make)


@pytest.mark.parametrize("batch_size", [0, 64])
def test_every_row_counts_once_though_every_shard_reads_it(
    batch_size: int, clouds: StoredDataset
) -> None:
    job = plan(clouds, EVENLY, **LOGISTIC, batch_size=batch_size, stop={"epochs": 4})
    model = train_in_process(job, clouds.manifest, clouds.fetch)
    assert model.examples == 4 * 400
    books = Books(completed=(model.steps,) * 3, examples=model.examples, all_named=True)
    ledger = take_stock(job, clouds.reader(), books)
    assert ledger.balanced, ledger.problems
    assert (ledger.epochs, ledger.exact_epochs, ledger.used) == (4, 4, 1600)


def test_groups_in_another_order_make_another_sum(clouds: StoredDataset) -> None:
    """Within rounding: the tree adds the shards in their order."""
    ends = [["x1-x3", "x4-x7"], ["x4-x7", "x1-x3"]]
    one, other = (run(clouds, {"columns": {"groups": each}}, **LOGISTIC) for each in ends)
    assert np.abs(one.parameters - other.parameters).max() < 1e-12


def test_it_starts_from_a_model(clouds: StoredDataset, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weights": np.arange(7.0), "bias": np.array([0.5])}, path)
    models = [
        train_in_process(
            plan(clouds, data, **LOGISTIC, start={"model": "m"}, stop={"steps": 2}),
            clouds.manifest,
            clouds.fetch,
            start_model=path,
        )
        for data in (EVENLY, {"shards": 1})
    ]
    assert np.abs(models[0].parameters - models[1].parameters).max() < 1e-12
    assert models[0].parameters[6] > 5


def test_steps_in_messages_are_those_of_the_job(numbers: StoredDataset) -> None:
    diverging = {"sgd": {"learning_rate": 1e200}}
    said = []
    for data in (EVENLY, {"shards": 1}):
        with pytest.raises(FailedPrecondition, match=r"step \d") as caught:
            run(numbers, data, **LINEAR, optimizer=diverging)
        said.append(caught.value.message.partition("step ")[2][:1])
    assert said[0] == said[1]


def test_float32_by_default_as_with_rows(clouds: StoredDataset) -> None:
    job = plan_for(clouds, {**LOGISTIC, "stop": {"steps": 3}}, data={"name": "data", **EVENLY})
    model = train_in_process(job, clouds.manifest, clouds.fetch)
    assert model.layout.dtype == "float32"
    assert len(model.parameters) == 8
