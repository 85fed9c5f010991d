"""PyTorch held to one order of arithmetic: equal inputs, equal bits.

What decides over bits is set for the time of a call and put back afterwards, since the process may
be one in which somebody works with PyTorch for other purposes: the number of threads, the
algorithms, reduced precision, the device at hand, and the generators of random numbers.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from phalanx.blas import CUBLAS_ENVIRONMENT
from phalanx.errors import FailedPrecondition

Tensor = Any
"""A `torch.Tensor`; the type is not known where PyTorch is not installed."""

INSTALL = "pip install 'phalanx[torch]'"
_STREAM = 3
"""Keeps these random numbers apart from those of other uses of the seed."""

_ERROR = 2
"""The mode in which PyTorch refuses what has no deterministic algorithm."""

Get = Callable[[], Any]
Change = Callable[[Any], Any]


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
    """Return where a leaf computes: the first GPU that it may see, for a job that asks for one.

    Raises FailedPrecondition where there is none, or one whose results would not be reproducible.
    """
    torch = import_torch()
    if not gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise FailedPrecondition(
            f"the job asks for a GPU (resources.gpus), and PyTorch {torch.__version__} sees none "
            "here; look at the driver and CUDA_VISIBLE_DEVICES, and whether this PyTorch was built "
            "with CUDA",
            reason="NO_GPU",
        )
    for name, value in CUBLAS_ENVIRONMENT.items():
        if os.environ.get(name) == value:
            continue
        if torch.cuda.is_initialized():
            # Read when the first product is computed: it may be too late.
            raise FailedPrecondition(
                f"this process has used the GPU with another workspace of cuBLAS, so results are "
                f"not reproducible; set {name}={value} before Python starts",
                reason="CUBLAS_WORKSPACE",
            )
        os.environ[name] = value
    return "cuda:0"


@contextmanager
def exact(device: str, seed: int = 0) -> Iterator[None]:
    """Make PyTorch compute the same bits each time while the body runs.

    Args:
        device: where it computes.
        seed: what its random numbers are drawn from, on this device and on the CPU.
    """
    torch = import_torch()
    with ExitStack() as before:
        _draw_from(seed, torch.device(device), before)
        _set(_settings(torch), before)
        _compute_precisely(torch, before)
        _leave_modes(torch.device(device), before)
        yield


def seed_of(key: tuple[int, ...]) -> int:
    """Return a seed for the random numbers of one leaf, which has a key of its own."""
    words = [_STREAM, *(part & 0xFFFF_FFFF_FFFF_FFFF for part in key)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def _draw_from(seed: int, device: Any, before: ExitStack) -> None:
    torch = import_torch()
    if device.type == "cpu":
        before.enter_context(torch.random.fork_rng([]))
    else:
        module = torch.get_device_module(device)
        # A notebook may have chosen another one, which is then that of `manual_seed` and `cuda()`.
        before.enter_context(module.device(device.index))
        before.enter_context(torch.random.fork_rng([device.index], device_type=device.type))
        module.manual_seed(seed)
    torch.default_generator.manual_seed(seed)


def _leave_modes(device: Any, before: ExitStack) -> None:
    """Forget what a notebook has chosen for its own computations."""
    torch = import_torch()
    if torch.get_default_device().type != "cpu":
        before.enter_context(torch.device("cpu"))
    for kind in {"cpu", device.type}:
        if torch.is_autocast_enabled(kind):
            before.enter_context(torch.autocast(kind, enabled=False))


def _settings(torch: ModuleType) -> list[tuple[Get, Change, Any]]:
    """How each setting is read and changed, and what it has to be."""
    cudnn = torch.backends.cudnn
    return [
        (torch.get_num_threads, torch.set_num_threads, 1),
        (_algorithms, _set_algorithms, _ERROR),
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _attribute(cudnn, "benchmark", False),
        _attribute(cudnn, "deterministic", True),
    ]


def _attribute(owner: Any, name: str, value: Any) -> tuple[Get, Change, Any]:
    return lambda: getattr(owner, name), lambda to: setattr(owner, name, to), value


def _old_precisions(torch: ModuleType) -> Iterator[tuple[Get, Change, Any]]:
    """The older switches of TF32. They cannot be read where others of the new ones are set."""
    read, write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield _unless_unreadable(read, "highest"), write, "highest"
    get, change, value = _attribute(torch.backends.cudnn, "allow_tf32", False)
    yield _unless_unreadable(get, value), change, value


def _compute_precisely(torch: ModuleType, before: ExitStack) -> None:
    """Switch reduced precision off, TF32 on GPUs and bfloat16 on CPUs, by old and new switches.

    The new ones come from the general to the special, and the old ones change them as well.
    """
    backends = torch.backends
    switches: list[tuple[Any, str]] = []
    if hasattr(backends, "fp32_precision"):  # since PyTorch 2.9
        switches += [(each, "none") for each in (backends, backends.cudnn, backends.mkldnn)]
        cuda, cpu = backends.cudnn, backends.mkldnn
        kernels = (backends.cuda.matmul, cuda.conv, cuda.rnn, cpu.matmul, cpu.conv, cpu.rnn)
        switches += [(each, "ieee") for each in kernels]
    found = [(owner, owner.fp32_precision) for owner, _ in switches]
    before.callback(_set_precisions, found)
    _set(_old_precisions(torch), before)
    # One after the other: what one of them says may depend on those before.
    _set_precisions(each for each in switches if each[0].fp32_precision not in ("ieee", "none"))


def _set_precisions(values: Iterable[tuple[Any, str]]) -> None:
    for owner, value in values:
        if owner.fp32_precision != value:
            owner.fp32_precision = value


def _set(settings: Iterable[tuple[Get, Change, Any]], before: ExitStack) -> None:
    for get, change, value in settings:
        present = get()
        if present != value:
            before.callback(change, present)
            change(value)


def _unless_unreadable(get: Get, value: Any) -> Get:
    def read() -> Any:
        try:
            return get()
        except RuntimeError:
            return value

    return read


def _algorithms() -> int:
    value: int = import_torch().get_deterministic_debug_mode()
    return value


def _set_algorithms(value: int) -> None:
    """`torch.use_deterministic_algorithms` does the same and loads the compiler, 800 modules and 70
    MB, to tell it, too; so it is told only where it is there already."""
    import_torch().set_deterministic_debug_mode(value)
    compiler: Any = sys.modules.get("torch._inductor.config")
    if compiler is not None and hasattr(compiler, "deterministic"):
        compiler.deterministic = value == _ERROR
