"""Data sets as people have them, from the file to a classifier's accuracy."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_svmlight_file
from sklearn.linear_model import LogisticRegression

import phalanx
from phalanx.data.ingest import ingest
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.data.reader import ChunkReader
from phalanx.data.statistics import manifest_mean_and_scale, standardise
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import InvalidArgument
from phalanx.testing.datasets import demo_data, shared_data
from phalanx.training.sampler import RowSelection


def rows_of(blobs: DirectoryBlobs, manifest: DatasetManifest, split: str) -> tuple[Any, Any]:
    reader = ChunkReader(manifest, split, blobs.path, dtype=np.float64)
    batch = reader.rows(
        [RowSelection(index, np.arange(rows)) for index, rows in enumerate(reader.chunk_rows)]
    )
    return batch.features, batch.targets


def accuracy(blobs: DirectoryBlobs, manifest: DatasetManifest) -> float:
    """Of a logistic regression on the standardised train split, on the test split."""
    scales = manifest_mean_and_scale(manifest, np.float64)
    assert scales is not None
    (train, labels), (test, truth) = (
        rows_of(blobs, manifest, split) for split in ("train", "test")
    )
    for features in (train, test):
        standardise(features, *scales)
    model = LogisticRegression(max_iter=300).fit(train, labels)
    return float(model.score(test, truth))


@pytest.mark.parametrize("missing", ["category", "mean"])
def test_raw_adult_goes_in_as_it_is(tmp_path: Path, missing: str) -> None:
    blobs = DirectoryBlobs(tmp_path)
    options = IngestOptions(missing=missing, test=0.2)
    manifest = ingest(shared_data("adult") / "adult.data", options, blobs)
    assert manifest.rows_by_split() == {"train": 26049, "test": 6512}
    assert manifest.classes == ("<=50K", ">50K")
    kinds = [column.kind for column in manifest.columns]
    assert kinds.count("numeric") == 6
    assert kinds.count("categorical") == 8
    assert accuracy(blobs, manifest) >= 0.85


def test_raw_adult_needs_a_choice_for_its_missing_values(tmp_path: Path) -> None:
    path = shared_data("adult") / "adult.data"
    with pytest.raises(InvalidArgument, match=r"^adult\.data, line 15, column 'column_14': the va"):
        ingest(path, IngestOptions(), DirectoryBlobs(tmp_path))
    # Line 15 of the file is the first with a question mark.
    assert "?" in path.read_text().splitlines()[14]


def test_the_published_adult_test_file_goes_in_as_it_is(tmp_path: Path) -> None:
    """Its first line is a remark and its labels end in a full stop; the errors say what helps."""
    folder = shared_data("adult")
    blobs = DirectoryBlobs(tmp_path)
    options: dict[str, Any] = {"missing": "category", "test": folder / "adult.test"}
    for wrong, advice in (({}, r"comment='\|'"), ({"comment": "|"}, r"trim_labels='\.'")):
        with pytest.raises(InvalidArgument, match=rf"adult\.test, line 2.*{advice}"):
            ingest(folder / "adult.data", IngestOptions(**options, **wrong), blobs)
    chosen = IngestOptions(**options, comment="|", trim_labels=".")
    manifest = ingest(folder / "adult.data", chosen, blobs)
    assert manifest.rows_by_split() == {"train": 32561, "test": 16281}
    assert manifest.classes == ("<=50K", ">50K")
    assert accuracy(blobs, manifest) >= 0.85


def test_a9a_is_read_as_scikit_learn_reads_it(tmp_path: Path) -> None:
    folder = shared_data("a9a")
    blobs = DirectoryBlobs(tmp_path)
    options = IngestOptions(format="libsvm", test=folder / "a9a.t", block_bytes=100_000)
    manifest = ingest(folder / "a9a", options, blobs)
    assert (manifest.format, manifest.features) == ("csr", 123)
    assert manifest.labels() == (-1, 1)
    for split, name in (("train", "a9a"), ("test", "a9a.t")):
        text = io.BytesIO((folder / name).read_bytes())
        theirs, labels = load_svmlight_file(text, n_features=123)
        features, targets = rows_of(blobs, manifest, split)
        assert (features != theirs).nnz == 0
        assert np.array(manifest.labels())[targets].tolist() == labels.tolist()


def test_the_data_of_the_demo_is_what_its_page_says(tmp_path: Path) -> None:
    blobs = DirectoryBlobs(tmp_path)
    manifest = ingest(demo_data(), IngestOptions(), blobs)
    assert manifest.rows_by_split() == {"train": 10_000, "test": 2_000}
    assert (manifest.dtype, manifest.features) == ("uint8", 784)
    assert manifest.size_bytes < 10_000_000
    for split, count in (("train", 1000), ("test", 200)):
        _, targets = rows_of(blobs, manifest, split)
        assert np.bincount(targets).tolist() == [count] * 10


def test_the_data_of_the_demo_are_images_of_fashion_mnist(tmp_path: Path) -> None:
    original = ingest(shared_data("fashion-mnist"), IngestOptions(), DirectoryBlobs(tmp_path))
    subset = ingest(demo_data(), IngestOptions(), DirectoryBlobs(tmp_path))
    for split in ("train", "test"):
        all_rows, _ = rows_of(DirectoryBlobs(tmp_path), original, split)
        rows, _ = rows_of(DirectoryBlobs(tmp_path), subset, split)
        known = {row.tobytes() for row in all_rows}
        assert all(row.tobytes() in known for row in rows)


def test_adult_from_the_raw_file_to_labels_for_another_raw_file(tmp_path: Path) -> None:
    folder = shared_data("adult")
    job = {
        "name": "income",
        "data": {"name": "adult", "shards": 8},
        "train": {
            "model": {"logistic_regression": {}},
            "optimizer": {"adam": {"learning_rate": 0.02}, "schedule": {"cosine": {}}},
            "batch_size": 2048,
            "stop": {"epochs": 40},
        },
    }
    lines = (folder / "adult.test").read_text().splitlines()[1:]
    rows = [line.rstrip(".") for line in lines if line]
    raw = tmp_path / "people.csv"
    raw.write_text("\n".join(rows))
    with phalanx.LocalCluster(workers=0) as cluster:
        cluster.data.add("adult", folder / "adult.data", missing="category", test=0.2)
        result = cluster.submit(job).wait(timeout_s=200)
        model = cluster.models.get(result.model)
    assert result.metrics["test/accuracy"] >= 0.85
    labels = model.predict(raw)
    truth = np.array([row.rsplit(", ", 1)[1] for row in rows])
    assert np.mean(labels == truth) >= 0.85
    assert any("'column_14': missing values" in sentence for sentence in model.remarks.sentences)
