"""PyTorch modules on a GPU: `make gpu`. What is computed is compared with itself and with a CPU.

Where no GPU is, `test_torch_device` checks what can be checked without one.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.models import Batch, DataSchema, Model, build_model
from phalanx.models.base import DeviceLost, views
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.gpu import needs_gpu
from worker.session.devices import gpu_kinds

FEATURES, CLASSES, ROWS = 64, 5, 96
GUARD_S = 240.0

NET = '''
"""Modules whose sums a GPU adds up in any order unless it is told not to."""

import torch
from torch import nn


class Pictures(nn.Module):
    """Convolutions, batch normalisation, pooling; with a buffer of each kind."""

    def __init__(self, schema, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(64, max(schema.classes, 1)))
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x):
        return self.layers(x) * self.scale


class Words(nn.Module):
    """Many rows write to the same few places: atomic additions, if nobody forbids them."""

    def __init__(self, schema, dropout=0.0):
        super().__init__()
        self.words = nn.Embedding(7, 16)
        self.bag = nn.EmbeddingBag(7, 16, mode="sum")
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(16, max(schema.classes, 1))

    def forward(self, x):
        indices = (x[:, :12].abs() * 10).long() % 7
        picked = self.words(indices)
        places = indices.reshape(-1)
        added = torch.zeros(7, 16, dtype=x.dtype, device=x.device)
        added = added.index_add(0, places, picked.reshape(-1, 16))
        spread = torch.zeros_like(added).scatter_add(
            0, places[:, None].expand(-1, 16), picked.reshape(-1, 16))
        put = added.index_put((places,), picked.reshape(-1, 16), accumulate=True)
        shared = (added + spread + put).mean(0) / 100
        return self.last(self.drop(picked.mean(1) + self.bag(indices) + shared))


class Sequence(nn.Module):
    """cuDNN's recurrent kernels, and attention."""

    def __init__(self, schema, dropout=0.0):
        super().__init__()
        self.recurrent = nn.LSTM(8, 16, num_layers=2, batch_first=True, dropout=dropout)
        self.attention = nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True)
        self.last = nn.Linear(16, max(schema.classes, 1))

    def forward(self, x):
        states, _ = self.recurrent(x.unflatten(1, (8, 8)))
        seen, _ = self.attention(states, states, states, need_weights=False)
        return self.last(seen.mean(1))


class Wide(nn.Module):
    """Products that are large enough for split sums and for TF32."""

    def __init__(self, schema, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(schema.features, 2048), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(2048, max(schema.classes, 1)))

    def forward(self, x):
        return self.layers(x)


class Refused(nn.Module):
    """The gradient of its pooling has no deterministic kernel."""

    def __init__(self, schema):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(64, schema.classes))

    def forward(self, x):
        return self.layers(x)


class Greedy(nn.Module):
    def __init__(self, schema):
        super().__init__()
        self.last = nn.Linear(schema.features, schema.classes)

    def forward(self, x):
        return self.last(x) + torch.ones(1 << 42, device=x.device).sum()


class Astray(nn.Module):
    """Looks a word up that is not there: the kernel stops, and with it the process's GPU."""

    def __init__(self, schema):
        super().__init__()
        self.words = nn.Embedding(2, schema.classes)

    def forward(self, x):
        return self.words(torch.full((len(x),), 1000, device=x.device))


weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), reduction="none")
'''

KINDS = ["Pictures", "Words", "Sequence", "Wide"]
DTYPES = ["float32", "float64"]
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def gpu() -> None:
    needs_gpu()


def build(folder: Path, function: str, gpus: int = 1, **more: Any) -> Model:
    """A model of the modules above; `loss`, `dtype` and `classes`, and arguments of the module."""
    (folder / "net.py").write_text(NET)
    spec = JobSpec(name="job", seed=5)
    spec.resources.gpus = gpus
    spec.train.model.torch.module = f"net:{function}"
    spec.train.model.torch.loss = more.pop("loss", "cross_entropy")
    schema = DataSchema(FEATURES, more.pop("classes", CLASSES), more.pop("dtype", "float32"))
    spec.train.model.torch.arguments.update(more)
    return build_model(spec, schema, folder)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda function, gpus=1, **more: build(tmp_path, function, gpus, **more)


def rows_of(dtype: str, key: tuple[int, int, int] = (1, 2, 3), classes: int = CLASSES) -> Batch:
    random = np.random.default_rng(7)
    features = random.normal(size=(ROWS, FEATURES)).astype(dtype)
    targets = np.arange(ROWS) % classes if classes else random.normal(size=ROWS).astype(dtype)
    return Batch(features, targets, np.linspace(0.5, 2, ROWS).astype(dtype), key=key)


def results(model: Model, rows: Batch) -> dict[str, Any]:
    """Everything that a model computes, by name."""
    parameters = model.initial_parameters(1)
    out = np.full_like(parameters, np.nan)
    sums = model.gradient(parameters, rows, out)
    return {
        "gradient": out,
        "loss": np.array([sums.loss_sum]),
        "evaluation": model.evaluate(parameters, rows),
        "predictions": model.predict(parameters, rows.features),
    }


def sha256(found: dict[str, Any]) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_each_time(make: Make, kind: str, dtype: str) -> None:
    """Atomic additions show within a few tries, if there are any."""
    model, rows = make(kind, dtype=dtype, dropout=0.3), rows_of(dtype)
    first = sha256(results(model, rows))
    for _ in range(20):
        assert sha256(results(model, rows)) == first


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_another_process_that_has_done_other_things(
    make: Make, tmp_path: Path, kind: str
) -> None:
    here = sha256(results(make(kind, dropout=0.3), rows_of("float32")))
    for before in ("0", "300"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.unit.numerics.test_torch_gpu", tmp_path, kind, before],
            check=True,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
        )
        assert json.loads(done.stdout) == here, f"after {before} MB on the GPU"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [CLASSES, 0])
def test_nearly_the_numbers_of_a_cpu(make: Make, kind: str, dtype: str, classes: int) -> None:
    """Gradients, buffers, evaluation and predictions; without chance, of which each has its own."""
    near = {"rtol": 1e-3, "atol": 1e-3} if dtype == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    loss = "cross_entropy" if classes else "mse_loss"
    given = {"dtype": dtype, "classes": classes, "loss": loss}
    there, here = make(kind, **given), make(kind, gpus=0, **given)
    assert there.layout == here.layout
    parameters = here.initial_parameters(1)
    assert there.initial_parameters(1).tobytes() == parameters.tobytes()
    rows = rows_of(dtype, classes=classes)
    expected = results(here, rows)
    for name, found in results(there, rows).items():
        np.testing.assert_allclose(found, expected[name], **near, err_msg=name)
    if kind == "Pictures":
        running = views(there.layout, results(there, rows)["gradient"])["layers.2.running_mean"]
        assert running.any()


def test_full_precision_whatever_the_process_has_switched_on(make: Make) -> None:
    import torch

    model, rows = make("Wide"), rows_of("float32")
    expected = sha256(results(model, rows))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert sha256(results(model, rows)) == expected
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_chance_goes_by_the_key_and_is_put_back(make: Make) -> None:
    import torch

    model = make("Pictures", dropout=0.5)
    before = [torch.get_rng_state(), torch.cuda.get_rng_state(0)]
    keys = [(1, 2, 3), (1, 2, 3), (1, 2, 4), (2, 2, 3)]
    drawn = [results(model, rows_of("float32", key))["gradient"].tobytes() for key in keys]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    after = [torch.get_rng_state(), torch.cuda.get_rng_state(0)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_loss_with_tensors_of_its_own(make: Make) -> None:
    rows = rows_of("float64")
    there, here = (
        results(make("Wide", gpus=gpus, dtype="float64", loss="net:weighted"), rows)
        for gpus in (1, 0)
    )
    np.testing.assert_allclose(there["gradient"], here["gradient"], rtol=1e-9, atol=1e-9)


def test_the_fingerprint_is_that_of_this_gpu(make: Make) -> None:
    from phalanx.models.torch_golden import golden

    there, here = make("Wide"), make("Wide", gpus=0)
    assert there.numeric_fingerprint != here.numeric_fingerprint
    golden.cache_clear()
    assert golden("cuda:0") == there.numeric_fingerprint


def test_the_driver_calls_it_what_control_is_told(make: Make) -> None:
    import torch

    make("Wide")
    if not Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("the driver shows no GPUs here, so workers tell no kinds")
    gpus = [f"GPU-{torch.cuda.get_device_properties(0).uuid}"]
    told = gpu_kinds(gpus)
    assert told in ((), (torch.cuda.get_device_name(0),)), "not known in parts of a GPU only"


def test_an_exported_module_is_on_the_cpu(make: Make) -> None:
    model = make("Pictures")
    parameters = model.initial_parameters(1)
    exported = model.within(lambda inner: inner.predictor(parameters))
    held = [*exported.parameters(), *exported.buffers()]
    assert {each.device.type for each in held} == {"cpu"}


def test_what_has_no_deterministic_kernel_is_refused_and_the_gpu_works_on(make: Make) -> None:
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        results(make("Refused"), rows_of("float32"))
    assert results(make("Wide"), rows_of("float32"))["gradient"].any()


def test_a_full_gpu_says_what_to_change_and_works_on(make: Make) -> None:
    with pytest.raises(MemoryError, match="use a smaller batch_size or more shards"):
        results(make("Greedy"), rows_of("float32"))
    assert results(make("Wide"), rows_of("float32"))["gradient"].any()


def test_after_a_failed_kernel_the_process_is_of_no_use(tmp_path: Path) -> None:
    """In a process of its own: nothing on the GPU works there any more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.numerics.test_torch_gpu", tmp_path, "Astray", "0"],
        check=True,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    assert json.loads(done.stdout) == ["DeviceLost", "DeviceLost"]


def _in_a_process(folder: Path, kind: str, megabytes: int) -> Any:
    import torch

    if kind == "Astray":
        return [_failure_of(folder, each) for each in ("Astray", "Wide")]
    if megabytes:
        kept = torch.ones(megabytes << 18, device="cuda")
        build(folder, "Sequence").evaluate(
            build(folder, "Sequence").initial_parameters(3), rows_of("float32")
        )
        assert kept.all()
    return sha256(results(build(folder, kind, dropout=0.3), rows_of("float32")))


def _failure_of(folder: Path, kind: str) -> str:
    try:
        results(build(folder, kind), rows_of("float32"))
    except DeviceLost as error:
        return type(error).__name__
    return ""


if __name__ == "__main__":
    # As in a leaf process: before anything is computed there.
    import os

    from phalanx.blas import CUBLAS_ENVIRONMENT

    os.environ.update(CUBLAS_ENVIRONMENT)
    print(json.dumps(_in_a_process(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
