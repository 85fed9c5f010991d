"""What a stored model is said to take is what loading it and predicting with it takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import ParseDict
from numpy.typing import NDArray

from phalanx.data.ingest import ingest_arrays
from phalanx.data.model_files import PARAMETERS_FILE
from phalanx.data.options import IngestOptions
from phalanx.data.predict import LoadedModel
from phalanx.data.writer import DirectoryBlobs
from phalanx.models import DataSchema, build_model
from phalanx.models.base import Predictor, make_layout
from phalanx.programs.model_memory import model_bytes
from phalanx.programs.predicting import predictor_of
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout, TensorSpec
from tests.unit.data.finished_models import write_finished_model

FEATURES, CLASSES, VECTORS = 16, 2, 10_000
NODES = 60_000


def tree() -> NDArray[np.float64]:
    """A balanced tree in the form of a table: every node has two children, as long as there are."""
    table, numbers = np.zeros((NODES, 7 + CLASSES)), np.arange(NODES)
    inner = 2 * numbers + 2 < NODES
    table[:, 0] = np.where(inner, 2 * numbers + 1, -1)
    table[:, 1] = np.where(inner, 2 * numbers + 2, -1)
    table[:, 2] = numbers % FEATURES
    return table


def forest() -> tuple[JobSpec, Predictor, Any]:
    tensors = [(f"tree.{number:05}", (NODES, 7 + CLASSES), False) for number in range(3)]
    layout = make_layout([*tensors, ("feature_importances", (FEATURES,), False)], "float64")
    spec = ParseDict({"forest": {"trees": 3}}, JobSpec())
    vector = np.concatenate([*[tree().ravel()] * 3, np.zeros(FEATURES)])
    return spec, predictor_of(spec, layout, CLASSES), vector


def kernel_machine() -> tuple[JobSpec, Predictor, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "support_vectors": (VECTORS, FEATURES),
        "dual_coefficients": (CLASSES - 1, VECTORS),
        "intercepts": (1,),
        "support_classes": (VECTORS,),
        "classes": (CLASSES,),
    }
    layout = make_layout([(name, shape, False) for name, shape in shapes.items()], "float64")
    spec = ParseDict({"cascade": {"gamma": 0.1}}, JobSpec())
    vector = np.ones(layout.element_count)
    vector[-CLASSES - VECTORS :] = [*(np.arange(VECTORS) % CLASSES), *range(CLASSES)]
    return spec, predictor_of(spec, layout, CLASSES), vector


def trained(**model: Any) -> tuple[JobSpec, Predictor, Any]:
    spec = ParseDict({"train": {"dtype": "float32", "model": model}}, JobSpec())
    built = build_model(spec, DataSchema(FEATURES, CLASSES, "float32"), None)
    return spec, built, np.full(built.layout.element_count, 0.5)


CASES = {
    "forest": forest,
    "kernel machine": kernel_machine,
    "network": lambda: trained(mlp={"hidden": [2048, 1024]}),
    "boosting": lambda: trained(boosting={"trees": 300, "depth": 10, "bins": 8}),
    "k-means": lambda: trained(k_means={"clusters": 20_000}),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_stored_model_takes_what_is_counted_for_it(tmp_path: Path, kind: str) -> None:
    """The file is read as a whole, and so in memory; what else there is, Python was asked for."""
    spec, model, vector = CASES[kind]()
    rows = np.zeros((256, FEATURES), np.float32)
    rows[:, 0] = np.arange(len(rows))
    options = IngestOptions(task="classification")
    manifest = ingest_arrays(
        rows, np.arange(len(rows)) % CLASSES, options, DirectoryBlobs(tmp_path)
    )
    write_finished_model(tmp_path / "model", manifest, spec, model, vector)
    files = {path.name: path for path in (tmp_path / "model").iterdir()}
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        LoadedModel.of_files(files, None).predict_prepared(rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    taken = peak - before + files[PARAMETERS_FILE].stat().st_size
    assert 0.6 * taken < model_bytes(spec, model.layout) < 1.5 * taken


def test_a_tensor_may_be_one_number() -> None:
    spec = ParseDict({"train": {"model": {"torch": {"module": "net:build"}}}}, JobSpec())
    layout = make_layout([("weights", (3, 2), True), ("temperature", (), True)], "float32")
    assert model_bytes(spec, layout) == 4 * 4 * 7
    named = make_layout([("centers", (), True)], "float32")
    spec = ParseDict({"train": {"model": {"k_means": {"clusters": 1}}}}, JobSpec())
    assert model_bytes(spec, named) == 2 * 4


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dtype="float32", element_count=-(2**62)),
        Layout(tensors=[TensorSpec(name="w", shape=[2**60])], dtype="float64", element_count=2**60),
        Layout(tensors=[TensorSpec(name="w", shape=[3])], dtype="float32", element_count=4),
        Layout(tensors=[TensorSpec(name="w", shape=[-3])], dtype="float32", element_count=-3),
        Layout(tensors=[TensorSpec(name="w")], dtype="float32", element_count=2),
        Layout(tensors=[TensorSpec(name="w", shape=[-1, -3])], dtype="float32", element_count=3),
    ],
)
def test_a_description_whose_tensors_do_not_add_up_says_nothing_of_memory(layout: Layout) -> None:
    """Whoever may store models has written it."""
    with pytest.raises(ValueError, match="not those of"):
        model_bytes(JobSpec(), layout)
