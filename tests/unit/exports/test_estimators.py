"""Models as objects of scikit-learn: they predict what the models predict."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from google.protobuf.json_format import ParseDict
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from phalanx.data.ingest import ingest
from phalanx.data.model_files import load_model_directory
from phalanx.data.options import IngestOptions
from phalanx.data.predict import LoadedModel
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import DataLoss, FailedPrecondition, InvalidArgument
from phalanx.exports.estimators import estimator_of, load_convertible
from phalanx.models import DataSchema, build_model
from phalanx.models.base import views
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.data.finished_models import write_finished_model
from tests.unit.exports.conversions import CASES, CLASSIFIERS, Case, model_of, rows_of

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def assert_alike(model: LoadedModel, estimator: Any, rows: Any) -> None:
    ours, tolerance = model.predict_prepared(rows), TOLERANCE[str(model.parameters.dtype)]
    predict = estimator.transform if model.task == "projection" else estimator.predict
    theirs = predict(rows)
    assert theirs.shape == ours.labels.shape
    if model.task in ("classification", "clustering"):
        np.testing.assert_array_equal(theirs, ours.labels)
    else:
        largest = float(np.abs(ours.labels).max())
        np.testing.assert_allclose(theirs, ours.labels, rtol=0, atol=tolerance * largest)
    if ours.probabilities is not None:
        found = estimator.predict_proba(rows)
        np.testing.assert_allclose(found, ours.probabilities, rtol=0, atol=tolerance)
    if ours.decision_values is not None:
        found, largest = (
            estimator.decision_function(rows),
            float(np.abs(ours.decision_values).max()),
        )
        np.testing.assert_allclose(found, ours.decision_values, rtol=0, atol=tolerance * largest)
    if model.task == "classification":
        assert estimator.classes_.dtype == model.classes.dtype
        assert estimator.classes_.tolist() == model.classes.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_it_predicts_what_the_model_predicts(
    tmp_path: Path, case: Case, layout: str, dtype: str
) -> None:
    for standardise in (False, True):
        folder = tmp_path / str(standardise)
        model = model_of(folder, case, dtype=dtype, layout=layout, standardise=standardise)
        estimator = model.to_sklearn()
        assert_alike(model, estimator, model.prepare(rows_of(layout)))
        assert isinstance(estimator, Pipeline) == (standardise or "k_means" in case.model)
        assert estimator.n_features_in_ == model.document["features"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_rows_of_any_type_are_taken(tmp_path: Path, case: Case, dtype: str) -> None:
    model = model_of(tmp_path, case, dtype=dtype)
    estimator = model.to_sklearn()
    for given in ("float32", "float64"):
        assert_alike(model, estimator, rows_of("dense", given))
    assert_alike(model, estimator, np.abs(rows_of("dense")).astype(np.uint8))


def test_it_stays_what_it_is_without_the_model(tmp_path: Path) -> None:
    model = model_of(tmp_path, CLASSIFIERS[3], dtype="float64")
    estimator = model.to_sklearn()
    rows = rows_of("dense")
    before = estimator.predict_proba(rows)
    estimator[-1].coef_ += 1
    np.testing.assert_array_equal(model.to_sklearn().predict_proba(rows), before)
    again = pickle.loads(pickle.dumps(model.to_sklearn()))
    np.testing.assert_array_equal(again.predict_proba(rows), before)
    assert clone(again).fit(rows, np.arange(len(rows)) % 2).classes_.tolist() == [0, 1]


def test_whoever_loads_it_needs_scikit_learn_only(tmp_path: Path) -> None:
    objects = [
        model_of(tmp_path / repr(case), case, dtype="float64").to_sklearn() for case in CASES
    ]
    (tmp_path / "objects").write_bytes(pickle.dumps(objects))
    code = (
        "import pickle, sys\n"
        "pickle.load(open(sys.argv[1], 'rb'))\n"
        "sys.exit(any(name.split('.')[0] == 'phalanx' for name in sys.modules))"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "objects")]
    assert subprocess.run(command, check=False).returncode == 0


def test_components_and_what_they_explain(tmp_path: Path) -> None:
    model = model_of(tmp_path, Case({"pca": {"components": 3}}, []), dtype="float64")
    rows = model.prepare(rows_of("dense"))
    pipeline = model.to_sklearn()
    pca = pipeline[-1]
    assert pca.explained_variance_.shape == (3,)
    ours = views(model.model.layout, model.parameters)["components"]
    np.testing.assert_array_equal(pca.components_, ours)
    assert pca.inverse_transform(pipeline.transform(rows)).shape == rows.shape


def test_labels_of_ones_own(tmp_path: Path) -> None:
    for number, case in enumerate(CLASSIFIERS):
        model = model_of(tmp_path / str(number), case, dtype="float64")
        own = np.array([f"own {place}" for place in range(len(case.labels), 0, -1)])
        estimator = estimator_of(model, own)
        rows = rows_of("dense")
        places = np.searchsorted(model.classes, model.predict_prepared(rows).labels)
        np.testing.assert_array_equal(estimator.predict(rows), own[places])


def test_raw_rows_of_a_table_are_prepared_first(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("age,job,income\n39,clerk,low\n50,smith,high\n,clerk,low\n53,baker,high\n")
    blobs = DirectoryBlobs(tmp_path / "blobs")
    manifest = ingest(path, IngestOptions(missing="mean"), blobs)
    train = {"dtype": "float64", "model": {"logistic_regression": {}, "standardise": True}}
    spec = ParseDict({"train": train}, JobSpec())
    built = build_model(spec, DataSchema(manifest.features, 2, "float64"))
    write_finished_model(tmp_path / "model", manifest, spec, built)
    model = load_model_directory(tmp_path / "model")
    found = model.to_sklearn().predict(model.prepare(path))
    assert found.tolist() == model.predict(path).tolist()


def write_custom(folder: Path) -> None:
    """A model that brings code which must not run."""
    model_of(folder, CLASSIFIERS[0], dtype="float32")
    path = folder / "model" / "model.json"
    text = path.read_text().replace(
        '"logistic_regression": {\n     "bias": true\n    }',
        '"custom": {\n     "entrypoint": "net:build"\n    }',
    )
    assert "net:build" in text
    path.write_text(text.replace('"spec": {', '"spec": {"code": {"files": {"net.py": "1/0"}},'))


def test_what_has_no_counterpart_is_refused_before_its_code_runs(tmp_path: Path) -> None:
    write_custom(tmp_path)
    with pytest.raises(InvalidArgument, match="income is of the kind custom") as caught:
        load_convertible(tmp_path / "model")
    assert caught.value.reason == "NO_COUNTERPART"
    assert "k_means" in caught.value.message


def test_a_damaged_description_is_told(tmp_path: Path) -> None:
    model_of(tmp_path, CLASSIFIERS[0], dtype="float32")
    path = tmp_path / "model" / "model.json"
    for text in ("{", "[]", "{}", '{"name": "m", "spec": {"train": 7}}'):
        path.write_text(text)
        with pytest.raises(DataLoss, match="is damaged"):
            load_convertible(tmp_path / "model")


def test_without_scikit_learn_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path, CLASSIFIERS[0], dtype="float32")
    for name in [each for each in sys.modules if each.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FailedPrecondition, match=r"phalanx\[learn\]") as caught:
        model.to_sklearn()
    assert caught.value.reason == "SCIKIT_LEARN_MISSING"


def test_sparse_rows_stay_sparse_where_they_are_scaled(tmp_path: Path) -> None:
    model = model_of(tmp_path, CLASSIFIERS[0], dtype="float64", layout="csr")
    scaled = model.to_sklearn()[:-1].transform(rows_of("csr"))
    assert scipy.sparse.issparse(scaled)
