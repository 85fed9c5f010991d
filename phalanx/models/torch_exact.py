"""PyTorch held to one order of arithmetic: equal inputs, equal bits.

What decides over bits is set for the time of a call and put back afterwards, since the process may
be one in which somebody works with PyTorch for other purposes: the number of threads, the
algorithms, reduced precision, and the generators of random numbers.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from phalanx.errors import FailedPrecondition

Tensor = Any
"""A `torch.Tensor`; the type is not known where PyTorch is not installed."""

INSTALL = "pip install 'phalanx[torch]'"
_STREAM = 3
"""Keeps these random numbers apart from those of other uses of the seed."""

_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""cuBLAS adds up in a fixed order only with a workspace of fixed size, which it reads once."""


def import_torch() -> ModuleType:
    """Return the module `torch`. Raises FailedPrecondition where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise FailedPrecondition(
            f"train.model.torch needs PyTorch, which cannot be imported here ({error}); "
            f"install it with: {INSTALL}",
            reason="EXTRA_MISSING",
        ) from error


def device_of(gpus: int) -> str:
    """Return where a leaf computes: the first GPU that it may see, for a job that asks for one."""
    torch = import_torch()
    if not gpus or not torch.cuda.is_available():
        return "cpu"
    os.environ.setdefault(*_CUBLAS)
    return "cuda:0"


@contextmanager
def exact(device: str, seed: int = 0) -> Iterator[None]:
    """Make PyTorch compute the same bits each time while the body runs.

    Args:
        device: where it computes.
        seed: what its random numbers are drawn from.
    """
    torch = import_torch()
    with ExitStack() as before:
        before.enter_context(torch.random.fork_rng([] if device == "cpu" else [0]))
        torch.default_generator.manual_seed(seed)
        if device != "cpu":
            torch.cuda.manual_seed(seed)
        for get, change, value in _settings(torch):
            present = get()
            if present != value:
                before.callback(change, present)
                change(value)
        yield


def seed_of(key: tuple[int, ...]) -> int:
    """Return a seed for the random numbers of one leaf, which has a key of its own."""
    words = [_STREAM, *(part & 0xFFFF_FFFF_FFFF_FFFF for part in key)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def _settings(torch: ModuleType) -> list[tuple[Callable[[], Any], Callable[[Any], Any], Any]]:
    """How each setting is read and changed, and what it has to be."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return [
        (torch.get_num_threads, torch.set_num_threads, 1),
        (_algorithms, _set_algorithms, (True, False)),
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        *(
            (lambda o=owner, n=name: getattr(o, n), lambda v, o=owner, n=name: setattr(o, n, v), to)
            for owner, name, to in (
                (cudnn, "benchmark", False),
                (cudnn, "deterministic", True),
                (cudnn, "allow_tf32", False),
                (matmul, "allow_tf32", False),
            )
        ),
    ]


def _algorithms() -> tuple[bool, bool]:
    torch = import_torch()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), only_warns


def _set_algorithms(value: tuple[bool, bool]) -> None:
    import_torch().use_deterministic_algorithms(value[0], warn_only=value[1])
