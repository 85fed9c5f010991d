"""What tests that need a GPU have in common: whether there is one, and whether there must be."""

from __future__ import annotations

import importlib.util
import os

import pytest

MUST_BE_THERE = "PHALANX_TEST_GPU"
"""Set by `make gpu`: without a GPU tests that need one fail then, instead of being skipped."""


def needs_gpu() -> None:
    """Skip or fail the test that calls it where PyTorch sees no GPU."""
    why = "PyTorch is not installed"
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return
        why = f"PyTorch {torch.__version__} sees no GPU here"
    if os.environ.get(MUST_BE_THERE):
        pytest.fail(why)
    pytest.skip(f"{why} (make gpu)")
