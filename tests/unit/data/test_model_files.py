"""Models as files: written, loaded, and raw rows predicted as training saw them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy
import scipy.sparse

from phalanx.data.ingest import ingest, ingest_arrays
from phalanx.data.manifest import DatasetManifest
from phalanx.data.model_files import (
    ModelDescription,
    description_files,
    load_model_directory,
    safetensors_header,
)
from phalanx.data.options import IngestOptions
from phalanx.data.predict import BLOCK_ROWS, LoadedModel
from phalanx.data.raw_rows import RawRows
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from phalanx.models import DataSchema, build_model
from phalanx.testing import datasets
from phalanx.training.sampler import RowSelection
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout, TensorSpec
from tests.unit.data.finished_models import write_finished_model

PEOPLE = """age,job,hours,income
39,clerk,40,low
50,smith,13,high
38,clerk,,low
53,baker,40,low
28,smith,40,high
37,baker,45,high
"""


def spec_of(kind: str, standardise: bool = True) -> JobSpec:
    spec = JobSpec(name="m")
    spec.train.dtype = "float32"
    getattr(spec.train.model, kind).SetInParent()
    spec.train.model.standardise = standardise
    return spec


def write_model(
    folder: Path, manifest: DatasetManifest, spec: JobSpec, code_dir: Path | None = None
) -> ModelDescription:
    schema = DataSchema(manifest.features, len(manifest.classes), spec.train.dtype)
    model = build_model(spec, schema, code_dir)
    return write_finished_model(
        folder,
        manifest,
        spec,
        model,
        dataset="people@1",
        libraries={"numpy": "2"},
        metrics={"test/accuracy": 0.75, "test/loss": float("nan")},
    )


def people_model(tmp_path: Path, missing: str = "category", **options: Any) -> LoadedModel:
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "people.csv"
    path.write_text(PEOPLE)
    blobs = DirectoryBlobs(tmp_path / "blobs")
    manifest = ingest(path, IngestOptions(missing=missing, **options), blobs)
    write_model(tmp_path / "model", manifest, spec_of("logistic_regression"))
    return load_model_directory(tmp_path / "model")


def stored_rows(manifest: DatasetManifest, blobs: DirectoryBlobs) -> Any:
    reader = ChunkReader(manifest, "train", blobs.path)
    selections: Sequence[RowSelection] = [
        RowSelection(index, np.arange(rows)) for index, rows in enumerate(reader.chunk_rows)
    ]
    return reader.rows(selections).features


def test_the_parameter_file_is_plain_safetensors_with_the_flat_vector_last(tmp_path: Path) -> None:
    tensors = [TensorSpec(name="w", shape=[3, 2]), TensorSpec(name="b", shape=[2])]
    layout = Layout(tensors=tensors, dtype="float64", element_count=8)
    flat = np.arange(8, dtype=np.float64)
    data = safetensors_header(layout) + flat.tobytes()
    loaded = safetensors.numpy.load(data)
    assert loaded["w"].tolist() == flat[:6].reshape(3, 2).tolist()
    assert loaded["b"].tolist() == [6, 7]
    layout.element_count = 9
    with pytest.raises(InvalidArgument, match="8 elements, the layout says 9"):
        safetensors_header(layout)


def test_description_says_all_that_a_user_needs(tmp_path: Path) -> None:
    people_model(tmp_path)
    document = json.loads((tmp_path / "model" / "model.json").read_bytes())
    assert document["classes"] == ["high", "low"]
    assert document["target"] == "income"
    by_name = {column["name"]: column for column in document["columns"]}
    assert by_name["job"]["vocabulary"] == ["baker", "clerk", "smith"]
    assert by_name["hours"]["fill"] == [35.6]
    assert len(document["standardisation"]["mean"]) == document["features"] == 5
    assert document["spec"]["train"]["model"]["standardise"] is True
    assert document["metrics"] == {"test/accuracy": 0.75, "test/loss": None}
    for key in ("fingerprint", "libraries", "spec_sha256", "bit_identical", "parameters_sha256"):
        assert document[key]
    text = (tmp_path / "model" / "README.md").read_text()
    assert "tells 2 classes of `income` apart" in text
    assert "| hours | number | becomes 35.6 |" in text
    assert "| job | one of 3 categories | is no category |" in text


@pytest.mark.parametrize("missing", ["category", "mean"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_raw_and_prepared_rows_predict_the_same_bits(
    tmp_path: Path, missing: str, layout: str
) -> None:
    path = tmp_path / "people.csv"
    path.write_text(PEOPLE.replace("53,baker", "53,?"))
    blobs = DirectoryBlobs(tmp_path / "blobs")
    manifest = ingest(path, IngestOptions(missing=missing, layout=layout), blobs)
    write_model(tmp_path / "model", manifest, spec_of("logistic_regression"))
    model = load_model_directory(tmp_path / "model")
    chunks = stored_rows(manifest, blobs)
    from_raw = model.predict_probabilities(path)
    assert from_raw.tobytes() == model.predict_prepared(chunks).probabilities.tobytes()
    prepared = model.prepare(path)
    assert scipy.sparse.issparse(prepared) == (layout == "csr")
    assert from_raw.tobytes() == model.predict_prepared(prepared).probabilities.tobytes()
    assert len(np.unique(from_raw)) > 4


def test_every_kind_of_raw_rows_gives_the_same_predictions(tmp_path: Path) -> None:
    model = people_model(tmp_path)
    path = tmp_path / "people.csv"
    expected = model.predict_probabilities(path)
    table = pa.table(
        {
            "hours": [40, 13, None, 40, 40, 45],
            "age": [39, 50, 38, 53, 28, 37],
            "job": ["clerk", "smith", "clerk", "baker", "smith", "baker"],
        }
    )
    rows = table.to_pylist()
    columns = table.to_pydict()
    pa.parquet.write_table(table, tmp_path / "people.parquet")
    positions = [["39", "clerk", "40"], [np.int64(50), "smith", 13], [38, np.str_("clerk"), None]]
    for data in (table, rows, columns, tmp_path / "people.parquet", str(path)):
        assert model.predict_probabilities(data).tobytes() == expected.tobytes()
    by_position = model.predict_probabilities(np.array(positions, dtype=object))
    assert by_position.tobytes() == expected[:3].tobytes()
    assert model.predict(rows[:1])[0] in {"high", "low"}
    headless = tmp_path / "headless.csv"
    headless.write_text("39,clerk,40\n50,smith,13\n")
    assert model.predict_probabilities(headless).tobytes() == expected[:2].tobytes()


def test_labels_are_those_of_the_larger_probability_in_their_original_type(tmp_path: Path) -> None:
    features, targets = datasets.classification(rows=300, classes=3)
    blobs = DirectoryBlobs(tmp_path / "blobs")
    manifest = ingest_arrays(features, targets * 10 + 5, IngestOptions(), blobs)
    write_model(tmp_path / "model", manifest, spec_of("softmax_regression"))
    model = load_model_directory(tmp_path / "model")
    labels = model.predict(features)
    assert labels.dtype == np.int64
    assert set(labels) <= {5, 15, 25}
    probabilities = model.predict_probabilities(features)
    assert labels.tolist() == [[5, 15, 25][index] for index in probabilities.argmax(axis=1)]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 700])
def test_a_prediction_does_not_depend_on_how_many_rows_are_asked_for(
    tmp_path: Path, rows: int
) -> None:
    features, targets = datasets.classification(rows=700, features=33)
    manifest = ingest_arrays(features, targets, IngestOptions(), DirectoryBlobs(tmp_path / "b"))
    write_model(tmp_path / "model", manifest, spec_of("softmax_regression"))
    model = load_model_directory(tmp_path / "model")
    whole = model.predict_probabilities(features)
    part = model.predict_probabilities(features[:rows])
    assert part.tobytes() == whole[:rows].tobytes()


def test_regression_predicts_numbers(tmp_path: Path) -> None:
    features, targets = datasets.regression(rows=100)
    manifest = ingest_arrays(features, targets, IngestOptions(), DirectoryBlobs(tmp_path / "b"))
    write_model(tmp_path / "model", manifest, spec_of("linear_regression"))
    model = load_model_directory(tmp_path / "model")
    assert model.predict(features).shape == (100,)
    assert model.predict(features[:0]).shape == (0,)
    with pytest.raises(InvalidArgument, match="no probabilities"):
        model.predict_probabilities(features)


def test_sparse_rows_and_dense_rows_of_a_sparse_model_agree(tmp_path: Path) -> None:
    features, targets = datasets.sparse_classification(rows=300)
    manifest = ingest_arrays(features, targets, IngestOptions(), DirectoryBlobs(tmp_path / "b"))
    write_model(tmp_path / "model", manifest, spec_of("logistic_regression", standardise=False))
    model = load_model_directory(tmp_path / "model")
    sparse = model.predict_probabilities(features)
    assert sparse.tobytes() == model.predict_probabilities(features.toarray()).tobytes()
    lines = [
        " ".join(["0", *(f"{index + 1}:{row[index]}" for index in np.flatnonzero(row))])
        for row in features.toarray().astype(np.float64)
    ]
    (tmp_path / "rows.libsvm").write_text("\n".join(lines))
    assert sparse.tobytes() == model.predict_probabilities(tmp_path / "rows.libsvm").tobytes()


def test_images_in_npz_and_idx_files_are_predicted_without_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 4, 4)).astype(np.uint8)
    manifest = ingest_arrays(
        images, np.arange(40) % 3, IngestOptions(), DirectoryBlobs(tmp_path / "b")
    )
    write_model(tmp_path / "model", manifest, spec_of("softmax_regression"))
    model = load_model_directory(tmp_path / "model")
    expected = model.predict_probabilities(images)
    np.savez(tmp_path / "rows.npz", pixels=images)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "rows-idx3-ubyte").write_bytes(header + images.tobytes())
    for name in ("rows.npz", "rows-idx3-ubyte"):
        assert model.predict_probabilities(tmp_path / name).tobytes() == expected.tobytes()
    text = "\n".join(",".join(map(str, row)) for row in images.reshape(40, 16).tolist())
    (tmp_path / "rows.csv").write_text(text)
    assert model.predict_probabilities(tmp_path / "rows.csv").tobytes() == expected.tobytes()


def test_a_missing_column_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = people_model(tmp_path)
    with pytest.raises(InvalidArgument, match="column 'job' is missing; the model needs age, job"):
        model.predict([{"age": 3, "hours": 4}])


def test_extra_columns_are_ignored_and_told_of(tmp_path: Path) -> None:
    model = people_model(tmp_path)
    row = {"age": 39, "job": "clerk", "hours": 40, "income": "low", "shoe": 42}
    plain = model.predict_probabilities([{name: row[name] for name in ("age", "job", "hours")}])
    assert model.remarks.ignored_columns == ()
    assert model.predict_probabilities([row]).tobytes() == plain.tobytes()
    assert model.remarks.ignored_columns == ("shoe",)
    assert "column 'shoe' is not known, it is ignored" in model.remarks.sentences


def test_a_column_that_no_category_can_be_read_from_is_refused(tmp_path: Path) -> None:
    table = pa.table({"age": [39], "job": [["clerk"]], "hours": [40]})
    with pytest.raises(InvalidArgument, match=r"row 1, column 'job': a list.* is no category"):
        people_model(tmp_path).predict(table)


def test_an_unknown_category_counts_as_none_of_them_and_is_told_of(tmp_path: Path) -> None:
    model = people_model(tmp_path)
    prepared = model.prepare([{"age": 39, "job": "diver", "hours": 40}])
    assert prepared.tolist() == [[39, 0, 0, 0, 40]]
    assert any("'job'" in sentence for sentence in model.remarks.sentences)


def test_missing_values_do_what_they_did_in_training(tmp_path: Path) -> None:
    lenient = people_model(tmp_path / "lenient")
    prepared = lenient.prepare([{"age": 39, "job": "clerk", "hours": "?"}])
    np.testing.assert_allclose(prepared, [[39, 0, 1, 0, 35.6]], rtol=1e-6)
    strict_folder = tmp_path / "strict"
    strict_folder.mkdir()
    (strict_folder / "p.csv").write_text(PEOPLE.replace(",,", ",1,"))
    manifest = ingest(
        strict_folder / "p.csv", IngestOptions(), DirectoryBlobs(strict_folder / "blobs")
    )
    write_model(strict_folder / "model", manifest, spec_of("logistic_regression"))
    strict = load_model_directory(strict_folder / "model")
    with pytest.raises(InvalidArgument, match="row 2, column 'hours': the value is missing"):
        strict.predict([{"age": 1, "job": "clerk", "hours": 2}, {"age": 1, "job": "clerk"}])


def test_a_bad_cell_is_named(tmp_path: Path) -> None:
    model = people_model(tmp_path)
    with pytest.raises(InvalidArgument, match="row 1, column 'age': 'old' is not a number"):
        model.predict([{"age": "old", "job": "clerk", "hours": 40}])
    (tmp_path / "bad.csv").write_text("age,job,hours\n1,clerk,2\n3,clerk,many\n")
    with pytest.raises(InvalidArgument, match=r"bad\.csv, line 3, column 'hours': 'many' is not"):
        model.predict(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "age,job,hours\n1,clerk,2\n3,clerk,many\n",
            "line 3, column 'hours': 'many' is not a number",
        ),
        ("#age,job,hours\n1,clerk,2,3\n", "line 2: 4 cells, expected 3"),
    ],
)
def test_nothing_is_advised_that_no_prediction_can_say(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        people_model(tmp_path).predict(path)
    assert caught.value.message == f"bad.csv, {message}"


def test_arrays_to_predict_go_by_usual_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=np.zeros((2, 3)), two=np.zeros((2, 3)))
    rows = RawRows((), features=3, dtype="float32", sparse=False, target="y")
    with pytest.raises(InvalidArgument, match="rows to predict are its only one, or called one of"):
        list(rows.encode(tmp_path / "a.npz")[0])


def test_arrays_of_a_wrong_width_are_refused(tmp_path: Path) -> None:
    features, targets = datasets.classification(rows=50)
    manifest = ingest_arrays(features, targets, IngestOptions(), DirectoryBlobs(tmp_path / "b"))
    write_model(tmp_path / "model", manifest, spec_of("softmax_regression"))
    model = load_model_directory(tmp_path / "model")
    with pytest.raises(InvalidArgument, match="rows have 7 features, the model needs 8"):
        model.predict(features[:, :7])
    with pytest.raises(InvalidArgument, match=r"not an array of shape \(8,\)"):
        model.predict(features[0])
    with pytest.raises(InvalidArgument, match="prepared rows have 8 features"):
        model.predict_prepared(features[:, :7])


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    people_model(tmp_path)
    folder = tmp_path / "model"
    parameters = folder / "model.safetensors"
    whole = bytearray(parameters.read_bytes())
    whole[-1] ^= 1
    parameters.write_bytes(whole)
    with pytest.raises(DataLoss, match="another SHA-256"):
        load_model_directory(folder)
    parameters.write_bytes(whole[:-4])
    with pytest.raises(DataLoss, match="does not hold the tensors"):
        load_model_directory(folder)
    parameters.unlink()
    with pytest.raises(NotFound, match=r"no model\.safetensors"):
        load_model_directory(folder)
    (folder / "model.json").write_text("{}")
    with pytest.raises(DataLoss, match="does not describe a model"):
        load_model_directory(folder)
    with pytest.raises(NotFound, match=r"no model\.json"):
        load_model_directory(tmp_path)


CODE = """
from phalanx.models import UserModel

