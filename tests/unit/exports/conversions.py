"""Models of every kind that has a counterpart, with parameters that are not all zero."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from google.protobuf.json_format import ParseDict

from phalanx.data.ingest import ingest_arrays
from phalanx.data.model_files import load_model_directory
from phalanx.data.options import IngestOptions
from phalanx.data.predict import LoadedModel
from phalanx.data.writer import DirectoryBlobs
from phalanx.models import DataSchema, build_model
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.data.finished_models import write_finished_model

ROWS, FEATURES = 700, 6
_LINEAR = ("linear_regression", "logistic_regression", "softmax_regression", "linear_svm")
TWO, THREE = ["no", "yes"], ["east", "north", "west"]


class Case(NamedTuple):
    """A kind of model, and the labels of its data; none: numbers."""

    model: dict[str, Any]
    labels: list[Any]

    def __repr__(self) -> str:
        """Name of the test."""
        ((kind, arguments),) = self.model.items()
        words = "-".join(str(value) for value in arguments.values())
        return f"{kind}-{words}-{len(self.labels)}-{type((self.labels or [0])[0]).__name__}"


CLASSIFIERS = [
    Case({"logistic_regression": {}}, TWO),
    Case({"logistic_regression": {"bias": False}}, [False, True]),
    Case({"softmax_regression": {}}, [3, 7]),
    Case({"softmax_regression": {}}, THREE),
    Case({"softmax_regression": {"bias": False}}, [0.5, 1.5, 2.0]),
    Case({"mlp": {"hidden": [5]}}, TWO),
    Case({"mlp": {"hidden": [5, 4], "activation": "tanh"}}, THREE),
    Case({"mlp": {"hidden": [], "activation": "sigmoid"}}, [10, 20, 30]),
    Case({"mlp": {"hidden": [4], "activation": "sigmoid"}}, [0.25, 0.5]),
    Case({"linear_svm": {}}, TWO),
    Case({"linear_svm": {"bias": False, "loss": "squared_hinge"}}, [3, 7]),
]
REGRESSIONS = [
    Case({"linear_regression": {}}, []),
    Case({"linear_regression": {"bias": False}}, []),
    Case({"mlp": {"hidden": [5, 3], "activation": "sigmoid", "loss": "squared_error"}}, []),
]
OTHERS = [Case({"k_means": {"clusters": 4}}, TWO), Case({"pca": {"components": 3}}, TWO)]
CASES = [*CLASSIFIERS, *REGRESSIONS, *OTHERS]


def rows_of(layout: str, dtype: str = "float64") -> Any:
    """Return rows: the first feature lies far from zero, the last one is constant."""
    generator = np.random.Generator(np.random.Philox(3))
    features = generator.normal(size=(ROWS, FEATURES)) * (generator.random((ROWS, FEATURES)) > 0.3)
    features[:, 0] = 4 + 3 * features[:, 0]
    features[:, -1] = 2
    if layout == "csr":
        return scipy.sparse.csr_array(features.astype(dtype))
    return features.astype(dtype)


def model_of(
    folder: Path, case: Case, *, dtype: str, layout: str = "dense", standardise: bool = True
) -> LoadedModel:
    """Write a model of a case, whose data are float64, and load it."""
    rows = rows_of(layout)
    numbers = np.arange(ROWS)
    targets = np.array(case.labels)[numbers % len(case.labels)] if case.labels else numbers / 7
    options = IngestOptions(task="classification" if case.labels else "regression", dtype="float64")
    manifest = ingest_arrays(rows, targets, options, DirectoryBlobs(folder / "blobs"))
    model = {**case.model, "standardise": standardise}
    spec = ParseDict({"name": "m", "train": {"dtype": dtype, "model": model}}, JobSpec())
    for kind in _LINEAR:
        given = case.model.get(kind)
        if given is not None:
            getattr(spec.train.model, kind).bias = given.get("bias", True)
    schema = DataSchema(manifest.features, len(manifest.classes), dtype)
    write_finished_model(folder / "model", manifest, spec, build_model(spec, schema))
    return load_model_directory(folder / "model")
