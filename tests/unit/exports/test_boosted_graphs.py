"""Boosted trees as ONNX files: what a runtime computes of them is what the models predict."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse

import phalanx
from phalanx.data.predict import LoadedModel
from phalanx.errors import FailedPrecondition
from phalanx.exports.onnx_files import onnx_bytes

# Computes in its own threads and kernels, so that it is no echo of NumPy.
runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")

ROWS = 300


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        yield cluster


def rows_of() -> Any:
    generator = np.random.Generator(np.random.Philox(5))
    rows = generator.normal(size=(ROWS, 5)) * [1, 1e-3, 1e20, 1, 0] + [0, 7, 0, 0, 3]
    rows[:, 3] = np.round(rows[:, 3])
    return rows


def boosted(cluster: phalanx.Cluster, rows: Any, targets: Any, **more: Any) -> LoadedModel:
    task = "classification" if len(np.unique(targets)) < ROWS else "regression"
    cluster.data.add("rows", rows, targets, dtype="float64", task=task)
    model = {"boosting": {"trees": 12, "depth": 4, "min_leaf_rows": 2}, **more}
    job = {"name": "boosted", "data": {"name": "rows", "shards": 2}, "train": {"model": model}}
    return cluster.models.get(cluster.submit(job).wait(timeout_s=60).model)


def outputs_of(model: LoadedModel, rows: Any) -> dict[str, Any]:
    session = runtime.InferenceSession(onnx_bytes(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"features": rows}), strict=True))


@pytest.mark.parametrize(
    "labels", [["no", "yes"], [False, True], [3, 7, -1], ["b", "a", "c", "ø"], [0.5, 1.5, 2.0]]
)
@pytest.mark.parametrize("form", ["standardised", "plain", "sparse"])
def test_classes_are_those_of_the_model(
    alone: phalanx.Cluster, labels: list[Any], form: str
) -> None:
    rows = rows_of()
    places = np.floor((rows[:, 0] + 0.7 * rows[:, 3] + 9) * 2).astype(int) % len(labels)
    taken = scipy.sparse.csr_array(rows) if form == "sparse" else rows
    more = {"standardise": False} if form == "plain" else {}
    model = boosted(alone, taken, np.array(labels)[places], **more)
    assert model.standardises == (form == "standardised")
    found, ours = outputs_of(model, rows), model.predict_prepared(taken)
    assert ours.probabilities is not None
    np.testing.assert_allclose(found["probabilities"], ours.probabilities, rtol=0, atol=1e-6)
    written = [str(each) if isinstance(each, float) else each for each in ours.labels.tolist()]
    assert found["label"].tolist() == written
    assert len(set(written)) == len(labels)


def test_numbers_are_those_of_the_model(alone: phalanx.Cluster) -> None:
    rows = rows_of()
    model = boosted(alone, rows, 1e6 * rows[:, 0] + rows[:, 3])
    found = outputs_of(model, rows)["prediction"]
    ours = model.predict_prepared(rows).labels
    np.testing.assert_allclose(found[:, 0], ours, rtol=1e-6)
    assert len(np.unique(ours)) > 20
    assert found.shape == (ROWS, 1)


@pytest.mark.parametrize("step", [2.0**-52, 1e-9])
def test_values_that_float32_does_not_know_are_told_apart(
    alone: phalanx.Cluster, step: float
) -> None:
    rows = np.repeat(1 + step * np.arange(3), ROWS // 3)[:, np.newaxis]
    model = boosted(alone, rows, (rows[:, 0] > 1).astype(int), standardise=False)
    ours = model.predict_prepared(rows).labels.tolist()
    assert outputs_of(model, rows)["label"].tolist() == ours
    assert set(ours) == {0, 1}


def test_equal_models_give_equal_files_that_say_what_they_are(alone: phalanx.Cluster) -> None:
    rows = rows_of()
    model = boosted(alone, rows, (rows[:, 0] > 0).astype(int))
    contents = onnx_bytes(model)
    assert contents == onnx_bytes(model)
    session = runtime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert told["parameters_sha256"] == model.parameters_sha256
    [features] = session.get_inputs()
    assert (features.type, features.shape) == ("tensor(double)", [None, 5])


def test_without_the_library_it_says_what_to_install(
    alone: phalanx.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of()
    model = boosted(alone, rows, (rows[:, 0] > 0).astype(int))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FailedPrecondition, match=r"phalanx\[onnx\]") as caught:
        onnx_bytes(model)
    assert caught.value.reason == "EXTRA_MISSING"