class Plain(UserModel):
    def __init__(self, schema):
        super().__init__(schema, {"w": (schema.features, schema.classes)})
    def initial(self, seed):
        raise AssertionError("the model has its parameters")
    def loss_and_gradients(self, parameters, features, targets):
        raise AssertionError("a model that was loaded only predicts")
    def predictions(self, parameters, features):
        return features @ parameters["w"]

def build(schema):
    return Plain(schema)
"""


def test_code_of_the_model_runs_only_when_it_is_allowed(tmp_path: Path) -> None:
    features, targets = datasets.classification(rows=50)
    manifest = ingest_arrays(features, targets, IngestOptions(), DirectoryBlobs(tmp_path / "b"))
    spec = spec_of("custom", standardise=False)
    spec.train.model.custom.entrypoint = "my_net_in_a_model:build"
    spec.code.files["my_net_in_a_model.py"] = CODE
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_net_in_a_model.py").write_text(CODE)
    description = write_model(tmp_path / "model", manifest, spec, tmp_path / "code")
    with pytest.raises(FailedPrecondition, match="my_net_in_a_model:build runs code of its own"):
        load_model_directory(tmp_path / "model")
    model = load_model_directory(tmp_path / "model", allow_code=True)
    weights = model.parameters.reshape(8, 3)
    np.testing.assert_allclose(model.predict_probabilities(features), features @ weights, rtol=1e-5)
    spec.code.files["../evil.py"] = "x = 1"
    for name, data in description_files(dataclasses.replace(description, spec=spec)).items():
        (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(DataLoss, match="no path inside"):
        load_model_directory(tmp_path / "model", allow_code=True)
