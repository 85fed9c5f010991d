"""Run PyTorch modules on a second device and on the CPU; print as JSON what came of it.

`python -m tests.unit.numerics.second_device_report FOLDER`: the folder is for files of the job.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phalanx.data.ingest import ingest_arrays
from phalanx.data.options import IngestOptions
from phalanx.data.predict import LoadedModel
from phalanx.data.writer import DirectoryBlobs
from phalanx.models import Batch, DataSchema, build_model, torch_golden, torch_module
from phalanx.testing.datasets import classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.local import train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.data.finished_models import write_finished_model
from tests.unit.numerics import second_device
from tests.unit.numerics.second_device import DEVICE, PLACE

FEATURES, CLASSES, ROWS = 16, 3, 24

NET = '''
import torch
from torch import nn


class Net(nn.Module):
    """Has whatever must follow it to its device, and much that is summed in no fixed order."""

    def __init__(self, schema):
        super().__init__()
        self.picture = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3),
            nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3))
        self.words = nn.Embedding(5, 12)
        self.last = nn.Linear(12, max(schema.classes, 1))
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        words = self.words((x[:, 0].abs() * 10).long() % 5)
        return self.last((self.picture(x) + words) * self.scale)


def born_there(schema, device):
    return nn.Linear(schema.features, schema.classes, device=device)


def smoothed(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="none")
'''


def main(folder: Path) -> None:
    """Print the report."""
    (folder / "net.py").write_text(NET)
    second_device.install()
    torch_module.device_of = lambda gpus: PLACE if gpus else "cpu"
    report = {name: check(folder) for name, check in CHECKS.items()}
    print(json.dumps(report))


def model_on(gpus: int, folder: Path, function: str, loss: str, classes: int, **given: Any) -> Any:
    spec = JobSpec(name="job", seed=5)
    spec.resources.gpus = gpus
    spec.train.model.torch.module, spec.train.model.torch.loss = f"net:{function}", loss
    spec.train.model.torch.arguments.update(given)
    return build_model(spec, DataSchema(FEATURES, classes, "float64"), folder)


def rows_of(classes: int, **more: Any) -> Batch:
    random = np.random.default_rng(7)
    features = random.normal(size=(ROWS, FEATURES))
    targets = np.arange(ROWS) % classes if classes else random.normal(size=ROWS)
    return Batch(features, targets, key=(1, 2, 3), **more)


def results(model: Any, rows: Batch) -> dict[str, str]:
    """Hashes of what a model computes, by name."""
    parameters = model.initial_parameters(1)
    out = np.full_like(parameters, np.nan)
    sums = model.gradient(parameters, rows, out)
    found = {
        "parameters": parameters.copy(),
        "gradient and buffers": out.copy(),
        "loss": np.array([sums.loss_sum]),
        "evaluation": model.evaluate(parameters, rows),
        "predictions": model.predict(parameters, rows.features),
    }
    model.gradient(parameters * 2, rows, out)
    model.gradient(parameters, rows, out)
    found["gradient again"] = out
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in found.items()}


def both(*what: Any, weights: bool = False, **given: Any) -> Callable[[Path], Any]:
    """Compute the same on both devices; with operations that the second one ran."""

    def check(folder: Path) -> Any:
        classes = what[2]
        rows = rows_of(classes, weights=np.linspace(0, 2, ROWS) if weights else None)
        DEVICE.ran.clear()
        there = results(model_on(1, folder, *what, **given), rows)
        ran = sorted(DEVICE.ran)
        return {"there": there, "here": results(model_on(0, folder, *what, **given), rows)} | {
            "ran": ran
        }

    return check


def chance(folder: Path) -> Any:
    """What is drawn by chance, and whose generators move."""
    model = model_on(1, folder, "Net", "cross_entropy", CLASSES)
    parameters = model.initial_parameters(1)
    torch.manual_seed(4)
    before = [*map(DEVICE.get_rng_state, (0, 1)), torch.get_rng_state()]
    drawn = []
    for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)):
        out = np.empty_like(parameters)
        rows = rows_of(CLASSES)
        model.gradient(parameters, Batch(rows.features, rows.targets, key=key), out)
        drawn.append(out)
    model.evaluate(parameters, rows)
    after = [*map(DEVICE.get_rng_state, (0, 1)), torch.get_rng_state()]
    return {
        "equal keys": bool((drawn[0] == drawn[1]).all()),
        "other keys": bool((drawn[0] == drawn[2]).all()),
        "put back": [torch.equal(one, other) for one, other in zip(before, after, strict=True)],
    }


def born_there(folder: Path) -> Any:
    """First parameters that a module draws on the device itself."""
    model = model_on(1, folder, "born_there", "cross_entropy", CLASSES, device=PLACE)
    drawn = [model.initial_parameters(seed).tolist() for seed in (1, 1, 2)]
    return {"equal seeds": drawn[0] == drawn[1], "other seeds": drawn[0] == drawn[2]}


def export(folder: Path) -> Any:
    """A module to write to a file, which must not need the device."""
    model = model_on(1, folder, "Net", "cross_entropy", CLASSES)
    parameters, rows = model.initial_parameters(1), rows_of(CLASSES)
    exported = model.within(lambda inner: inner.predictor(parameters))
    held = [*exported.parameters(), *exported.buffers()]
    with torch.no_grad():
        predicted = exported(torch.from_numpy(rows.features)).numpy()
    same = np.array_equal(predicted, model.predict(parameters, rows.features))
    return {"devices": sorted({str(each.device) for each in held}), "same": same}


def fingerprints(_folder: Path) -> Any:
    """What both devices make of fixed numbers."""
    return {device: torch_golden.golden(device) for device in ("cpu", PLACE)}


def failures(folder: Path) -> Any:
    """What the model says where the device fails, in each of its methods."""
    model = model_on(1, folder, "Net", "cross_entropy", CLASSES)
    parameters, rows = model.initial_parameters(1), rows_of(CLASSES)
    out = np.empty_like(parameters)
    calls = {
        "gradient": lambda: model.gradient(parameters, rows, out),
        "evaluate": lambda: model.evaluate(parameters, rows),
        "predict": lambda: model.predict(parameters, rows.features),
        "build": lambda: model_on(1, folder, "Net", "cross_entropy", CLASSES),
    }
    raised = {
        "full": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nX"),
        "lost": lambda: torch.AcceleratorError("CUDA error: unspecified launch failure\nX"),
        "old": lambda: RuntimeError("CUDA error: device-side assert triggered\nX"),
        "library": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        "code": lambda: RuntimeError("the job's own"),
    }
    found: dict[str, dict[str, list[str]]] = {}
    for name, make in raised.items():
        found[name] = {}
        for call, function in calls.items():
            DEVICE.failure = make()
            with told(found[name], call):
                function()
    return found


@contextmanager
def told(found: dict[str, list[str]], call: str) -> Any:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it is what the report is about
        found[call] = [type(error).__name__, str(error)]


def mixed(folder: Path) -> Any:
    """What this device says to what a careless module does: without it no check here can fail."""
    there, here = torch.ones(2, 2).to(PLACE), torch.ones(2, 2)
    careless = {
        "product": lambda: there @ here,
        "sum in place": lambda: here.add_(there),
        "NumPy": there.numpy,
        "loss": lambda: torch.nn.functional.cross_entropy(there, torch.tensor([0, 1])),
        "number": lambda: there * torch.tensor(2.0),
    }
    found: dict[str, list[str]] = {}
    for name, function in careless.items():
        found[name] = []
        with told(found, name):
            function()
    return found


def job(folder: Path) -> Any:
    """SHA-256 of a whole job on each device."""
    features, targets = classification(200, FEATURES, CLASSES)
    (folder / "blobs").mkdir()
    stored = store(folder / "blobs", features, targets, test=0.2)
    document = {
        "model": {"torch": {"module": "net:Net", "loss": "net:weighted"}},
        "optimizer": {"adam": {"learning_rate": 0.05}},
        "batch_size": 60,
        "stop": {"steps": 5},
        "evaluation": {"every_steps": 5},
    }
    found = []
    for gpus in (0, 1):
        plan = plan_for(
            stored, document, data={"name": "data", "shards": 3}, resources={"gpus": gpus}, seed=5
        )
        trained = train_in_process(plan, stored.manifest, stored.fetch, code_dir=folder)
        found.append([hashlib.sha256(trained.parameters.tobytes()).hexdigest(), trained.metrics])
    return found


def stored_model(folder: Path) -> Any:
    """Whether a stored model of a job with a GPU predicts on one, by what whoever loads it asks."""
    numbers = np.arange(ROWS)
    rows = np.random.default_rng(7).normal(size=(ROWS, FEATURES))
    options = IngestOptions(task="classification", dtype="float64")
    manifest = ingest_arrays(rows, numbers % CLASSES, options, DirectoryBlobs(folder / "stored"))
    spec = JobSpec(name="m")
    spec.resources.gpus, spec.train.dtype = 1, "float64"
    spec.train.model.torch.module, spec.train.model.torch.loss = "net:Net", "cross_entropy"
    model = model_on(1, folder, "Net", "cross_entropy", CLASSES)
    write_finished_model(folder / "model", manifest, spec, model)
    files = {each.name: each for each in (folder / "model").iterdir()}
    found = []
    for gpus in (None, 0, 1):
        asked = {} if gpus is None else {"gpus": gpus}
        loaded = LoadedModel.of_files(files, folder, **asked)
        DEVICE.ran.clear()
        probabilities = loaded.predict_probabilities(rows)
        found.append([bool(DEVICE.ran), hashlib.sha256(probabilities.tobytes()).hexdigest()])
    return found


CHECKS: dict[str, Callable[[Path], Any]] = {
    "classes": both("Net", "cross_entropy", CLASSES),
    "weights of rows": both("Net", "cross_entropy", CLASSES, weights=True),
    "own loss": both("Net", "net:smoothed", CLASSES),
    "loss with tensors": both("Net", "net:weighted", CLASSES),
    "numbers": both("Net", "huber_loss", 0),
    "chance": chance,
    "born there": born_there,
    "export": export,
    "fingerprints": fingerprints,
    "failures": failures,
    "mixed": mixed,
    "job": job,
    "stored model": stored_model,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
