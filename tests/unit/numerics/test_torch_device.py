"""PyTorch modules on another device than the CPU: what has to be there is, and all comes home.

No GPU is needed: see `second_device`. One process runs all of it, since PyTorch cannot forget a
device. What a GPU computes, and whether it computes it twice, only a GPU can say: `test_torch_gpu`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: pip install 'phalanx[torch]'",
)

GUARD_S = 240.0
PLACE = "second:0"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no device that is written in Python")
    script, folder = "tests.unit.numerics.second_device_report", tmp_path_factory.mktemp("code")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", script, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "case", ["classes", "weights of rows", "own loss", "loss with tensors", "numbers"]
)
def test_the_device_gives_what_the_cpu_gives(report: dict[str, Any], case: str) -> None:
    """Gradients, buffers, chance, evaluation and predictions: kernels and seeds are the same."""
    found = report[case]
    assert found["there"] == found["here"]
    assert found["there"]["gradient again"] == found["there"]["gradient and buffers"]


@pytest.mark.parametrize("case", ["classes", "numbers"])
def test_it_is_the_device_that_computes(report: dict[str, Any], case: str) -> None:
    names = "\n".join(report[case]["ran"])
    wanted = ["convolution", "convolution_backward", "batch_norm", "dropout", "embedding"]
    wanted += ["embedding_dense_backward", "huber_loss" if case == "numbers" else "nll_loss"]
    assert [each for each in wanted if each not in names] == []


def test_chance_goes_by_the_key_and_all_generators_are_put_back(report: dict[str, Any]) -> None:
    assert report["chance"] == {
        "equal keys": True,
        "other keys": False,
        "put back": [True, True, True],
    }


def test_parameters_that_are_drawn_on_the_device_go_by_the_seed(report: dict[str, Any]) -> None:
    assert report["born there"] == {"equal seeds": True, "other seeds": False}


def test_what_is_exported_lies_on_the_cpu_and_predicts_the_same(report: dict[str, Any]) -> None:
    assert report["export"] == {"devices": ["cpu"], "same": True}


def test_the_fingerprint_names_the_device(report: dict[str, Any]) -> None:
    """Kernels are the same here, so only what the device calls itself differs."""
    found = report["fingerprints"]
    assert set(found) == {"cpu", PLACE}
    assert len(set(found.values())) == 2


def test_a_whole_job_gives_the_parameters_and_metrics_of_the_cpu(report: dict[str, Any]) -> None:
    here, there = report["job"]
    assert there == here


def test_a_stored_model_predicts_on_the_device_only_where_it_is_asked_for(
    report: dict[str, Any],
) -> None:
    """What it was trained on does not matter: workers with and without GPUs score one split."""
    unasked, without, asked = report["stored model"]
    assert [unasked[0], without[0], asked[0]] == [False, False, True]
    assert unasked == without


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        ("full", "MemoryError", "use a smaller batch_size or more shards, a smaller module"),
        ("lost", "DeviceLost", "the GPU failed, and this process cannot use it any more"),
        ("old", "DeviceLost", "PyTorch says: CUDA error: device-side assert triggered"),
        ("library", "DeviceLost", "PyTorch says: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        ("code", "RuntimeError", "the job's own"),
    ],
)
def test_failures_of_the_device_are_told_apart(
    report: dict[str, Any], failure: str, kind: str, text: str
) -> None:
    found = report["failures"][failure]
    assert set(found) == {"gradient", "evaluate", "predict", "build"}
    for call, (name, message) in found.items():
        assert name == kind, call
        assert text in message, call
        assert not message.endswith("X"), "one line of PyTorch is enough"


def test_tensors_of_two_devices_do_not_mix_here(report: dict[str, Any]) -> None:
    """What the tests above rely on. A single number may come from the CPU, as on a GPU."""
    found = report["mixed"]
    for name in ("product", "sum in place", "loss"):
        assert found[name][0] == "Mixed", name
    assert "numpy" in found["NumPy"][1]
    assert found["number"] == []
