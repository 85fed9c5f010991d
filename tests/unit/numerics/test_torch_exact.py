"""What a process has chosen for PyTorch, and what leaves compute with all the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from phalanx.errors import FailedPrecondition

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: pip install 'phalanx[torch]'",
)

PRECISIONS = """
import json, os, sys, torch
from phalanx.models.torch_exact import exact

backends = torch.backends
KERNELS = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
           backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
OLD = (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32)


def read(switch):
    try:
        return switch()
    except RuntimeError:
        return "unreadable"


def state():
    kernels = [each.fp32_precision for each in KERNELS]
    modes = [str(torch.get_default_device()), torch.is_autocast_enabled("cpu")]
    return kernels, [*map(read, OLD), *modes]


for own in sys.argv[1:]:
    if os.fork() == 0:  # PyTorch has no way back to a state in which nothing was chosen
        exec(own)
        before = state()
        with exact("cpu"):
            made = torch.ones(2, 2) @ torch.ones(2, 2)
            within = [*state()[0], str(made.dtype), made.device.type]
        assert "torch._inductor" not in sys.modules, "the compiler takes seconds to load"
        print(json.dumps([own, within, before, state()]), flush=True)
        os._exit(0)
    os.wait()
"""
CHOSEN = (
    "",
    "torch.set_float32_matmul_precision('medium')",
    "backends.cuda.matmul.allow_tf32 = True",
    "backends.fp32_precision = 'tf32'",
    "backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.cudnn.conv.fp32_precision = 'ieee'",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "backends.mkldnn.fp32_precision = 'bf16'",
    "torch.set_default_device('meta')",
    "torch.autocast('cpu', torch.bfloat16).__enter__()",
)


@pytest.fixture(scope="module")
def computed_with() -> dict[str, list[Any]]:
    import torch

    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has the old switches only")
    done = subprocess.run(
        [sys.executable, "-c", PRECISIONS, *CHOSEN],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    found = {own: rest for own, *rest in lines}
    assert set(found) == set(CHOSEN), done.stderr
    return found


@pytest.mark.parametrize("own", CHOSEN)
def test_no_precision_is_given_away_whatever_the_process_has_chosen(
    computed_with: dict[str, list[Any]], own: str
) -> None:
    (*kernels, dtype, device), before, after = computed_with[own]
    assert set(kernels) <= {"ieee", "none"}
    assert (dtype, device) == ("torch.float32", "cpu")
    assert after == before


def test_the_workspace_of_cublas_is_fixed_before_the_gpu_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from phalanx.models.torch_exact import device_of

    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for before in (None, ":16:8", ":4096:8"):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        assert device_of(1) == "cuda:0"
        assert os.environ[name] == ":4096:8", "whatever the machine's own environment says"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert device_of(1) == "cuda:0"
    monkeypatch.setenv(name, ":16:8")
    with pytest.raises(FailedPrecondition, match=f"set {name}=:4096:8 before Python") as caught:
        device_of(1)
    assert caught.value.reason == "CUBLAS_WORKSPACE"
    assert device_of(0) == "cpu"
