"""Models of jobs that chose columns: their files, and what they predict of rows of any width."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse

from phalanx.data.choice import choose
from phalanx.data.ingest import ingest, ingest_arrays
from phalanx.data.manifest import DatasetManifest
from phalanx.data.model_files import (
    load_model_directory,
)
from phalanx.data.options import IngestOptions
from phalanx.data.predict import LoadedModel
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import InvalidArgument
from phalanx.models import DataSchema, build_model
from phalanx.testing import datasets
from phalanx.training.sampler import RowSelection
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.data.finished_models import write_finished_model

PEOPLE = """age,job,hours,town,income
39,clerk,40,Ulm,low
50,smith,13,Bonn,high
38,clerk,,Ulm,low
53,baker,40,Jena,low
28,smith,40,Bonn,high
"""
HEADLESS = "\n".join(line.rpartition(",")[0] for line in PEOPLE.splitlines()[1:]) + "\n"


def write_model(
    folder: Path, manifest: DatasetManifest, *columns: str, standardise: bool = True
) -> LoadedModel:
    """A model with parameters that are not all zero, as a finished job would leave it."""
    regression = manifest.task == "regression"
    kind = "linear_regression" if regression else "softmax_regression"
    spec = JobSpec(name="m", data={"name": "data", "features": columns})
    getattr(spec.train.model, kind).SetInParent()
    spec.train.model.standardise = standardise
    features = choose(manifest, columns).manifest.features
    model = build_model(spec, DataSchema(features, len(manifest.classes), "float32"))
    write_finished_model(folder, manifest, spec, model)
    return load_model_directory(folder)


def stored_rows(manifest: DatasetManifest, blobs: DirectoryBlobs, *columns: str) -> Any:
    reader = ChunkReader(manifest, "train", blobs.path, columns=columns)
    everything = [RowSelection(index, np.arange(n)) for index, n in enumerate(reader.chunk_rows)]
    return reader.rows(everything).features


def people_model(tmp_path: Path, *columns: str, **options: Any) -> tuple[LoadedModel, Any, Path]:
    """A model of some columns, the rows that it was trained on, and their file."""
    path = tmp_path / "people.csv"
    path.write_text(PEOPLE)
    blobs = DirectoryBlobs(tmp_path / "blobs")
    manifest = ingest(path, IngestOptions(missing="mean", **options), blobs)
    model = write_model(tmp_path / "model", manifest, *columns)
    return model, stored_rows(manifest, blobs, *columns), path


def same(one: Any, other: Any) -> bool:
    return bool(one.tobytes() == other.tobytes())


def test_the_description_lists_the_chosen_columns_alone(tmp_path: Path) -> None:
    people_model(tmp_path, "job", "hours")
    document = json.loads((tmp_path / "model" / "model.json").read_bytes())
    assert [column["name"] for column in document["columns"]] == ["job", "hours"]
    assert document["features"] == 4
    assert len(document["standardisation"]["mean"]) == 4
    assert document["chosen_from"] == {"count": 4, "names": ["age", "job", "hours", "town"]}
    text = (tmp_path / "model" / "README.md").read_text()
    assert re.findall(r"^\| (\w+) \|", text, re.MULTILINE) == ["column", "job", "hours"]
    assert "4 features" in text
    assert "The job chose 2 columns of 4." in text


def test_a_job_that_chose_nothing_leaves_what_it_did(tmp_path: Path) -> None:
    people_model(tmp_path)
    document = json.loads((tmp_path / "model" / "model.json").read_bytes())
    assert document["chosen_from"] is None
    assert "chose" not in (tmp_path / "model" / "README.md").read_text()


def test_a_model_from_before_columns_were_chosen_is_read(tmp_path: Path) -> None:
    model, rows, path = people_model(tmp_path)
    file = tmp_path / "model" / "model.json"
    document = json.loads(file.read_bytes())
    del document["chosen_from"]
    file.write_text(json.dumps(document))
    again = load_model_directory(tmp_path / "model")
    assert same(again.predict_probabilities(path), model.predict_prepared(rows).probabilities)


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("columns", [["job", "hours"], ["town"], ["age", "town"]], ids=str)
def test_raw_and_prepared_rows_predict_the_same_bits(
    tmp_path: Path, columns: list[str], layout: str
) -> None:
    model, rows, path = people_model(tmp_path, *columns, layout=layout)
    from_raw = model.predict_probabilities(path)
    assert same(from_raw, model.predict_prepared(rows).probabilities)
    prepared = model.prepare(path)
    assert scipy.sparse.issparse(prepared) == (layout == "csr")
    assert same(from_raw, model.predict_prepared(prepared).probabilities)
    assert len(np.unique(from_raw)) > 2


def test_only_the_chosen_columns_are_asked_for(tmp_path: Path) -> None:
    model, rows, _ = people_model(tmp_path, "job", "hours")
    expected = model.predict_prepared(rows).probabilities
    assert expected is not None
    table = {"job": ["clerk", "smith", "clerk"], "hours": [40, 13, None]}
    assert same(model.predict_probabilities(table), expected[:3])
    assert same(model.predict_probabilities(pa.table(table)), expected[:3])
    assert model.remarks.ignored_columns == ()
    assert same(model.predict_probabilities([{"hours": 40, "job": "clerk"}]), expected[:1])
    with pytest.raises(InvalidArgument, match=r"'job' is missing; the model needs job, hours$"):
        model.predict({"hours": [40], "age": [3]})


def test_other_columns_are_ignored_and_told_of(tmp_path: Path) -> None:
    model, rows, path = people_model(tmp_path, "job", "hours")
    # What is wrong in a column that the model does not use is nobody's business.
    path.write_text(PEOPLE.replace("39,", "old,").replace("Bonn", ""))
    assert same(model.predict_probabilities(path), model.predict_prepared(rows).probabilities)
    assert model.remarks.ignored_columns == ("age", "town")
    told = model.remarks.sentences
    assert told[0] == "columns that the job did not choose are ignored: age, town"
    model.predict({"hours": [40], "job": ["smith"], "shoe": [42]})
    assert model.remarks.sentences == ("column 'shoe' is not known, it is ignored",)


def test_rows_by_position_have_all_columns_or_the_chosen(tmp_path: Path) -> None:
    model, rows, path = people_model(tmp_path, "job", "hours")
    expected = model.predict_prepared(rows).probabilities
    assert expected is not None
    cells = [line.split(",") for line in HEADLESS.splitlines()]
    whole = np.array(cells, dtype=object)
    assert same(model.predict_probabilities(whole), expected)
    assert same(model.predict_probabilities(whole[:, [1, 2]]), expected)
    path.write_text(HEADLESS)
    assert same(model.predict_probabilities(path), expected)
    path.write_text("\n".join(",".join(row[1:3]) for row in cells))
    assert same(model.predict_probabilities(path), expected)
    path.write_text("\n".join(",".join(row[:3]) for row in cells))
    with pytest.raises(InvalidArgument, match="has no header line and 3 columns"):
        model.predict(path)
    with pytest.raises(InvalidArgument, match="2 names for 3 columns"):
        model.predict(whole[:, :3])


def test_numbers_of_named_columns_by_position(tmp_path: Path) -> None:
    features, targets = datasets.classification(rows=80, features=5)
    blobs = DirectoryBlobs(tmp_path / "blobs")
    names = ("a", "b", "c", "d", "e")
    manifest = ingest_arrays(features, targets, IngestOptions(), blobs, feature_names=names)
    model = write_model(tmp_path / "model", manifest, "b", "e")
    rows = stored_rows(manifest, blobs, "b", "e")
    expected = model.predict_prepared(rows).probabilities
    assert same(model.predict_probabilities(features), expected)
    assert same(model.predict_probabilities(features[:, [1, 4]]), expected)
    with pytest.raises(
        InvalidArgument,
        match="rows have 3 features, the model needs all 5 of the training data, or the 2 that",
    ):
        model.predict(features[:, :3])
    frame = dict(zip(names, features.T, strict=True))
    assert same(model.predict_probabilities(frame), expected)
    unnamed = dict(zip("vwxyz", features.T, strict=True))
    with pytest.raises(InvalidArgument, match="column 'b' is missing"):
        model.predict(unnamed)
    with pytest.raises(InvalidArgument, match="prepared rows have 2 features"):
        model.predict_prepared(features)


def test_columns_without_names_go_by_number_or_position(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 4, 4)).astype(np.uint8)
    blobs = DirectoryBlobs(tmp_path / "blobs")
    manifest = ingest_arrays(images, np.arange(40) % 3, IngestOptions(), blobs)
    columns = ("x2", "x7", "x8", "x16")
    model = write_model(tmp_path / "model", manifest, *columns)
    expected = model.predict_prepared(stored_rows(manifest, blobs, *columns)).probabilities
    flat = images.reshape(40, 16)
    chosen = flat[:, [1, 6, 7, 15]]
    np.savez(tmp_path / "rows.npz", pixels=images)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "rows-idx3-ubyte").write_bytes(header + images.tobytes())
    for name, part in (("rows.csv", flat), ("few.csv", chosen)):
        (tmp_path / name).write_text("\n".join(",".join(map(str, row)) for row in part.tolist()))
    for rows in (images, flat, chosen, flat.astype(object), chosen.astype(object)):
        assert same(model.predict_probabilities(rows), expected)
    for file in ("rows.npz", "rows-idx3-ubyte", "rows.csv", "few.csv"):
        assert same(model.predict_probabilities(tmp_path / file), expected)
    numbered = {f"x{index + 1}": flat[:, index] for index in range(16)}
    assert same(model.predict_probabilities(numbered), expected)
    assert same(model.predict_probabilities({name: numbered[name] for name in columns}), expected)
    by_place = {f"pixel {index}": flat[:, index] for index in range(16)}
    assert same(model.predict_probabilities(by_place), expected)
    assert len(model.remarks.unchosen_columns) == 12
    with pytest.raises(InvalidArgument, match="'x2' is missing; the model needs x2, x7, x8, x16"):
        model.predict({f"pixel {index}": flat[:, index] for index in range(5)})
    # As many as were chosen, but another one of them: a name says more than a position.
    with pytest.raises(InvalidArgument, match="'x16' is missing; the model needs x2, x7, x8, x16"):
        model.predict({name: numbered[name] for name in ("x2", "x7", "x8", "x9")})
    text = (tmp_path / "model" / "README.md").read_text()
    assert re.findall(r"^\| (x\d+) \|", text, re.MULTILINE) == list(columns)


def test_sparse_rows_are_whole_rows(tmp_path: Path) -> None:
    features, targets = datasets.sparse_classification(rows=300)
    blobs = DirectoryBlobs(tmp_path / "blobs")
    manifest = ingest_arrays(features, targets, IngestOptions(), blobs)
    columns = ("x3", "x10", "x11", "x12")
    model = write_model(tmp_path / "model", manifest, *columns, standardise=False)
    expected = model.predict_prepared(stored_rows(manifest, blobs, *columns)).probabilities
    assert expected is not None
    chosen = features.toarray()[:, [2, 9, 10, 11]]
    for rows in (features, features.toarray(), chosen):
        assert same(model.predict_probabilities(rows), expected)
    # Rows that end early, one of them where the chosen columns alone would.
    (tmp_path / "rows.libsvm").write_text("0 3:1.5 4:2\n1 10:1 12:3\n0\n")
    short = np.zeros((3, 50), np.float32)
    short[0, [2, 3]], short[1, [9, 11]] = (1.5, 2), (1, 3)
    expected = model.predict_probabilities(short)
    assert same(model.predict_probabilities(tmp_path / "rows.libsvm"), expected)
    for width in (4, 12, 51):
        with pytest.raises(InvalidArgument, match=f"{width} features.* all 50 of the training dat"):
            model.predict(scipy.sparse.csr_array((3, width), dtype=np.float32))
    (tmp_path / "rows.libsvm").write_text("0 51:1\n")
    with pytest.raises(InvalidArgument, match="indices go up to 50"):
        model.predict(tmp_path / "rows.libsvm")
