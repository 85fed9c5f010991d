"""Models as ONNX files: what a runtime computes of them is what the models predict."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.data.predict import LoadedModel
from phalanx.errors import FailedPrecondition
from phalanx.exports.onnx_files import onnx_bytes
from tests.unit.exports.conversions import CASES, CLASSIFIERS, Case, model_of, rows_of

# Computes in its own threads and kernels, so that it is no echo of NumPy.
runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def outputs_of(contents: bytes, rows: Any) -> dict[str, Any]:
    session = runtime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"features": rows}), strict=True))


def assert_alike(model: LoadedModel, outputs: dict[str, Any], rows: Any) -> None:
    ours, tolerance = model.predict_prepared(rows), TOLERANCE[str(model.parameters.dtype)]
    if model.task == "classification":
        found = outputs.pop("label")
        assert found.tolist() == _written(model, ours.labels)
        if ours.decision_values is not None:
            expected = np.stack([-ours.decision_values, ours.decision_values], axis=1)
            tolerance *= float(np.abs(expected).max())
            np.testing.assert_allclose(outputs["scores"], expected, rtol=0, atol=tolerance)
        else:
            found, expected = outputs["probabilities"], ours.probabilities
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    elif model.task == "clustering":
        assert outputs["cluster"].tolist() == ours.labels.tolist()
        assert outputs["distances"].argmin(axis=1).tolist() == ours.labels.tolist()
    else:
        [found] = outputs.values()
        found = found[:, 0] if model.task == "regression" else found
        largest = float(np.abs(ours.labels).max())
        np.testing.assert_allclose(found, ours.labels, rtol=0, atol=tolerance * largest)


def _written(model: LoadedModel, labels: Any) -> list[Any]:
    """As a file has them: fractions are texts."""
    return [str(each) if isinstance(each, float) else each for each in labels.tolist()]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_runtime_computes_what_the_model_predicts(tmp_path: Path, case: Case, dtype: str) -> None:
    model = model_of(tmp_path, case, dtype=dtype)
    rows = rows_of("dense")
    assert_alike(model, outputs_of(onnx_bytes(model), rows.astype(dtype)), rows)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_models_of_sparse_rows_take_dense_ones(tmp_path: Path, dtype: str) -> None:
    for number, case in enumerate((CLASSIFIERS[0], CLASSIFIERS[6])):
        model = model_of(tmp_path / str(number), case, dtype=dtype, layout="csr")
        outputs = outputs_of(onnx_bytes(model), rows_of("dense", dtype))
        assert_alike(model, outputs, rows_of("csr"))


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    model = model_of(tmp_path, CLASSIFIERS[4], dtype="float32")
    session = runtime.InferenceSession(onnx_bytes(model), providers=["CPUExecutionProvider"])
    described = session.get_modelmeta()
    assert described.graph_name == "income"
    told = described.custom_metadata_map
    assert told["parameters_sha256"] == model.parameters_sha256
    assert json.loads(told["classes"]) == ["0.5", "1.5", "2.0"]
    assert told["target"] == model.target
    [features] = session.get_inputs()
    assert (features.name, features.type, features.shape) == (
        *("features", "tensor(float)"),
        [None, model.document["features"]],
    )


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    contents = onnx_bytes(model_of(tmp_path, CLASSIFIERS[6], dtype="float64"))
    code = (
        "import sys\n"
        "from phalanx.data.model_files import load_model_directory\n"
        "from phalanx.exports.onnx_files import onnx_bytes\n"
        "sys.stdout.buffer.write(onnx_bytes(load_model_directory(sys.argv[1])))"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "model")]
    # The converter's sets of texts have another order there.
    elsewhere = {**os.environ, "PYTHONHASHSEED": "30"}
    again = subprocess.run(command, env=elsewhere, check=True, capture_output=True)
    assert again.stdout == contents


def test_without_the_converter_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path, CLASSIFIERS[0], dtype="float32")
    monkeypatch.setitem(sys.modules, "skl2onnx", None)
    with pytest.raises(FailedPrecondition, match=r"phalanx\[onnx\]") as caught:
        onnx_bytes(model)
    assert caught.value.reason == "EXTRA_MISSING"
