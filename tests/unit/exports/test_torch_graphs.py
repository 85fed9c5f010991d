"""PyTorch modules as ONNX files; skipped where PyTorch is not installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.data.ingest import ingest_arrays
from phalanx.data.model_files import load_model_directory
from phalanx.data.options import IngestOptions
from phalanx.data.predict import LoadedModel
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.exports.estimators import load_convertible
from phalanx.exports.onnx_files import load_for_graph, onnx_bytes
from phalanx.models import DataSchema, build_model
from phalanx.sdk.exporting import export_model
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.data.finished_models import write_finished_model
from tests.unit.exports.conversions import ROWS, THREE, TWO, rows_of

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="no onnxscript for this Python")
runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")

NET = """
import torch
from torch import nn


def normed(schema):
    return nn.Sequential(
        nn.Linear(schema.features, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(5, max(schema.classes, 1)))


def one_score(schema):
    return nn.Sequential(nn.Linear(schema.features, 1), nn.Flatten(0))


class Peculiar(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.last = nn.Linear(features, 1)

    def forward(self, x):
        if float(x.sum()) > 0:
            return self.last(x)
        return self.last(-x)


def peculiar(schema):
    return Peculiar(schema.features)
"""

CASES = [
    ("normed", "cross_entropy", THREE),
    ("one_score", "binary_cross_entropy_with_logits", TWO),
    ("normed", "mse_loss", []),
    ("normed", "poisson_nll_loss", []),
]


def torch_model(
    folder: Path, function: str, loss: str, labels: list[str], dtype: str, layout: str = "dense"
) -> LoadedModel:
    """Write a model and load it."""
    numbers = np.arange(ROWS)
    targets = np.array(labels)[numbers % len(labels)] if labels else numbers / ROWS
    task: Any = "classification" if labels else "regression"
    options = IngestOptions(task=task, dtype="float64")
    manifest = ingest_arrays(rows_of(layout), targets, options, DirectoryBlobs(folder / "blobs"))
    spec = JobSpec(name="m")
    spec.train.dtype = dtype
    spec.train.model.torch.module = f"net:{function}"
    spec.train.model.torch.loss = loss
    spec.train.model.standardise = True
    spec.code.files["net.py"] = NET
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "net.py").write_text(NET)
    model = build_model(spec, DataSchema(manifest.features, len(labels), dtype), folder / "code")
    write_finished_model(folder / "model", manifest, spec, model)
    return load_model_directory(folder / "model", allow_code=True)


def outputs_of(contents: bytes, rows: Any) -> dict[str, Any]:
    session = runtime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"features": rows}), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("function", "loss", "labels"), CASES)
def test_a_runtime_computes_what_a_module_predicts(
    tmp_path: Path, function: str, loss: str, labels: list[str], dtype: str
) -> None:
    model = torch_model(tmp_path, function, loss, labels, dtype)
    rows = rows_of("dense")
    outputs = outputs_of(onnx_bytes(model), rows.astype(dtype))
    ours, tolerance = model.predict_prepared(rows), {"float32": 1e-6, "float64": 1e-12}[dtype]
    if labels:
        assert list(outputs) == ["label", "probabilities"]
        assert outputs["label"].tolist() == ours.labels.tolist()
        found, expected = outputs["probabilities"], ours.probabilities
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    else:
        [found] = outputs.values()
        assert found.shape == (ROWS, 1)
        np.testing.assert_allclose(found[:, 0], ours.labels, rtol=10 * tolerance, atol=tolerance)


def test_a_model_of_sparse_rows_takes_dense_ones(tmp_path: Path) -> None:
    model = torch_model(tmp_path, *CASES[0], "float64", layout="csr")
    outputs = outputs_of(onnx_bytes(model), rows_of("dense"))
    ours = model.predict_prepared(rows_of("csr"))
    np.testing.assert_allclose(outputs["probabilities"], ours.probabilities, rtol=0, atol=1e-12)


def test_a_file_names_no_place_of_this_machine_and_is_the_same_again(tmp_path: Path) -> None:
    model = torch_model(tmp_path, *CASES[0], "float32")
    contents = onnx_bytes(model)
    assert b"net.py" not in contents
    assert b"site-packages" not in contents
    assert contents == onnx_bytes(load_model_directory(tmp_path / "model", allow_code=True))
    assert model.predict_prepared(rows_of("dense")).rows == ROWS


def test_code_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    torch_model(tmp_path, *CASES[0], "float32")
    with pytest.raises(FailedPrecondition, match="runs code of its own"):
        load_for_graph(tmp_path / "model")
    with pytest.raises(InvalidArgument, match="is of the kind torch"):
        load_convertible(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "m.onnx", allow_code=True)
    assert (tmp_path / "m.onnx").stat().st_size > 0


def test_a_module_that_goes_by_the_numbers_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = torch_model(tmp_path, "peculiar", "mse_loss", [], "float32")
    with pytest.raises(InvalidArgument, match="cannot write the module of income") as caught:
        onnx_bytes(model)
    assert caught.value.reason == "NO_COUNTERPART"
    assert capfd.readouterr() == ("", "")
